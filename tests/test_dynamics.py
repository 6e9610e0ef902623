import pytest

import disk
from paper import dynamics
from paper.dynamics import Options, emm_over_steps, power, quality_step


def trajectory(ratios, epochs=(1, 2, 4, 8)):
    return [dict(step=10 * e, epoch=e, ratio=r, interval=[r, r]) for e, r in zip(epochs, ratios)]


def test_a_power_law_is_found():
    assert power([10, 20, 40], [3 * 10**1.5, 3 * 20**1.5, 3 * 40**1.5]) == pytest.approx(1.5)
    assert power([10, 20, 40, 80], [None, 5, 5, 5]) == pytest.approx(0)  # a size that was not reached
    assert power([10, 20], [1, 2]) is None


def test_emm_over_steps_is_where_the_ratio_crosses_90_percent():
    sizes, grid = (10, 20), [[trajectory([0, 1, 1, 1]), trajectory([0, 0, 0.8, 1])]] * 2
    # at the first step none is above, at the last all; half way and all but half way down in between
    assert emm_over_steps(sizes, grid) == [(20, [pytest.approx(11)] * 2), (40, [pytest.approx(15)] * 2)]


def test_the_step_of_quality_is_the_first_that_is_near_the_best():
    found = [dict(step=s, frechet=f) for s, f in ((1, 9), (2, 3.2), (4, 3), (8, 5))]
    assert quality_step(found) == 2


def test_stopping_early_is_where_a_number_is_least():
    t = [dict(step=s, ratio=r, frechet=f, validation_loss=v) for s, r, f, v in ((1, 0, 6, 2), (2, 0.1, 3, 4),
                                                                                (4, 0.9, 4.5, 8))]
    assert dynamics.stops(dict(sizes=[10], grid=[[t]])) == [
        (10, "least held-out loss", [1], [0], [2]), (10, "least Frechet distance", [2], [0.1], [1]),
        (10, "end", [4], [0.9], [1.5])]


def tiny(folder, **given):
    return Options(**dict(seeds=(0, 1), sizes=(10, 20, 40), steps=8, snapshots=3, held_out=20, sample_count=8,
                          device="cpu", runs=str(folder), out=str(folder / "out")) | given)


def test_a_grid_is_measured_once_and_one_seed_goes_into_the_whole(tmp_path, monkeypatch):
    dynamics.dynamics(tiny(tmp_path, seeds=(1,)))
    draws, generate = [], dynamics.sample.generate
    monkeypatch.setattr(dynamics.sample, "generate", lambda *a, **k: draws.append(1) or generate(*a, **k))
    path = dynamics.dynamics(tiny(tmp_path))
    found = disk.read_json(path)
    assert len(draws) == 3 * 3  # of seed 0 alone
    assert path.with_suffix(".png").exists()
    assert [t["step"] for t in found["grid"][0][0]] == [2, 4, 8]
    assert [t["epoch"] for t in found["grid"][1][2]] == [s * 64 / 40 for s in (2, 4, 8)]
    assert found["tau_mem"] == [[None] * 3] * 2 and found["powers"]["tau_mem"]["mean"] is None
    losses = [t["validation_loss"] for t in found["grid"][0][0]]
    assert found["tau_loss"][0][0] == [2, 4, 8][losses.index(min(losses))]


@pytest.mark.parametrize("scale", ("cpu", "gpu", "paper"))
def test_the_dry_run_names_every_run(scale, capsys):
    assert dynamics.dynamics(Options(scale=scale, seeds=(0, 1), dry_run=True)) is None
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(dynamics.GRID[scale]["sizes"])
    assert len({line.split(":")[0] for line in lines}) == len(lines)


@pytest.mark.parametrize("wrong", (dict(sizes=(10,)), dict(sizes=(10, 10)), dict(steps=1), dict(seeds=())))
def test_what_makes_no_grid_is_refused(wrong):
    with pytest.raises(ValueError, match="--s"):
        Options(**wrong)

import json
import math

import pytest
from hypothesis import given, settings, strategies as st

import emm
import kernels.nearest
import run
import train
import unet


def falling(half, slope=4.0):
    """A ratio that falls with n, one half at n = half."""
    return lambda n: 1 / (1 + (n / half) ** slope)


class Measure:
    def __init__(self, ratio):
        self.ratio, self.sizes = ratio, []

    def __call__(self, n):
        assert n not in self.sizes, "nothing is measured twice"
        self.sizes.append(n)
        return self.ratio(n)


def test_doubles_then_bisects():
    measure = Measure(falling(1850))
    found = emm.search(measure, 500, 50000, multiple=10)
    assert measure.sizes[:3] == [500, 1000, 2000] and measure.sizes[3] == 1410
    low, high = found["bracket"]
    assert measure.ratio(low) >= 0.9 > measure.ratio(high) and high <= 1.1 * low
    truth = 1850 / 9 ** 0.25
    assert low <= found["emm"] <= high and low <= truth <= high
    assert found["monotone"] and found["rises"] == [] and [n for n, _ in found["probes"]] == measure.sizes


@settings(max_examples=200, deadline=None)
@given(half=st.floats(5, 1e5), slope=st.floats(0.5, 8), n_min=st.integers(2, 3000), n_max=st.integers(3000, 50000),
       eps=st.floats(0.02, 0.5), tolerance=st.floats(0.01, 1), multiple=st.sampled_from([1, 2, 10, 100]))
def test_any_falling_curve_is_bracketed(half, slope, n_min, n_max, eps, tolerance, multiple):
    measure = Measure(falling(half, slope))
    found = emm.search(measure, n_min, n_max, eps, tolerance, multiple)
    assert len(measure.sizes) <= 2 + math.log2(n_max) + math.log2(max(2, math.log(2) / math.log1p(min(tolerance, 1)))) + 3
    assert all(n % multiple == 0 and 2 <= n for n in measure.sizes) and max(measure.sizes) <= max(n_max, 2 * multiple)
    low, high = found["bracket"]
    if low is not None and high is not None:
        assert measure.ratio(low) >= 1 - eps > measure.ratio(high) and low <= found["emm"] <= high
        step_apart = round(math.sqrt(low * high) / multiple) * multiple in (low, high)
        assert high <= low * (1 + tolerance) or step_apart
    else:
        assert found["emm"] is None and (low or high)


def test_both_ends_of_the_range_end_with_a_statement():
    never = emm.search(Measure(lambda n: 0.2), 500, 5000)
    assert never["emm"] is None and never["bracket"] == [None, 500] and "below 500" in never["statement"]
    always = emm.search(Measure(lambda n: 1.0), 500, 5000)
    assert always["emm"] is None and always["bracket"] == [5000, None] and "at least 5000" in always["statement"]
    assert [n for n, _ in always["probes"]] == [500, 1000, 2000, 4000, 5000]


def test_a_curve_that_rises_is_reported_and_the_largest_size_counts():
    ratios = {100: 0.95, 200: 0.85, 140: 0.80, 170: 0.91}
    found = emm.search(lambda n: pytest.fail("nothing left to measure"), 100, 1000, tolerance=0.2, known=ratios)
    assert found["bracket"] == [170, 200] and not found["monotone"] and found["rises"] == [[140, 170]]
    assert "not monotone: it rises from 140 to 170" in found["statement"]


def test_a_killed_search_goes_on():
    whole = Measure(falling(1850))
    expected = emm.search(whole, 500, 50000, multiple=10)
    known = {}
    for n in whole.sizes:  # killed after each probe
        again = Measure(whole.ratio)
        assert emm.next_size(known, 500, 50000, multiple=10) == n
        known[n] = whole.ratio(n)
    found = emm.search(again, 500, 50000, multiple=10, known=known)
    assert again.sizes == [] and found == expected


def test_the_first_size_is_measured_whatever_is_known_below_it():
    found = emm.search(Measure(falling(3000)), 500, 50000, known={100: 0.5})  # trained too briefly, say
    assert found["bracket"][0] > 500 and found["rises"] == [[100, 500]]


def test_a_tolerance_that_class_balance_forbids_is_said():
    found = emm.search(Measure(falling(60)), 10, 1000, tolerance=0.05, multiple=10)
    assert "no size in between is a multiple of 10, so the tolerance of 5% is not reached" in found["statement"]
    assert "tolerance" not in emm.search(Measure(falling(6000)), 10, 100000, tolerance=0.05, multiple=10)["statement"]


def test_known_sizes_narrow_the_search():
    measure = Measure(falling(1850))
    found = emm.search(measure, 500, 50000, multiple=10, known={1000: measure.ratio(1000), 1200: measure.ratio(1200)})
    assert 500 not in measure.sizes and found["bracket"][0] <= 1850 / 9 ** 0.25 <= found["bracket"][1]
    other_eps = emm.search(measure, 500, 50000, 0.5, multiple=10, known=dict(found["probes"]))
    assert other_eps["bracket"][0] <= 1850 <= other_eps["bracket"][1]


TINY = dict(data="digits", width=4, blocks=1, channel_mult=(1, 1), batch=16, steps=4, warmup_steps=1, snapshots=2,
            n_min=10, n_max=40, samples=20, device="cpu")


def test_search_over_real_runs(tmp_path, capsys, monkeypatch):
    options = emm.Options(**TINY, out=str(tmp_path / "emm"))
    monkeypatch.setattr(kernels.nearest, "is_memorized", lambda distances, threshold: distances[:, 0] >= 0)  # all
    result = run.read_json(emm.find(options))
    assert result["bracket"] == [40, None] and result["emm"] is None
    assert [p["n"] for p in result["probes"]] == [10, 20, 40]
    probe = result["probes"][1]
    assert probe["ratio"] == 1.0 and [t["step"] for t in probe["trajectory"]] == [2, 4] and probe["images_trained"] == 64
    assert probe["samples_drawn"] == 40 and probe["last_ratio"] == 1.0 and probe["best"]["step"] == 2
    folder = tmp_path / "emm" / "n000020"
    assert {p.name for p in folder.glob("*.npz")} == {"samples-00000002.npz"}  # the best alone
    assert len(train.snapshots(folder)) == 2 and json.loads((folder / "config.json").read_text())["options"]["n"] == 20
    text = capsys.readouterr().out
    assert "EMM is at least 40" in text and len([line for line in text.splitlines() if "100.00%" in line]) == 3

    monkeypatch.setattr(emm.train, "train_step", lambda *a: pytest.fail("trained again"))
    monkeypatch.setattr(emm.sample, "generate", lambda *a: pytest.fail("sampled again"))
    again = run.read_json(emm.find(emm.Options(**{**TINY, "out": str(tmp_path / "emm"), "eps": 0.5})))
    assert again["probes"] == result["probes"] and again["eps"] == 0.5
    with pytest.raises(ValueError, match="samples: 20 there, 30 asked"):
        emm.find(emm.Options(**{**TINY, "out": str(tmp_path / "emm"), "samples": 30}))


def test_a_killed_probe_goes_on_at_its_snapshot(tmp_path, monkeypatch):
    whole = emm.probe(emm.Options(**TINY, out=str(tmp_path / "whole")), 20)
    options, generate, calls = emm.Options(**TINY, out=str(tmp_path / "broken")), emm.sample.generate, []

    def killed(*arguments):
        calls.append(unet.Denoiser)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*arguments)

    monkeypatch.setattr(emm.sample, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        emm.probe(options, 20)
    again = emm.probe(options, 20)
    assert len(calls) == 3  # the first snapshot was sampled once
    changing = ("training_seconds", "sampling_seconds", "finished")
    assert {k: v for k, v in again.items() if k not in changing} == {k: v for k, v in whole.items() if k not in changing}


@pytest.mark.parametrize("given, words", [
    (dict(eps=0.0), "--eps 0.0"), (dict(tolerance=0.0), "--tolerance 0.0"), (dict(n_min=1), "--n-min 1"),
    (dict(samples=0), "--samples 0"), (dict(threshold="3"), "threshold"), (dict(n_min=5000, n_max=0), "more than the 1797 images of")])
def test_bad_options(tmp_path, given, words):
    with pytest.raises(ValueError, match=words):
        emm.find(emm.Options(**{**TINY, "out": str(tmp_path / "x"), **given}))

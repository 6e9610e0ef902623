"""What experiments beyond the paper measure of a run, of tiny ones."""
from pathlib import Path

import pytest
import torch

import disk
import emm
from diffusion import denoiser
from images import files
from measure.denoisers import SIGMAS
from paper import agree, beyond, compare
from paper.beyond import MEASURES
from paper.protocol import BASE, EXPERIMENTS
from paper.questions import PARAMETERS, SOURCES

TINY = dict(data="digits", width=4, blocks=1, channel_mult=(1, 1), batch=16, steps=2, warmup_steps=0,
            snapshots=1, sample_count=8, full=True, sizes=(20,), train_seeds=(0,), device="cpu", threads=1)


def measured(folder, **given):
    """Options and run directory of a run of emm.py."""
    o = emm.Options(**TINY | given, out=str(folder))
    return o, Path(emm.find(o)).parent / "seed0" / "n000020"


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(beyond, "SAMPLES", 30)
    monkeypatch.setattr(beyond, "DRAWS", 20)


def test_membership_and_who_is_copied(tmp_path):
    o, folder = measured(tmp_path)
    path = compare.compare(compare.Options(run=str(folder), sample_count=1, draws=20, device="cpu"))
    at = disk.read_json(path)["trained"]["membership"][beyond.LEVEL]
    assert MEASURES["AUC"](o, folder) == at["auc"] and round(SIGMAS[beyond.LEVEL], 1) == 1.7
    found = [MEASURES[f"rank correlation of {what}"](o, folder) for what in ("copies", "samples")]
    told = disk.read_json(folder / "beyond-30.json")
    assert found == [told["copies_nearest_correlation"], told["samples_nearest_correlation"]]
    assert told["copied"] + told["never"] == 20 and "repeated" not in told


def test_repeated_images(tmp_path):
    o, folder = measured(tmp_path, repeat="20:0.2")
    times = MEASURES["times as often"](o, folder)
    found = disk.read_json(folder / "beyond-30.json")["repeated"]
    assert found["times"] == times and found["images"] == [4, 16]


def test_two_halves(tmp_path):
    o, folder = measured(tmp_path / "half", part="1/2")
    likeness = beyond.likeness(o, folder)
    found = disk.read_json(folder / "agree.json")
    other = tmp_path / "half-other-half" / "seed0" / "n000020"
    assert found["other"] == str(other.resolve()) and found["shared_training_images"] == 0
    assert 0 <= likeness < 2
    again = agree.agree(agree.Options(run=str(folder), other=str(other), sample_count=8, draws=20,
                                      device="cpu", threads=1))
    assert disk.read_json(again) == found


def test_precision_is_of_the_samples_among_images_outside(tmp_path):
    o, folder = measured(tmp_path)
    found = beyond.sample_precision(o, folder)
    shares = disk.read_json(folder / "precision-8.json")
    assert found == shares["precision"] and 0 <= found <= 1
    low, high = shares["precision_interval_95"]
    assert low <= found <= high


def test_the_distance_to_the_optimum_is_told_where_half_are_copies(tmp_path, monkeypatch):
    monkeypatch.setattr(beyond, "NOISY", 20)
    o, folder = measured(tmp_path, snapshots=2)
    assert beyond.excess(o, folder) is None  # two steps copy nothing
    found = disk.read_json(folder / "excess.json")
    assert found["steps"] == [1, 2] and found["ratios"] == [0, 0] and min(found["apart"]) > 0
    disk.write_json(folder / "excess.json", dict(ratios=[0.25, 0.75, 1], apart=[0.3, 0.1, 0.05]))
    assert beyond.excess(o, folder) == pytest.approx(0.2)


def test_parameters_of_the_table_are_those_of_the_networks():
    o = emm.Options(**BASE["cpu"])
    for width, parameters in PARAMETERS.items():
        net = denoiser.Denoiser(o.arch, o.precond, 8, 1, 0, width, o.blocks, o.channel_mult)
        assert sum(p.numel() for p in net.parameters()) == parameters
    assert {e.measure for e in EXPERIMENTS.values()} <= {"", *beyond.MEASURES}


def test_numbers_of_the_table_are_those_of_digits():
    x = files.read("digits")[0].flatten(1).double()
    variances = torch.linalg.eigvalsh(torch.cov(x.T))
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(200):
        some = x[torch.randperm(len(x), generator=generator)[:20]]
        found.append(torch.cdist(some, some).fill_diagonal_(torch.inf).min(1).values.mean() / 64**0.5)
    distance, dimension = SOURCES["cpu"]["digits"]
    assert abs(torch.stack(found).mean() - distance) < 1  # 20 of 1,797, drawn 200 times
    assert abs(variances.sum()**2 / variances.square().sum() - dimension) < 0.1

import gc
import json
import weakref

import numpy as np
import pytest
import torch

import data
import train
from conftest import ROOT
from diffusion import denoiser, objectives, steps
from diffusion.steps import Work, batch_index, schedule, seed_of
from images import augment
from kernels import graphs

SCHEDULE = json.loads((ROOT / "tests" / "golden" / "schedule.json").read_text())
TINY = dict(data="digits", n=20, width=4, blocks=1, channel_mult=(1, 1), batch=16, warmup_steps=3,
            learning_rate=2e-3, device="cpu")
BFLOAT16_NEAR = 0.05  # torch's Muon multiplies in bfloat16: 8 bits of mantissa, 15 products one after another
SAME_GRADIENT = 1e-5  # float32 sums in another order, relative to the largest weight change


def row_name(row):
    return f"{row['n_train']}-{row['batch']}-{row['step']}"


@pytest.mark.parametrize("row", SCHEDULE["rows"], ids=row_name)
def test_published_schedule(row):
    o = train.Options(batch=row["batch"])
    factor, beta = schedule(o, row["n_train"], row["step"])
    assert factor == pytest.approx(row["lr_factor"], rel=1e-9)
    assert beta == pytest.approx(row["ema_beta"], rel=1e-9, abs=1e-12)


def test_schedule_in_steps_and_fixed_rates():
    o = train.Options(warmup_steps=10, ema_rate=0.9, ema_rampup_steps=10)
    # final_ema / ema_constant * 0.5^(512 / halflife / progress) of the published code, where the halflife is
    # 500,000 images
    half = 0.9 / 0.5 ** (512 / 500_000) * 0.5 ** (512 / 500_000 / 0.5)
    for step, expected in {0: (0.0, 0.0), 5: (0.5, half), 10: (1.0, 0.9), 20: (1.0, 0.9)}.items():
        assert schedule(o, 100, step) == pytest.approx(expected, rel=1e-12)
    o = train.Options(warmup_epochs=0, ema_halflife=4, ema_rampup_steps=2)
    assert schedule(o, 100, 0) == (0.0, 0.0) and schedule(o, 100, 1) == (1.0, 0.5 ** (1 / 2))
    assert schedule(train.Options(ema_rate=0.0), 100, 9)[1] == 0


@pytest.mark.parametrize("n, batch", [(10, 4), (5, 16), (7, 7), (1, 3)])
@pytest.mark.parametrize("reshuffle", [False, True])
def test_data_are_read_round_and_round(n, batch, reshuffle):
    stream = np.concatenate([batch_index(n, batch, k, 5, reshuffle) for k in range(20)])
    epochs = [stream[i:i + n] for i in range(0, len(stream) - n + 1, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n > 4:
        same = [np.array_equal(epochs[0], epoch) for epoch in epochs]
        assert all(same) if not reshuffle else not all(same)
        other = np.concatenate([batch_index(n, batch, k, 6, reshuffle) for k in range(20)])
        assert not np.array_equal(stream, other)


def work(device="cpu", **given):
    """The Work of a small run, and its network, both with weights of some size."""
    o = train.Options(**TINY | given)
    D = data.load(o)
    net = denoiser.Denoiser("ddpmpp", o.precond, 8, 1, D.label_dim, o.width, 1, (1, 1), dropout=o.dropout,
                        generator=torch.Generator().manual_seed(0),
                        augment_dim=augment.DIM if o.augment else 0).train()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return Work(o, net.to(device).use(o.precision), D)


def one_step(given):
    one = work(**given)
    before = {name: p.detach().clone() for name, p in one.net.model.named_parameters()}
    loss, _ = one.take(3)
    after = dict(one.net.model.named_parameters())
    gradients = {name: p.grad for name, p in after.items()}
    return loss, before, after, gradients, one.ema, one.options


@pytest.mark.parametrize("precond", objectives.PRECONDITIONINGS)
@pytest.mark.parametrize("labels", ["none", "unique"])
def test_gradient_accumulation_changes_nothing(precond, labels):
    whole, parts = (one_step(dict(precond=precond, labels=labels, dropout=0.0, batch_device=part))
                    for part in (0, 4))
    assert torch.allclose(whole[0], parts[0])
    for name, g in whole[3].items():
        assert (g - parts[3][name]).abs().max() <= SAME_GRADIENT * max(g.abs().max(), 1), name


def test_labels_are_dropped_by_seed_and_step(monkeypatch):
    def labels_shown(step, **given):
        shown, one = [], work(labels="unique", label_dropout=0.4, n=400, batch=400, **given)
        loss = one.net.loss
        monkeypatch.setattr(one.net, "loss", lambda *parts: shown.append(parts[3]) or loss(*parts))
        one.take(step)
        return torch.cat(shown)
    found = labels_shown(0)
    assert 0.3 < (found == -1).float().mean() < 0.5
    whole = batch_index(400, 400, 0, 0)
    assert torch.equal(found, torch.where(found == -1, -1, whole))
    assert torch.equal(found, labels_shown(0, batch_device=100))
    others = labels_shown(1), labels_shown(0, seed=1)
    assert not any(torch.equal(found == -1, other == -1) for other in others)


def what_is_shown(monkeypatch, step=0, **given):
    """The images that a step shows, how it says that they are augmented, and those images themselves."""
    shown, one = [], work(n=400, batch=400, **given)
    loss = one.net.loss
    monkeypatch.setattr(one.net, "loss", lambda *parts: shown.append((parts[0], parts[4])) or loss(*parts))
    one.take(step)
    y = one.images[batch_index(400, 400, step, one.options.seed)].float() / 127.5 - 1
    images, how = zip(*shown)
    return torch.cat(images), None if how[0] is None else torch.cat(how), y


def test_half_of_the_images_are_flipped(monkeypatch):
    shown, how, y = what_is_shown(monkeypatch, flip=True)
    mirrored = (shown == y.flip(-1)).flatten(1).all(1)
    assert how is None and 0.4 < mirrored.float().mean() < 0.6
    assert ((shown == y).flatten(1).all(1) | mirrored).all()
    assert torch.equal(shown, what_is_shown(monkeypatch, flip=True, batch_device=100)[0])
    assert not torch.equal(shown, what_is_shown(monkeypatch, step=1, flip=True)[0])


def test_augmented_images_are_told_whatever_is_shown_at_once(monkeypatch):
    shown, how, y = what_is_shown(monkeypatch, augment=0.12)
    assert how.shape == (400, augment.DIM) and torch.equal(shown, augment.warp(y, how))
    assert 0.65 < how.any(1).float().mean() < 0.79  # 1 - 0.5 x 0.94 x 0.88^4 is 0.72
    parts = what_is_shown(monkeypatch, augment=0.12, batch_device=100)
    assert torch.equal(shown, parts[0]) and torch.equal(how, parts[1])
    assert not torch.equal(how, what_is_shown(monkeypatch, augment=0.12, seed=1)[1])
    _, before, after, *_ = one_step(dict(augment=0.5))
    assert not torch.equal(before["map_augment.weight"], after["map_augment.weight"])


def test_repeated_images_are_drawn_as_often_as_they_stand_there():
    """A round shows each as often as it stands there, and counts as |D| images in the schedule."""
    drawn = []
    one = work(n=20, repeat="4:0.2", batch=16)
    assert len(one.shown) == 16 + 4 * 4 == 32
    one.replayed = lambda function, index, *numbers: drawn.append((index, *numbers))
    for step in (0, 1):
        one.take(step)
    times = torch.bincount(torch.cat([index for index, *_ in drawn]))
    assert sorted(times.tolist()) == [1] * 16 + [4] * 4
    o = one.options
    assert drawn[1][1] == o.learning_rate * steps.schedule(o, 20, 1)[0]


@pytest.mark.parametrize("skip", [(), (0.3, 20.0)])
def test_loss_is_summed_over_pixels_and_averaged_over_images(skip):
    """All of them: one at a noise level that is skipped counts as 0."""
    loss, _, _, _, _, o = one_step(dict(dropout=0.0, sigma_skip=skip))
    D = data.load(o)
    y = D.images[batch_index(20, 16, 3, 0)].float() / 127.5 - 1
    net = one_step(dict(dropout=0.0, learning_rate=0.0))[2]
    N = denoiser.Denoiser("ddpmpp", "vp", 8, 1, 0, 4, 1, (1, 1), dropout=0.0)
    N.model.load_state_dict({name: p.detach() for name, p in net.items()})
    torch.manual_seed(seed_of(o.seed, 3))
    sigma = N.objective.training_sigma(16)
    x = y + sigma.reshape(-1, 1, 1, 1) * torch.randn_like(y)
    each = ((N(x, sigma) - y) ** 2 / sigma.reshape(-1, 1, 1, 1) ** 2).sum((1, 2, 3))
    trained = [not skip or not skip[0] < s < skip[1] for s in sigma.tolist()]
    assert 0 < sum(trained) < 16 or not skip
    assert torch.allclose(loss, each[trained].sum() / 16)


def test_a_skipped_noise_level_has_no_gradient():
    for skip, trained in (((0.0, 1e6), False), ((1e5, 1e6), True)):  # every level of VP, and none
        loss, _, _, gradients, _, _ = one_step(dict(dropout=0.0, sigma_skip=skip))
        assert bool(loss) == trained == any(g.any() for g in gradients.values())


def test_weight_decay_is_an_l2_penalty_and_sgd_is_sgd():
    given = dict(optimizer="sgd", momentum=0.0, dropout=0.0, warmup_steps=6)  # step 3: half the rate
    _, before, after, gradients, _, o = one_step(dict(given, weight_decay=0.1))
    for name, p in after.items():
        change = -0.5 * o.learning_rate * (gradients[name] + 0.1 * before[name])
        assert torch.allclose(p, before[name] + change, atol=1e-7), name


def test_ema_follows_the_rate():
    _, before, after, _, ema, o = one_step(dict(ema_rate=0.75, ema_rampup_steps=0))
    for name, average in ema.items():
        assert torch.allclose(average, 0.75 * before[name] + 0.25 * after[name], atol=1e-7)


@pytest.mark.parametrize("given, plain", [
    (dict(optimizer="adam"), lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.99), weight_decay=0.1)),
    (dict(optimizer="sgd"), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.8, weight_decay=0.1))])
def test_optimizers_are_torchs(given, plain):
    o = train.Options(momentum=0.8, beta2=0.99, weight_decay=0.1, **given)
    ours = [torch.nn.Parameter(torch.randn(5, 7, generator=torch.Generator().manual_seed(i)))
            for i in range(3)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizer, reference = steps.Optimizer(o, ours), plain(theirs)
    for step in range(5):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        optimizer.step(0.01)
        reference.step()
    for p, q in zip(ours, theirs):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-7)  # roundings of the plain loop and the fused kernel


def iterated(s):
    """What Muon's iterations make of singular values."""
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (8, 72), (1, 5)])
def test_muon_makes_matrices_orthogonal(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, s, V = torch.linalg.svd(g.double(), full_matrices=False)
    found = steps.orthogonalized(g)
    assert (found - U @ torch.diag(iterated(s)) @ V).abs().max() < 1e-5
    assert 0.65 < torch.linalg.svdvals(found).min() and torch.linalg.svdvals(found).max() < 1.2
    assert not steps.orthogonalized(torch.zeros(shape)).any()


def test_muon_is_torchs_beside_adam():
    """Of a convolution, a wide and a tall matrix; others, a vector and a matrix of an end, are Adam's."""
    o = train.Options(optimizer="muon", momentum=0.8, beta2=0.99, weight_decay=0.1)
    shapes = [(6, 3, 3, 3), (4, 9), (9, 4), (5,), (3, 8)]
    start = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    flat = torch.nn.Parameter(theirs[0].detach().flatten(1).clone())
    optimizer = steps.Optimizer(o, ours, ours[:3])
    muon = torch.optim.Muon([flat, *theirs[1:3]], lr=0.01, momentum=0.8, weight_decay=0.1,
                            adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.Adam(theirs[3:], lr=0.01, betas=(0.8, 0.99), weight_decay=0.1)
    for step in range(5):
        for p, q in zip(ours, [flat, *theirs[1:]]):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone().view(q.shape)
        optimizer.step(0.01)
        muon.step(), adam.step()
    for p, q, before in zip(ours, [flat, *theirs[1:]], start):
        change, expected = p.detach().flatten() - before.flatten(), q.detach().flatten() - before.flatten()
        near = BFLOAT16_NEAR if any(p is matrix for matrix in ours[:3]) else 1e-6
        assert (change - expected).norm() < near * expected.norm()


def test_muon_takes_the_rate_as_a_tensor():
    """As a graph of a GPU gives it."""
    found = []
    for rate in (0.01, torch.tensor(0.01)):
        p = torch.nn.Parameter(torch.ones(4, 3, 3, 3))
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        steps.muon([p], [torch.zeros_like(p)], rate, 0.9, 0.1)
        found.append(p.detach())
    assert torch.allclose(*found)


@pytest.mark.parametrize("arch, ends", [
    ("ddpmpp", {"map_label.weight", "enc.8x8_conv.weight", "dec.8x8_aux_conv.weight"}),
    ("ncsnpp", {"map_label.weight", "enc.8x8_conv.weight", "dec.8x8_aux_conv.weight",
                "enc.4x4_aux_residual.weight"}),
    ("dit", {"map_label.weight", "first.weight", "last.weight"})])
def test_muon_leaves_the_ends_of_a_network_to_adam(arch, ends):
    D = denoiser.Denoiser(arch, "vp", 8, 1, 10, 8, 1, (1, 2, 2))
    taken = {id(p) for p in D.model.matrices()}
    assert {name for name, p in D.model.named_parameters() if p.ndim > 1 and id(p) not in taken} == ends


@pytest.mark.parametrize("at_once", [8, 3])
def test_a_batch_that_does_not_fit_is_halved_until_it_does(monkeypatch, capsys, at_once):
    """The step is that of the whole batch, and later steps do not try again."""
    whole, parts = (work(dropout=0.0, batch=24) for _ in range(2))
    real, tried = parts.net.loss, []

    def loss(y, *more):
        tried.append(len(y))
        if len(y) > at_once:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB.")
        return real(y, *more)
    monkeypatch.setattr(parts.net, "loss", loss)
    fits = {8: 6, 3: 3}[at_once]
    for step in (3, 4):
        assert torch.allclose(parts.take(step), whole.take(step))
        for p, q in zip(whole.parameters, parts.parameters):
            assert (p.grad - q.grad).abs().max() <= SAME_GRADIENT * max(p.grad.abs().max(), 1)
    assert parts.at_once == fits and tried == [24, 12] + [6] * (at_once == 3) + [fits] * (2 * 24 // fits)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{fits} images at a time" in said


def test_running_out_of_memory_later_or_for_a_given_part_is_an_error(monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    given, later, single = work(batch_device=8), work(), work(batch=1, n=20)
    later.take(0)
    for one in (given, later, single):
        monkeypatch.setattr(one.net, "loss", fail)
        with pytest.raises(torch.OutOfMemoryError):
            one.take(1)


def test_a_run_that_ended_holds_no_memory():
    gc.disable()
    try:
        one = work()
        one.take(0)
        there = weakref.ref(one)
        del one
        assert there() is None
    finally:
        gc.enable()


class Graph:
    """A stand-in for a CUDA graph on a CPU: what was recorded is done when it is replayed."""

    def __init__(self, replayed, function):
        self.replayed, self.function = replayed, function

    def replay(self):
        self.replayed.result = self.function(*self.replayed.held)


def test_the_graph_is_of_the_step_itself(monkeypatch, capsys):
    """Recorded after the first steps, and given each step's images and rates; random numbers are torch's."""
    def record(replayed, function, tensors):
        replayed.held, replayed.graph = [t.clone() for t in tensors], Graph(replayed, function)
    monkeypatch.setattr(graphs.Replayed, "capture", record)
    plain, recorded = work(reshuffle=True), work(reshuffle=True)
    recorded.numbers = lambda *numbers: [torch.tensor(number) for number in numbers]
    recorded.replayed.wanted = True
    for step in range(6):
        assert torch.equal(plain.take(step), recorded.take(step))
        assert (recorded.replayed.graph is not None) == (step >= graphs.WARM_UP)
    for p, q in zip(plain.parameters, recorded.parameters):
        assert torch.equal(p, q)
    for p, q in zip(plain.ema.values(), recorded.ema.values()):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-8)  # the average by a tensor rounds otherwise


def test_where_no_graph_can_be_recorded_it_goes_on_without(capsys):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    replayed = graphs.Replayed()
    for _ in range(5):  # there is no GPU, or a graph cannot hold the question
        assert replayed(lambda x: x + x.sum().item(), torch.ones(2, device=device)).tolist() == [3, 3]
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("given", [dict(), dict(precision="bf16", labels="true"),
                                   dict(optimizer="sgd", batch_device=8), dict(optimizer="muon"),
                                   dict(precond="flow", loss="huber", loss_weight="min-snr"),
                                   dict(labels="true", label_dropout=0.3, flip=True, augment=0.3)])
def test_on_this_gpu_a_graph_gives_the_same_weights(given):
    torch.use_deterministic_algorithms(True)
    try:
        plain, recorded = work("cuda", **given), work("cuda", **given)
        plain.replayed.wanted = False
        for step in range(8):
            assert torch.equal(plain.take(step), recorded.take(step))
    finally:
        torch.use_deterministic_algorithms(False)
    assert recorded.replayed.graph is not None
    for p, q in zip([*plain.parameters, *plain.ema.values()],
                    [*recorded.parameters, *recorded.ema.values()]):
        assert torch.equal(p, q)

"""The radius and ratio of real steps, by hand; and what limiting them does to weights and to a spike."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from evolute.callbacks import StepRadius, step_radius
from evolute.callbacks.access import RecordLogits
from tests.conftest import fit
from tests.modules import Classifier, Net, Recorder, Regression, Snapshots, classification_data


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 4))


def targets(kind, n, generator):
    classes = torch.randint(4, (n,), generator=generator)
    match kind:
        case "ignored":
            return torch.where(torch.arange(n) % 3 == 0, -100, classes)
        case "probabilities":
            return torch.rand(n, 4, generator=generator, dtype=torch.float64).softmax(1)
        case "binary":
            return torch.randint(2, (n, 4), generator=generator).double()
        case "image":
            return torch.randint(4, (n, 3, 3), generator=generator)
    return classes


LOSSES = {"binary": F.binary_cross_entropy_with_logits, "smooth": nn.CrossEntropyLoss(label_smoothing=0.1)}


def setup(kind, n=120):
    generator = torch.Generator().manual_seed(5)
    shape = (n, 2, 5, 5) if kind == "image" else (n, 6)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    net = (lambda: nn.Conv2d(2, 4, 3)) if kind == "image" else mlp
    return net, LOSSES.get(kind, F.cross_entropy), TensorDataset(x, targets(kind, n, generator))


def spreads(kind, net, before, after, batch):
    """Largest difference of logit changes of each loss term, in the simplest words."""
    x, y = batch
    z = [functional_call(net, {n.removeprefix("net."): w for n, w in ws.items()}, (x,)) for ws in (before, after)]
    change = z[1] - z[0]
    if kind == "binary":  # exact: |dz| over the distance of the zero, which is at pi + i z; in units of pi
        return (math.pi * change.abs() / (z[0] ** 2 + math.pi**2).sqrt()).flatten()
    spread = change.amax(1) - change.amin(1)
    return spread[y >= 0] if kind == "ignored" else spread.flatten()


def trained(kind="plain", lr=0.5, steps=3, callbacks=(), seed=0, **arguments):
    net, loss, data = setup(kind)
    recorder, snapshots = Recorder(), Snapshots()
    defaults = {"every_n_steps": 1, "samples": 1000, "budget": None}
    ours = [StepRadius(**{**defaults, **arguments})] if arguments.get("mode") != "none" else []
    module, _ = fit(
        [*ours, snapshots, *callbacks],
        lambda: Net(net(), loss, lambda m: torch.optim.SGD(m.parameters(), lr=lr, momentum=0.9)),
        DataLoader(data, batch_size=40),
        seed=seed,
        precision="64-true",
        logger=recorder,
        max_steps=steps,
    )
    return recorder, snapshots, module


@pytest.mark.parametrize("kind", ["plain", "smooth", "ignored", "probabilities", "binary", "image"])
def test_ratio_and_radius_are_those_of_the_logits_before_and_after(kind):
    recorder, snapshots, module = trained(kind)
    net = module.net.eval()
    for step in range(3):
        before, after = snapshots.weights[step], snapshots.weights[step + 1]
        spread = spreads(kind, net, before, after, snapshots.batches[step])
        norm = torch.cat([(after[n] - before[n]).flatten() for n in before]).norm().item()
        usual = spread.sort().values[math.ceil(0.99 * len(spread)) - 1].item() / math.pi
        row, worst = recorder.rows[step], spread.max().item() / math.pi
        assert row["step/norm"] == pytest.approx(norm, rel=1e-10)
        assert row["step/ghost_ratio"] == pytest.approx(worst, rel=1e-10)
        assert row["step/ghost_radius"] == pytest.approx(norm / worst, rel=1e-10)
        assert row["step/ghost_ratio_p99"] == pytest.approx(usual, rel=1e-10)
        assert row["step/ghost_radius_p99"] == pytest.approx(norm / usual, rel=1e-10)


def test_both_estimators_agree_on_small_steps_and_part_on_large_ones():
    def ratio(lr, estimator):
        return trained(lr=lr, steps=1, estimator=estimator)[0].rows[0]["step/ghost_ratio"]

    gaps = [abs(ratio(lr, "jvp") / ratio(lr, "secant") - 1) for lr in (1e-6, 1e-5, 3.0)]
    assert gaps[0] < 1e-5
    assert gaps[1] == pytest.approx(10 * gaps[0], rel=0.05)  # the difference is of first order in the step
    assert gaps[2] > 1e-3


def test_the_derivative_is_that_of_the_logits_along_the_step():
    recorder, snapshots, module = trained(steps=2, estimator="jvp", lr=1.0)
    before, after = snapshots.weights[1], snapshots.weights[2]
    point = {n.removeprefix("net."): w for n, w in before.items()}
    direction = {n.removeprefix("net."): after[n] - before[n] for n in before}
    net, x = module.net.eval(), snapshots.batches[1][0]
    logits = lambda t: functional_call(net, {n: w + t * direction[n] for n, w in point.items()}, (x,))  # noqa: E731
    slope = torch.autograd.functional.jacobian(logits, torch.zeros((), dtype=torch.float64))
    assert isinstance(slope, torch.Tensor)
    spread = (slope.amax(1) - slope.amin(1)).max().item()
    assert recorder.rows[1]["step/ghost_ratio"] == pytest.approx(spread / math.pi, rel=1e-10)


def test_a_batch_in_which_no_term_counts_has_ratio_zero():
    net, loss, data = setup("plain")
    data = TensorDataset(data.tensors[0], torch.full_like(data.tensors[1], -100))
    recorder = Recorder()
    fit(
        [StepRadius(every_n_steps=1, budget=None)],
        lambda: Net(net(), lambda z, y: loss(z, y, reduction="sum")),
        DataLoader(data, batch_size=40),
        precision="64-true",
        logger=recorder,
        max_steps=2,
    )
    assert [recorder.rows[s]["step/ghost_ratio"] for s in (0, 1)] == [0.0, 0.0]


@pytest.mark.parametrize("lr", [2.0, 20.0])
def test_a_limited_step_ends_within_the_target_on_the_line_to_the_whole_step(lr):
    target = 0.1
    recorder, snapshots, module = trained(lr=lr, steps=3, mode="clip", target=target)
    _, whole, _ = trained(lr=lr, steps=1, mode="none")
    net = module.net.eval()
    scales = [recorder.rows[step]["step/clip_scale"] for step in range(3)]
    for step in range(3):
        spread = spreads("plain", net, *snapshots.weights[step : step + 2], snapshots.batches[step])
        unlimited = recorder.rows[step]["step/ghost_ratio"]
        assert (scales[step] == 1.0) == (unlimited <= target)
        assert spread.max().item() / math.pi <= target * (1 + 1e-9)
    assert scales[0] < 1
    for name, start in snapshots.weights[0].items():
        assert torch.equal(snapshots.weights[1][name], torch.lerp(start, whole.weights[1][name], scales[0]))


@pytest.mark.parametrize("lr", [1e-3, 2.0])
def test_a_set_step_has_the_target_for_its_ratio_whatever_the_learning_rate(lr):
    recorder, snapshots, module = trained(lr=lr, steps=4, mode="set", target=0.05)
    net = module.net.eval()
    for step in range(4):
        spread = spreads("plain", net, *snapshots.weights[step : step + 2], snapshots.batches[step])
        assert spread.max().item() / math.pi == pytest.approx(0.05, rel=0.02)  # logits are curved, two rounds
    _, whole, _ = trained(lr=lr, steps=1, mode="none")
    scale = recorder.rows[0]["step/set_scale"]
    assert (scale > 1) == (lr < 1)
    for name, start in snapshots.weights[0].items():
        assert torch.equal(snapshots.weights[1][name], torch.lerp(start, whole.weights[1][name], scale))


class Vocabulary(nn.Module):
    """A small language model whose head is tied to its embedding, or has a bias of its own."""

    def __init__(self, kind):
        super().__init__()
        self.embedding = nn.Embedding(50, 6)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.head = nn.Linear(6, 50, bias=kind == "biased")
        if kind == "tied":
            self.head.weight = self.embedding.weight
        if kind == "frozen":
            self.head.weight.requires_grad_(False)
        if kind == "computed":
            nn.utils.parametrizations.weight_norm(self.head)

    def forward(self, x):
        return self.head(self.body(self.embedding(x))).transpose(1, 2)


@pytest.mark.parametrize(("kind", "found"), [("tied", 3), ("biased", 3), ("frozen", 3), ("computed", 0)])
def test_many_classes_are_made_again_from_what_entered_the_head(kind, found, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randint(50, (2, 24, 5), generator=generator)
    data = TensorDataset(x, torch.where(y % 4 == 0, -100, y))
    heads, ratios = [], []
    original = step_radius.recomputed_spread
    monkeypatch.setattr(step_radius, "recomputed_spread", lambda *a: heads.append(a) or original(*a))
    for head_from in (51, 50):
        recorder = Recorder()
        fit(
            [StepRadius(every_n_steps=1, samples=1000, budget=None, head_from=head_from)],
            lambda: Net(Vocabulary(kind), make=lambda module: torch.optim.AdamW(module.parameters(), lr=0.1)),
            DataLoader(data, batch_size=8),
            precision="64-true",
            logger=recorder,
            max_steps=3,
        )
        ratios.append([row[m] for row in recorder.rows.values() for m in ("step/ghost_ratio", "step/ghost_ratio_p99")])
        assert len(heads) == (0 if head_from == 51 else found)
    assert ratios[1] == pytest.approx(ratios[0], rel=1e-9)


def test_logits_that_no_linear_layer_made_are_kept():
    with RecordLogits(head_from=4) as recorder:
        hidden = torch.randn(5, 3)
        logits = F.linear(hidden, torch.randn(4, 3)) * 2.0
        F.cross_entropy(logits, torch.zeros(5, dtype=torch.long))
    assert not recorder.heads
    assert torch.equal(recorder.rows[0], logits)


def test_a_dry_run_records_the_scale_and_keeps_the_step():
    on, _, _ = trained(lr=20.0, steps=1, mode="clip", target=0.1)
    dry, kept, _ = trained(lr=20.0, steps=2, mode="clip", target=0.1, dry_run=True)
    _, base, _ = trained(lr=20.0, steps=2, mode="none")
    assert dry.rows[0]["step/clip_scale"] == pytest.approx(0.1 / dry.rows[0]["step/ghost_ratio"])
    assert on.rows[0]["step/ghost_ratio"] == dry.rows[0]["step/ghost_ratio"]
    assert all(torch.equal(kept.weights[2][n], w) for n, w in base.weights[2].items())


class Spike(Callback):
    """Multiply the learning rate at one step and hold it there; note the accuracy just before."""

    def __init__(self, step, factor, data):
        self.step, self.factor, self.data = step, factor, data
        self.before = 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.before = accuracy(pl_module, self.data)
            for group in trainer.optimizers[0].param_groups:
                group["lr"] *= self.factor


def accuracy(module, data):
    with torch.no_grad():
        return (module.net(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean().item()


def blobs():
    """Ten classes of four clusters each, with entries between 0 and 1 as pixels have."""
    generator = torch.Generator().manual_seed(6)
    cluster = torch.randint(40, (1500,), generator=generator)
    centres = torch.randn(40, 64, generator=generator)
    x = torch.sigmoid(centres[cluster] + 0.5 * torch.randn(1500, 64, generator=generator))
    return TensorDataset(x, cluster % 10)


@pytest.mark.parametrize("seed", [0, 1])
def test_limiting_survives_a_learning_rate_spike_that_adam_does_not(seed):
    """Sao, arXiv 2603.13552, section on spikes: MLP 64-128-10, Adam at 1e-2, times 1000 from step 50 to 200."""
    data = blobs()

    def run(*callbacks):
        spike = Spike(50, 1000.0, data)
        module, _ = fit(
            [spike, *callbacks],
            lambda: Net(
                nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)),
                make=lambda m: torch.optim.Adam(m.parameters(), lr=1e-2),
            ),
            DataLoader(data, batch_size=64, shuffle=True),
            seed=seed,
            max_steps=200,
        )
        return spike.before, accuracy(module, data)

    before, plain = run()
    started, limited = run(StepRadius(mode="clip", target=1.0))
    assert before > 0.9
    assert plain < 0.6 * before
    assert limited >= 0.9 * started > 0.8


@pytest.mark.parametrize("options", [{}, {"estimator": "jvp"}, {"mode": "clip"}, {"every_n_steps": 7}])
def test_a_loss_without_cross_entropy_is_refused_before_anything_changed(options):
    module = Regression()
    with pytest.raises(MisconfigurationException, match=r"def loss_on\(self, batch\)"):
        fit([StepRadius(**options)], module)
    assert module.trainer.global_step == 0
    assert module.layer.weight.grad is None


class WithLoss(Regression):
    """Its loss goes through no torch call, but it says what its logits are."""

    def loss_on(self, batch):
        logits, y = self.layer(batch[0]), torch.zeros(len(batch[0]), dtype=torch.long)
        return -logits.log_softmax(1)[:, 0].mean(), logits, y

    def training_step(self, batch, batch_idx):
        return self.loss_on(batch)[0]


def test_loss_on_gives_the_logits():
    recorder, snapshots = Recorder(), Snapshots()
    fit([StepRadius(every_n_steps=1, samples=4, budget=None), snapshots], WithLoss, logger=recorder)
    before, after = snapshots.weights[:2]
    x = snapshots.batches[0][0]
    z = [F.linear(x, *weights.values()).diff(dim=1) for weights in (before, after)]  # two classes: the exact radius
    ratio = ((z[1] - z[0]).abs() / (z[0] ** 2 + math.pi**2).sqrt()).max().item()
    assert recorder.rows[0]["step/ghost_ratio"] == pytest.approx(ratio, rel=1e-4)


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g


def test_a_module_without_forward_derivatives_is_refused_the_jvp_before_the_first_step():
    class Custom(nn.Linear):
        def forward(self, x):
            return NoForwardMode.apply(super().forward(x))

    module = Net(Custom(8, 4))
    with pytest.raises(MisconfigurationException, match='estimator="secant"'):
        fit([StepRadius(estimator="jvp")], module, DataLoader(classification_data(), batch_size=8))
    assert module.trainer.global_step == 0


def test_the_default_works_on_a_module_with_dropout_and_batch_norm():
    recorder = Recorder()
    data = DataLoader(classification_data(), batch_size=8)
    fit([StepRadius(every_n_steps=2, budget=None)], Classifier, data, logger=recorder, log_every_n_steps=100)
    ratios = recorder.of("step/ghost_ratio")
    assert list(ratios) == [0, 2, 4, 6]
    assert all(0 < value < 1 for value in ratios.values())

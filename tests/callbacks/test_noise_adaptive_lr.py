"""The running noise and the ratios by hand, what they do to a step, and that ratios of one do nothing at all."""

import gc
import math
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import lr_scheduler as sched
from torch.utils.data import DataLoader

from evolute.callbacks import NoiseAdaptiveLR
from evolute.geometry import dual_norm
from evolute.optim import MuonAdamW, Scion, parameter_norms
from tests.conftest import fit
from tests.modules import Classifier, Recorder, Snapshots, classification_data, make_optimizer


def data():
    return DataLoader(classification_data(), batch_size=8)


class Gradients(Callback):
    """The gradient of each step, and what had accumulated after each of its micro-batches."""

    def __init__(self):
        self.steps, self.so_far = [], [[]]

    def on_after_backward(self, trainer, pl_module):
        self.so_far[-1].append({n: p.grad.clone() for n, p in pl_module.named_parameters()})

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append({n: p.grad.clone() for n, p in pl_module.named_parameters()})
        self.so_far.append([])


def dual(m, norm, scaled):
    """Squared dual norm in float64; the nuclear norm as the callback estimates it."""
    return dual_norm(m.double(), norm, "polar_express", scaled).item() ** 2


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch):
    """Iterate in float32 on every CPU: bfloat16, where it is fast, is off by a few percent."""
    monkeypatch.setattr("evolute.geometry.norms.orthogonalize._cpu_multiplies_bfloat16", lambda: False)


def by_hand(differences, norms, alpha, power, decay, every, scaled=True):
    """The whole method on a page: running means H and ratios after each difference."""
    H = dict.fromkeys(norms, 0.0)
    kept, history = decay**every, []
    for difference in differences:
        H = {n: kept * H[n] + (1 - kept) * dual(difference[n], norms[n], scaled) for n in norms}
        ratios = {}
        for norm in set(norms.values()):
            group = {n: H[n] for n in norms if norms[n] == norm}
            middle = sorted(group.values())[(len(group) - 1) // 2]
            squared = middle if alpha == "auto" else alpha**2
            a = {n: (squared / (squared + h)) ** 0.5 for n, h in group.items()}
            ratios.update({n: (a[n] / max(a.values())) ** power for n in group})
        history.append((H, ratios))
    return history


@pytest.mark.parametrize("scaled", ["scaled", "plain"])
@pytest.mark.parametrize("alpha", ["auto", 0.05])
@pytest.mark.parametrize(("estimator", "accumulate"), [("consecutive", 1), ("split", 2), ("split", 3)])
@pytest.mark.parametrize("every", [1, 3])
def test_noise_ratios_and_rates_by_hand(estimator, accumulate, every, alpha, scaled):
    recorder, gradients, snapshots = Recorder(), Gradients(), Snapshots()
    module, _ = fit(
        [NoiseAdaptiveLR(alpha, 0.7, 0.8, every, estimator, dual=scaled), gradients, snapshots],
        lambda: Classifier("sgd", lr=0.1, messy=False),
        data(),
        max_steps=7,
        logger=recorder,
        accumulate_grad_batches=accumulate,
        log_every_n_steps=1000,
    )
    measured = [s for s in range(1, 7) if s % every == 0]
    differences = []
    for step in measured:
        g = gradients.steps
        if estimator == "consecutive":
            differences.append({n: g[step][n] - g[step - 1][n] for n in g[step]})
        else:  # halves A, B: the difference that has the noise of the step's own gradient
            cut = accumulate // 2
            half = gradients.so_far[step][cut - 1]
            scale = math.sqrt(cut * (accumulate - cut)) / accumulate
            differences.append(
                {
                    n: scale * ((g[step][n] - half[n]) * accumulate / (accumulate - cut) - half[n] * accumulate / cut)
                    for n in half
                }
            )
    expected = by_hand(differences, parameter_norms(module), alpha, 0.7, 0.8, every, scaled == "scaled")
    assert [s for s, row in recorder.rows.items() if "noise/time_ms" in row] == measured
    now = dict.fromkeys(snapshots.weights[0], 1.0)
    for step in range(7):
        if step in measured:
            H, now = expected[measured.index(step)]
            row = recorder.rows[step]
            for name in now:
                assert row[f"noise/{name}"] == pytest.approx(H[name] ** 0.5, rel=1e-3)
                assert row[f"lr_ratio/{name}"] == pytest.approx(now[name], rel=1e-3)
                assert row[f"layer_lr/{name}"] == pytest.approx(0.1 * now[name], rel=1e-3)
        for name, w in snapshots.weights[accumulate * step].items():  # and in between the ratios hold
            moved = w - 0.1 * now[name] * gradients.steps[step][name]
            assert torch.allclose(snapshots.weights[accumulate * (step + 1)][name], moved, rtol=1e-4, atol=2e-6)
    assert min(now.values()) < 0.9


def test_only_the_layers_asked_for_are_adapted_and_norms_can_be_overridden():
    recorder = Recorder()
    callback = NoiseAdaptiveLR(layers=r"net\.[04]\..*", norms={r"net\.4\.weight": "sign"})
    fit([callback], lambda: Classifier("adamw", messy=False), data(), logger=recorder)
    row = recorder.rows[7]
    adapted = {n.removeprefix("lr_ratio/") for n in row if n.startswith("lr_ratio/")}
    assert adapted == {"net.0.weight", "net.0.bias", "net.4.weight", "net.4.bias"}
    # Alone in their norm groups, the two matrices take whole steps.
    assert row["lr_ratio/net.0.weight"] == row["lr_ratio/net.4.weight"] == 1.0
    with pytest.raises(MisconfigurationException, match="matches the whole name of no trainable parameter"):
        fit([NoiseAdaptiveLR(norms={"head": "sign"})], Classifier, data())
    with pytest.raises(MisconfigurationException, match="nothing to adapt"):
        fit([NoiseAdaptiveLR(layers="head")], Classifier, data())
    with pytest.raises(MisconfigurationException, match="accumulate_grad_batches"):
        fit([NoiseAdaptiveLR(estimator="split")], Classifier, data())


def test_an_optimizer_with_norms_of_its_own_decides_them():
    recorder = Recorder()

    class Signed(Classifier):
        def configure_optimizers(self) -> Any:
            return Scion([{"params": list(self.parameters()), "norm": "sign"}], lr=1e-3)

    fit([NoiseAdaptiveLR()], lambda: Signed(messy=False), data(), logger=recorder)
    ratios = [v for n, v in recorder.rows[7].items() if n.startswith("lr_ratio/")]
    assert ratios.count(1.0) == 1  # one norm group, one least noisy layer


def test_a_layer_that_never_has_a_gradient_does_not_slow_the_others():
    def run(spare):
        class Spare(Classifier):
            def __init__(self):
                super().__init__("sgd", messy=False)
                if spare:
                    self.spare = torch.nn.Linear(16, 16)

        recorder = Recorder()
        fit([NoiseAdaptiveLR()], Spare, data(), logger=recorder)
        return recorder.rows[7]

    plain, spared = run(False), run(True)
    ours = [n for n in plain if n.startswith(("lr_ratio/", "noise/net"))]
    assert {n: spared[n] for n in ours} == {n: plain[n] for n in ours}
    assert not any("spare" in n for n in spared if n.startswith("lr_ratio/"))


OPTIMIZERS = ["sgd", "momentum", "adamw", "adamw_fused", "muon", "scion"]
SCHEDULERS: dict[str, Any] = {
    "none": lambda o: None,
    "LambdaLR": lambda o: sched.LambdaLR(o, lambda s: 0.9**s),
    "MultiplicativeLR": lambda o: sched.MultiplicativeLR(o, lambda s: 0.9),
    "StepLR": lambda o: sched.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: sched.MultiStepLR(o, [2, 5], 0.3),
    "ConstantLR": lambda o: sched.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: sched.LinearLR(o, 0.3, 1.0, 5),
    "ExponentialLR": lambda o: sched.ExponentialLR(o, 0.8),
    "CosineAnnealingLR": lambda o: sched.CosineAnnealingLR(o, 8),
    "PolynomialLR": lambda o: sched.PolynomialLR(o, 10, 2.0),
    "CosineAnnealingWarmRestarts": lambda o: sched.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: sched.OneCycleLR(o, 0.05, total_steps=20),
    "CyclicLR": lambda o: sched.CyclicLR(o, 0.001, 0.01, 3, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: sched.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "SequentialLR": lambda o: sched.SequentialLR(o, [sched.LinearLR(o, 0.1, 1, 3), sched.ExponentialLR(o, 0.8)], [3]),
    "ChainedScheduler": lambda o: sched.ChainedScheduler([sched.LinearLR(o, 0.1, 1, 3), sched.ExponentialLR(o, 0.8)]),
}


class Scheduled(Classifier):
    """A classifier whose optimizer notes how many groups it sees inside each step."""

    def __init__(self, optimizer: str, scheduler: str = "none", compiled: bool = False) -> None:
        super().__init__(optimizer, lr=0.01, messy=False)
        self.scheduler = scheduler
        self.groups: list[int] = []
        if compiled:
            self.net = torch.compile(self.net, backend="aot_eager")  # type: ignore[assignment]

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self, self.optimizer, self.lr)
        kind, seen = type(optimizer), self.groups

        def step(self: Any, closure: Any = None) -> Any:
            def looking() -> Any:
                result = closure()
                seen.append(len(self.param_groups))
                return result

            return kind.step(self, looking)

        optimizer.__class__ = type(kind.__name__, (kind,), {"step": step})
        torch.optim.Optimizer._patch_step_function(optimizer)
        scheduler = SCHEDULERS[self.scheduler](optimizer)
        if scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "monitor": "train/loss"},
        }


class Trace(Callback):
    def __init__(self) -> None:
        self.rates: list[Any] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rates.append([float(g["lr"]) for g in trainer.optimizers[0].param_groups])
        for config in trainer.lr_scheduler_configs:
            self.rates[-1] += list(getattr(config.scheduler, "_last_lr", []))


def shape(state: Any) -> Any:
    """The structure of an optimizer's state: keys, lengths and the numbers of its groups, not its tensors."""
    if isinstance(state, dict):
        return {k: shape(v) for k, v in state.items()}
    if isinstance(state, list | tuple):
        return [shape(v) for v in state]
    return tuple(state.shape) if isinstance(state, torch.Tensor) else state


def picture(callbacks: list[Callback], make: Any, **kwargs: Any) -> dict[str, Any]:
    recorder, trace = Recorder(), Trace()
    callbacks = [*callbacks, LearningRateMonitor("step"), trace]
    module, trainer = fit(
        callbacks, make, data(), max_steps=8, logger=recorder, log_every_n_steps=1, enable_checkpointing=False, **kwargs
    )
    optimizer = trainer.optimizers[0]
    return {
        "weights": {n: p.detach() for n, p in module.named_parameters()},
        "state": [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)],
        "structure": shape(optimizer.state_dict()),
        "groups": len(optimizer.param_groups),
        "trace": trace.rates,
        "monitor": {s: {k: v for k, v in r.items() if k.startswith("lr-")} for s, r in recorder.rows.items()},
        "inside": module.groups,
        "params": len(list(module.parameters())),
    }


def assert_same_run(base: dict[str, Any], ours: dict[str, Any]) -> None:
    assert all(torch.equal(ours["weights"][n], w) for n, w in base["weights"].items())
    assert all(torch.equal(a, b) for a, b in zip(base["state"], ours["state"], strict=True))
    assert_same_schedule(base, ours)
    assert base["structure"] == ours["structure"]


def assert_same_schedule(base: dict[str, Any], ours: dict[str, Any]) -> None:
    assert base["trace"] == ours["trace"]
    assert base["monitor"] == {s: ours["monitor"][s] for s in base["monitor"]}
    assert set(base["inside"]) == {base["groups"]}
    # The split really happened, in every step, and left nothing behind.
    assert ours["inside"] == [ours["params"]] * 8
    assert ours["groups"] == base["groups"]
    assert base["structure"].keys() == ours["structure"].keys()
    assert base["structure"]["param_groups"] == ours["structure"]["param_groups"]


# Every scheduler meets two optimizers, every optimizer at least four schedulers.
PAIRS = [(OPTIMIZERS[(i + shift) % 6], name) for i, name in enumerate(SCHEDULERS) for shift in (0, 2)]


@pytest.mark.parametrize(("optimizer", "scheduler"), PAIRS)
def test_ratios_of_one_are_the_base_run_bit_for_bit_under_every_scheduler(optimizer, scheduler):
    make = lambda: Scheduled(optimizer, scheduler)  # noqa: E731
    base = picture([], make)
    assert_same_run(base, picture([NoiseAdaptiveLR(power=0.0)], make))
    scaled = picture([NoiseAdaptiveLR(power=0.5)], make)
    if scheduler != "ReduceLROnPlateau":  # that one follows the loss, which the ratios may change
        assert_same_schedule(base, scaled)
    assert any(not torch.equal(scaled["weights"][n], w) for n, w in base["weights"].items())


VARIANTS: dict[str, dict[str, Any]] = {
    "accumulate": {"accumulate_grad_batches": 4},
    "clipped": {"gradient_clip_val": 0.05},
    "accumulate-clipped": {"accumulate_grad_batches": 4, "gradient_clip_val": 0.05},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ratios_of_one_are_the_base_run_bit_for_bit_in_every_variant(optimizer, variant):
    make = lambda: Scheduled(optimizer, "CosineAnnealingLR")  # noqa: E731
    options = VARIANTS[variant]
    base = picture([], make, **options)
    assert_same_run(base, picture([NoiseAdaptiveLR(power=0.0)], make, **options))
    assert_same_schedule(base, picture([NoiseAdaptiveLR(power=0.5)], make, **options))


@pytest.mark.parametrize("optimizer", ["adamw", "scion"])
def test_ratios_of_one_are_the_base_run_bit_for_bit_when_compiled(optimizer):
    torch._dynamo.reset()
    make = lambda: Scheduled(optimizer, "StepLR", compiled=True)  # noqa: E731
    base = picture([], make)
    assert_same_run(base, picture([NoiseAdaptiveLR(power=0.0)], make))
    assert_same_schedule(base, picture([NoiseAdaptiveLR(power=0.5)], make))


@pytest.mark.parametrize("make", [lambda m: MuonAdamW(m, lr=0.01), lambda m: Scion(m, lr=0.01)])
def test_optimizers_with_several_groups_scale_each_layer_in_its_own(make):
    recorder = Recorder()

    class Several(Classifier):
        def configure_optimizers(self) -> Any:
            return make(self)

    fit([NoiseAdaptiveLR()], lambda: Several(messy=False), data(), logger=recorder)
    row = recorder.rows[7]
    rates = {n.removeprefix("layer_lr/"): v for n, v in row.items() if n.startswith("layer_lr/")}
    assert len(rates) == 6
    for name, rate in rates.items():
        assert rate == pytest.approx(0.01 * row[f"lr_ratio/{name}"])
    assert len({round(v, 6) for v in rates.values()}) > 2


def tensors_held(module: torch.nn.Module) -> int:
    """Elements of all live tensors the size of a parameter that are neither parameters nor their gradients."""
    gc.collect()
    shapes = {p.shape for p in module.parameters()}
    known = {p.data_ptr() for p in module.parameters()} | {
        p.grad.data_ptr() for p in module.parameters() if p.grad is not None
    }
    found = {
        t.data_ptr(): t.numel()
        for t in gc.get_objects()
        if type(t) is torch.Tensor and t.shape in shapes and t.data_ptr() not in known
    }
    return sum(found.values())


@pytest.mark.parametrize(
    ("every", "estimator", "accumulate", "copies"),
    [(1, "consecutive", 1, [1] * 6), (3, "consecutive", 1, [0, 0, 1] * 2), (1, "split", 2, [0] * 6)],
)
def test_between_steps_at_most_one_copy_of_the_gradient_is_held(every, estimator, accumulate, copies):
    def run(callbacks):
        held = []

        class Look(Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                if (batch_idx + 1) % accumulate == 0:
                    held.append(tensors_held(pl_module))

        module, _ = fit(
            [*callbacks, Look()], lambda: Classifier("sgd", messy=False), data(), max_steps=6,
            accumulate_grad_batches=accumulate,
        )  # fmt: skip
        return held, sum(p.numel() for p in module.parameters())

    gc.collect()
    gc.freeze()  # what lives already need not be searched
    try:
        base, total = run([])
        ours, _ = run([NoiseAdaptiveLR(every_n_steps=every, estimator=estimator)])
    finally:
        gc.unfreeze()
    assert [o - b for o, b in zip(ours, base, strict=True)] == [total * c for c in copies]

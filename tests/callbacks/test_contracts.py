"""The contracts every callback keeps, over every callback in ``tests/settings.py``."""

import csv
import itertools
import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from evolute.callbacks import MetricsCSV, RunCheckpoint
from tests.conftest import fit
from tests.modules import Classifier, Compiled, Late, TwoOptimizers, Validated, classification_data
from tests.settings import GAUSSIANS, INTERVENTIONS, MONITORS, SETTINGS


def data() -> DataLoader:
    return DataLoader(classification_data(), batch_size=8)


class Probe(Callback):
    """Note what a monitor might disturb, at every step, as the last callback sees it."""

    def __init__(self) -> None:
        self.trace: list[Any] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        grads = [None if p.grad is None else p.grad.clone() for p in pl_module.parameters()]
        modes = [m.training for m in pl_module.modules()]
        rng = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
        self.trace.append((grads, modes, rng, trainer.global_step, batch_idx))


def picture(module: nn.Module, trainer: Any, probe: Probe, ours: str) -> list[Any]:
    """Everything that two runs have to agree on."""
    metrics = {k: v for k, v in trainer.callback_metrics.items() if not k.startswith(ours + "/")}
    states = (
        {k: v for k, v in vars(module.accuracy).items() if k in module.accuracy._defaults}
        if hasattr(module, "accuracy")
        else {}
    )
    return [
        list(module.state_dict().values()),
        metrics,
        states,
        getattr(module, "seen", None),
        probe.trace,
        [g["lr"] for o in trainer.optimizers for g in o.param_groups],
        [list(s.values()) for o in trainer.optimizers for s in o.state.values()],
        set(vars(module)),
    ]


def assert_equal(a: Any, b: Any, where: str = "run") -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a.isnan(), b.isnan()), where
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "messy": (Classifier, {}),
    "accumulate": (Classifier, {"accumulate_grad_batches": 2}),
    "clipped": (Classifier, {"gradient_clip_val": 0.1}),
    "late": (Late, {}),
    "bf16-mixed": (Classifier, {"precision": "bf16-mixed"}),
    "bf16-true": (lambda: Classifier("adamw", messy=False), {"precision": "bf16-true"}),
    "double": (Classifier, {"precision": "64-true"}),
    "fused": (lambda: Classifier("adamw_fused"), {}),
    "scion": (lambda: Classifier("scion"), {}),
    "muon": (lambda: Classifier("muon", messy=False), {}),
    "compiled": (Compiled, {}),
    "validated": (Validated, {"max_steps": 30, "val_check_interval": 5}),
    "momentum": (lambda: Classifier("momentum"), {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
}


def made(names: str | tuple[str, ...], make: Any) -> Any:
    """A function that builds the module, with a policy loss or Gaussians if a callback needs them."""
    settings = [SETTINGS[name] for name in ([names] if isinstance(names, str) else names)]

    def build() -> Any:
        module = make()
        module = module.become_policy() if any(s.policy for s in settings) else module
        return module.become_scene() if any(s.scene for s in settings) else module

    return build


def run(callbacks: list[Callback], kind: str, names: str | tuple[str, ...], **kwargs: Any) -> list[Any]:
    make, options = KINDS[kind]
    probe = Probe()
    module, trainer = fit([*callbacks, probe], made(names, make), data(), **{**options, **kwargs})
    return picture(module, trainer, probe, SETTINGS[names].prefix if isinstance(names, str) else "")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MONITORS)
def test_a_monitor_changes_nothing(name, kind):
    setting = MONITORS[name]
    torch._dynamo.reset()
    assert_equal(run([], kind, name), run([setting.make()], kind, name))


@pytest.mark.parametrize("name", MONITORS)
def test_a_monitor_changes_nothing_under_manual_optimisation_with_two_optimizers(name):
    def once(callbacks):
        probe = Probe()
        module, trainer = fit([*callbacks, probe], TwoOptimizers, data())
        return picture(module, trainer, probe, MONITORS[name].prefix)

    assert_equal(once([]), once([MONITORS[name].make()]))


@pytest.mark.parametrize(
    "kind",
    [
        "messy",
        "accumulate",
        "clipped",
        "late",
        "bf16-mixed",
        "bf16-true",
        "double",
        "fused",
        "scion",
        "muon",
        "compiled",
    ]
    + ["validated", "momentum"],
)
@pytest.mark.parametrize("name", INTERVENTIONS)
@pytest.mark.parametrize("position", ["dry_run", "neutral"])
def test_an_intervention_has_an_off_position_and_a_neutral_setting(name, position, kind):
    setting = INTERVENTIONS[name]
    torch._dynamo.reset()
    arguments = {"dry_run": True} if position == "dry_run" else setting.neutral
    if setting.float32 and kind in ("bf16-true", "double"):
        with pytest.raises(MisconfigurationException, match="float32"):
            run([setting.make(**arguments)], kind, name)
        return
    base, got = run([], kind, name), run([setting.make(**arguments)], kind, name)
    # lr_ratio and layer_lr are the callback's own, under prefixes of their own.
    base[1], got[1] = (
        {k: v for k, v in m.items() if not k.startswith(("lr_ratio/", "layer_lr/"))} for m in (base[1], got[1])
    )
    assert_equal(base, got)


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_an_intervention_that_is_on_changes_the_run(name):
    base, got = (run(ours, "messy", name) for ours in ([], [INTERVENTIONS[name].make()]))
    assert any(not torch.equal(a, b) for a, b in zip(base[0], got[0], strict=True))


PAIRS = [  # Lightning saves one state a class
    (one, other)
    for one, other in itertools.combinations(INTERVENTIONS, 2)
    if type(INTERVENTIONS[one].make()) is not type(INTERVENTIONS[other].make())
    # Of those that rewrite Gaussians each sees what the one before it left; one stands for all beside the others.
    and not (INTERVENTIONS[one].scene and INTERVENTIONS[other].scene)
    and not {one, other} & (GAUSSIANS.keys() - {"GaussianDensify"})
]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_two_interventions_are_neutral_together_and_do_not_depend_on_their_order(one, other):
    a, b = INTERVENTIONS[one], INTERVENTIONS[other]
    neutral = [a.make(**a.neutral), b.make(**b.neutral)]
    both = (one, other)
    assert_equal(run([], "messy", both)[0], run(neutral, "messy", both)[0])
    one_way, other_way = ([a.make(), b.make()], [b.make(), a.make()])
    assert_equal(run(one_way, "messy", both)[0], run(other_way, "messy", both)[0])


@pytest.mark.parametrize("name", SETTINGS)
def test_state_holds_only_what_a_safe_checkpoint_may_hold(name, tmp_path):
    callback = SETTINGS[name].make()
    fit([callback], made(name, Classifier), data())
    torch.save(callback.state_dict(), tmp_path / "state.pt")
    again = SETTINGS[name].make()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_equal(without_clocks(callback.state_dict()), without_clocks(again.state_dict()))


@pytest.mark.parametrize("name", SETTINGS)
def test_hooks_are_gone_when_fit_ends_and_after_a_step_that_failed(name):
    class Failing(Classifier):
        def on_before_optimizer_step(self, optimizer):
            if self.trainer.global_step == 2:
                raise RuntimeError("stop here")

    module = made(name, lambda: Failing("sgd"))()
    with pytest.raises(RuntimeError, match="stop here"):
        fit([SETTINGS[name].make()], module, data())
    optimizer = module.optimizers(use_pl_optimizer=False)
    assert len(optimizer.param_groups) == 1
    again, trainer = fit([SETTINGS[name].make()], made(name, Classifier), data())
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert not any(m._forward_pre_hooks for fitted in (module, again) for m in fitted.modules())


def without_clocks(state: Any) -> Any:
    if isinstance(state, dict):
        return {k: without_clocks(v) for k, v in state.items() if k not in ("spent", "elapsed")}
    return state


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=["plain", "accumulate"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_equals_an_uninterrupted_one(name, options, tmp_path):
    make = SETTINGS[name].make
    loader = data()

    def train(folder, steps, ckpt=None):
        callback = make()
        kwargs = {"max_steps": steps, "default_root_dir": folder, "logger": MetricsCSV(folder), **options}
        module, trainer = fit(
            [RunCheckpoint(5), callback], made(name, partial(Classifier, messy=False)), loader, ckpt_path=ckpt, **kwargs
        )
        return module, callback, trainer

    steps = (
        5 if not options else 4
    )  # 12 batches an epoch: both stop inside one, at a place in the middle of its cadence
    whole, reference, _ = train(tmp_path / "whole", 2 * steps)
    train(tmp_path / "parts", steps)
    ckpt = str(next((tmp_path / "parts" / "checkpoints").glob("*.ckpt")))

    class Later(DataLoader):
        """The rest of the epoch first, as a data module that knows its place gives it."""

        first = True

        def __iter__(self):
            skip = steps * options.get("accumulate_grad_batches", 1) if self.first else 0
            self.first = False
            return itertools.islice(super().__iter__(), skip, None)

    loader = Later(classification_data(), batch_size=8)
    parts, resumed, _ = train(tmp_path / "parts", 2 * steps, ckpt)
    assert_equal(list(whole.state_dict().values()), list(parts.state_dict().values()))
    assert_equal(without_clocks(reference.state_dict()), without_clocks(resumed.state_dict()))
    # The part that ended early also logged the end of its epoch, which the whole run reaches later; ours must agree.
    ours = (SETTINGS[name].prefix + "/", "lr_ratio/", "layer_lr/")
    assert rows(tmp_path / "whole", ours) == rows(tmp_path / "parts", ours) != []


def rows(folder: Any, prefixes: tuple[str, ...] = ("",)) -> list[dict[str, str]]:
    """The rows of a run's log that have a value under one of the prefixes, without clock times."""
    with open(folder / "metrics.csv", newline="") as file:
        kept = [
            {k: v for k, v in r.items() if v and "time" not in k and k.startswith((*prefixes, "step"))}
            for r in csv.DictReader(file)
        ]
    return [row for row in kept if len(row) > 1]


@pytest.mark.parametrize("name", SETTINGS)
def test_every_measurement_is_recorded_at_its_step_and_has_a_price(name, tmp_path):
    setting = SETTINGS[name]
    loggers = {"logger": MetricsCSV(tmp_path), "log_every_n_steps": 5}
    fit([setting.make(**setting.every(4))], made(name, Classifier)(), data(), max_steps=14, **loggers)
    step = 1 if setting.every_step else 4
    found = rows(tmp_path)
    measured = [int(r["step"]) for r in found if setting.metric in r] if "time" not in setting.metric else None
    with open(tmp_path / "metrics.csv", newline="") as file:
        timed = [int(r["step"]) for r in csv.DictReader(file) if r[f"{setting.prefix}/time_ms"]]
    expected = [s for s in range(step - 1 if setting.ends else 0, 14, step) if s >= setting.first]
    expected = expected[:1] if setting.once else expected
    assert timed == expected
    assert measured in (None, expected)


@pytest.mark.parametrize(("name", "bad"), [(n, b) for n, s in SETTINGS.items() for b in s.bad], ids=str)
def test_arguments_out_of_range_are_refused_with_their_value(name, bad):
    with pytest.raises(MisconfigurationException) as caught:
        SETTINGS[name].make(**bad)
    assert str(next(iter(bad))) in str(caught.value) or "estimator" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_batch_whose_loss_is_not_a_number_leaves_the_callback_state_alone(name, tmp_path):
    class Poisoned(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if batch_idx == 4 else loss

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            for p in self.parameters():  # the recipe skips such a step: nothing reaches the weights
                if p.grad is not None and not p.grad.isfinite().all():
                    p.grad.zero_()

    callback = SETTINGS[name].make(**SETTINGS[name].every(1))
    module = made(name, lambda: Poisoned("sgd", messy=False))()
    fit([callback], module, data(), max_steps=9, logger=MetricsCSV(tmp_path))
    state = callback.state_dict()

    def all_finite(value):
        if isinstance(value, dict):
            return all(all_finite(v) for v in value.values())
        if isinstance(value, list | tuple):
            return all(all_finite(v) for v in value)
        if isinstance(value, torch.Tensor):
            return bool(value.isfinite().all()) if value.is_floating_point() else True
        return value == value if isinstance(value, float) else True

    assert all_finite(state)
    if name in ("NoiseAdaptiveLR", "LayerMonitor"):
        found = [int(r["step"]) for r in rows(tmp_path) if f"{SETTINGS[name].prefix}/nonfinite" in r]
        assert found
        assert found[0] == 4


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_interventions_refuse_manual_optimisation(name):
    if INTERVENTIONS[name].once:
        fit([INTERVENTIONS[name].make()], TwoOptimizers(), data())
        return
    with pytest.raises(MisconfigurationException, match="manual"):
        fit([INTERVENTIONS[name].make()], TwoOptimizers(), data())


@pytest.mark.parametrize("name", SETTINGS)
def test_an_unknown_strategy_is_refused_by_name(name):
    from lightning.pytorch.strategies import SingleDeviceStrategy

    class Sharded(SingleDeviceStrategy):
        pass

    with pytest.raises(MisconfigurationException, match="Sharded"):
        fit([SETTINGS[name].make()], made(name, Classifier), data(), strategy=Sharded(device=torch.device("cpu")))

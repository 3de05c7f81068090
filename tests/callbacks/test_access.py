"""The door to a step: what it leaves behind when a step fails, repeats itself, or is skipped."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from evolute.callbacks import CurvatureMonitor, LayerMonitor, NoiseAdaptiveLR, StepRadius
from evolute.callbacks.access import Action, Stage, attach, named_parameters
from tests.conftest import fit
from tests.modules import Classifier, Recorder, classification_data


def data():
    return DataLoader(classification_data(), batch_size=8)


def monitors(every=1):
    return [
        CurvatureMonitor(every_n_steps=every, budget=None),
        StepRadius(every_n_steps=every, budget=None),
        LayerMonitor(every_n_steps=every, budget=None),
    ]


class With(Classifier):
    """A classifier with an optimizer given as a function of its parameters."""

    def __init__(self, make):
        super().__init__(messy=False)
        self.make = make

    def configure_optimizers(self):
        return self.make(list(self.parameters()))


def groups_of(optimizer):
    return [([id(p) for p in g["params"]], g["lr"]) for g in optimizer.param_groups]


class Broken(torch.optim.SGD):
    """Raises in the middle of its third step, after the groups were split."""

    calls = 0

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure()
        self.calls += 1
        if self.calls == 3:
            self.inside = len(self.param_groups)
            raise RuntimeError("no more")
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"])
        return loss


def test_a_step_that_raises_leaves_the_groups_as_they_were():
    module = With(lambda p: Broken(p, lr=0.1))
    with pytest.raises(RuntimeError, match="no more"):
        fit([NoiseAdaptiveLR()], module, data())
    optimizer = module.optimizers(use_pl_optimizer=False)
    assert optimizer.inside == 6
    assert groups_of(optimizer) == [([id(p) for p in module.parameters()], 0.1)]


def test_a_step_that_raises_and_is_caught_does_not_disturb_the_next():
    class Catching(With):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            try:
                optimizer.step(closure=optimizer_closure)
            except RuntimeError:
                self.caught = len(optimizer.param_groups)

    module = Catching(lambda p: Broken(p, lr=0.1))
    recorder = Recorder()
    _, trainer = fit([NoiseAdaptiveLR(), *monitors()], module, data(), logger=recorder)
    assert module.caught == 6
    assert groups_of(trainer.optimizers[0]) == [([id(p) for p in module.parameters()], 0.1)]
    assert set(recorder.of("layer/grad_norm")) == set(range(8)) - {2}  # what was not taken is not recorded


def test_monitors_count_the_steps_of_an_optimizer_that_searches_a_line():
    def run(callbacks):
        recorder = Recorder()
        module, _ = fit(
            callbacks,
            lambda: With(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4)),
            data(),
            logger=recorder,
            max_steps=5,
            log_every_n_steps=100,
        )
        return list(module.state_dict().values()), recorder, module

    base, _, _ = run([])
    weights, recorder, module = run(monitors(2))
    assert all(torch.equal(a, b) for a, b in zip(base, weights, strict=True))
    assert len(module.seen) > 5  # it did evaluate its closure several times a step
    for metric in ("curvature/sharpness", "step/ghost_ratio", "layer/update_ratio/net.0.weight"):
        assert list(recorder.of(metric)) == [0, 2, 4]


@pytest.mark.parametrize("make", [lambda: NoiseAdaptiveLR(), lambda: StepRadius(mode="clip")])
def test_interventions_refuse_lbfgs_before_the_first_step(make):
    module = With(lambda p: torch.optim.LBFGS(p, max_iter=1))
    with pytest.raises(MisconfigurationException, match="LBFGS evaluates its closure more than once"):
        fit([make()], module, data())
    assert module.seen == []


class Sam(torch.optim.SGD):
    """Sharpness-aware descent: climbs, evaluates again, comes back, steps."""

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        params = [p for g in self.param_groups for p in g["params"]]
        kept = [p.clone() for p in params]
        for p in params:
            p.add_(p.grad, alpha=0.05)
        with torch.enable_grad():
            closure()
        for p, old in zip(params, kept, strict=True):
            p.copy_(old)
        return super().step() or loss


def test_a_closure_evaluated_twice_is_one_step_to_monitors_and_refused_to_interventions():
    def run(callbacks):
        recorder = Recorder()
        make = lambda: With(lambda p: Sam(p, lr=0.1))  # noqa: E731
        module, _ = fit(callbacks, make, data(), logger=recorder, log_every_n_steps=100)
        return list(module.state_dict().values()), recorder

    base, _ = run([])
    weights, recorder = run(monitors())
    assert all(torch.equal(a, b) for a, b in zip(base, weights, strict=True))
    assert list(recorder.of("layer/snr/net.0.weight")) == list(range(1, 8))
    assert list(recorder.of("curvature/sharpness")) == list(range(8))
    for make in (lambda: NoiseAdaptiveLR(), lambda: StepRadius(mode="clip")):
        module = With(lambda p: Sam(p, lr=0.1))
        with pytest.raises(MisconfigurationException, match="Sam evaluates its closure more than once"):
            fit([make()], module, data())
        assert len(module.optimizers(use_pl_optimizer=False).param_groups) == 1


class Child(torch.optim.AdamW):
    """Calls its parent's step, and so fires every hook twice."""

    how = "through"

    def step(self, closure=None):
        if self.how == "through":
            return super().step(closure)
        if self.how == "wrapped":
            return super().step(lambda: closure())
        with torch.enable_grad():
            loss = closure()
        super().step()
        return loss


@pytest.mark.parametrize("how", ["through", "wrapped", "before"])
def test_an_optimizer_that_calls_its_parents_step_takes_one(how):
    def run(kind, callbacks):
        recorder = Recorder()

        def make(p):
            torch.optim.AdamW(p)  # torch hooks a class when it is first built: both of them now
            optimizer = kind(p, lr=0.01)
            optimizer.how = how
            return optimizer

        module, trainer = fit(callbacks, lambda: With(make), data(), logger=recorder, log_every_n_steps=100)
        return list(module.state_dict().values()), recorder, trainer.optimizers[0]

    plain, expected, _ = run(torch.optim.AdamW, [NoiseAdaptiveLR(), StepRadius(mode="clip", target=0.01)])
    ours, recorder, optimizer = run(Child, [NoiseAdaptiveLR(), StepRadius(mode="clip", target=0.01)])
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    assert len(optimizer.param_groups) == 1
    assert recorder.of("step/clip_scale") == expected.of("step/clip_scale")


class Overflowing(Classifier):
    """The gradient of the fourth step overflows float16."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * 1e30 if batch_idx == 3 else loss


def half_precision():
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adamw_fused"])
def test_a_step_skipped_by_the_gradient_scaler_leaves_everything_consistent(optimizer):
    def run(callbacks, **arguments):
        recorder = Recorder()
        module, trainer = fit(
            callbacks,
            lambda: Overflowing(optimizer, lr=0.01, messy=False),
            data(),
            logger=recorder,
            plugins=[half_precision()],
            log_every_n_steps=100,
        )
        return list(module.state_dict().values()), recorder, trainer.optimizers[0]

    base, _, _ = run([])
    watched, seen, _ = run(monitors())
    neutral, _, optimizer_after = run([NoiseAdaptiveLR(power=0.0), StepRadius(mode="clip", target=1e9)])
    assert all(torch.equal(a, b) for a, b in zip(base, watched, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(base, neutral, strict=True))
    assert len(optimizer_after.param_groups) == 1
    callback = NoiseAdaptiveLR()
    _, recorder, _ = run([callback])
    # Step 3 overflowed; step 4 has no earlier gradient to compare with; the state has seen no infinity.
    assert list(recorder.of("noise/net.0.weight")) == [1, 2, 5, 6, 7]
    assert list(recorder.of("noise/nonfinite")) == [3]
    assert all(torch.tensor(list(callback.state_dict()["noise"].values())).isfinite())
    if optimizer != "adamw_fused":  # a fused optimizer is stepped all the same and skips inside
        assert 3 not in seen.of("step/ghost_ratio")
    assert {4, 5, 6, 7} <= set(seen.of("step/ghost_ratio"))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_fused"])
def test_gradients_are_those_of_the_loss_whatever_its_scale(optimizer):
    def norms(**kwargs):
        recorder = Recorder()
        fit(
            [LayerMonitor(every_n_steps=1, budget=None)],
            lambda: Classifier(optimizer, messy=False),
            data(),
            logger=recorder,
            max_steps=1,
            **kwargs,
        )
        return recorder.rows[0]

    plain, scaled = norms(), norms(plugins=[half_precision()])
    for name, value in plain.items():
        if name.startswith("layer/grad_norm"):
            assert scaled[name] == pytest.approx(value, rel=2e-2)


class Odd(Classifier):
    """A frozen layer, a layer without gradient, and a weight that two layers share."""

    def __init__(self):
        super().__init__("sgd", messy=False)
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
        self.net[2].weight = self.net[0].weight
        self.net[0].bias.requires_grad_(False)
        self.idle = nn.Linear(3, 3)


def test_frozen_idle_and_shared_parameters():
    recorder = Recorder()
    callbacks = [*monitors(), NoiseAdaptiveLR()]
    module, _ = fit(callbacks, Odd, data(), logger=recorder)
    names = set(named_parameters(module))
    assert names == {"net.0.weight", "net.2.bias", "net.4.weight", "net.4.bias", "idle.weight", "idle.bias"}
    row = recorder.rows[7]
    assert {n.removeprefix("lr_ratio/") for n in row if n.startswith("lr_ratio/")} == names - {
        "idle.weight",
        "idle.bias",
    }
    assert row["layer/update_ratio/idle.weight"] == 0.0
    assert "layer/grad_norm/idle.weight" not in row
    assert "layer/weight_norm/net.2.weight" not in row
    assert row["curvature/sharpness"] > 0


class Counting(torch.optim.SGD):
    """Keeps counters in its groups, as a number and as a tensor."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure()
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group.setdefault("ticks", torch.zeros(())).add_(1)
            for p in group["params"]:
                p.sub_(p.grad, alpha=float(group["lr"]))
        return loss


def test_counters_that_an_optimizer_keeps_in_its_groups_go_up_once_a_step():
    module, trainer = fit([NoiseAdaptiveLR()], lambda: With(lambda p: Counting(p, lr=0.1)), data())
    (group,) = trainer.optimizers[0].param_groups
    assert group["count"] == 8
    assert group["ticks"].item() == 8
    assert len(group["params"]) == len(list(module.parameters()))


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_learning_rate_in_a_tensor_is_scaled_and_stays_the_same_tensor(kind):
    rate = torch.tensor(0.01)

    def make(p):
        if kind == "adamw":
            return torch.optim.AdamW(p, lr=rate, foreach=False)
        return torch.optim.SGD(p, lr=rate)

    def run(lr, callbacks):
        recorder = Recorder()
        module, trainer = fit(callbacks, lambda: With(make if lr is rate else lr), data(), logger=recorder)
        return list(module.state_dict().values()), trainer.optimizers[0], recorder

    base, _, _ = run(rate, [])
    neutral, optimizer, _ = run(rate, [NoiseAdaptiveLR(power=0.0)])
    assert all(torch.equal(a, b) for a, b in zip(base, neutral, strict=True))
    assert optimizer.param_groups[0]["lr"] is rate
    scaled, _, recorder = run(rate, [NoiseAdaptiveLR()])
    assert rate.item() == pytest.approx(0.01)
    assert any(not torch.equal(a, b) for a, b in zip(base, scaled, strict=True))
    row = recorder.rows[7]
    assert row["layer_lr/net.0.weight"] == pytest.approx(0.01 * row["lr_ratio/net.0.weight"])


def test_actions_run_in_the_order_of_their_stages_and_see_one_step():
    seen = []

    class Acting(Callback):
        def __init__(self, stage, ratios=None):
            self.action = Action(stage, lambda step: seen.append((stage.name, step.ratios)) or ratios)

        def on_fit_start(self, trainer, pl_module):
            attach(trainer, self.action)

    stages = [Stage.OBSERVE, Stage.TRANSFORM, Stage.SCALE, Stage.LIMIT]
    callbacks = [Acting(s, {"net.0.weight": 0.5} if s is Stage.SCALE else None) for s in stages]
    callbacks.append(Acting(Stage.SCALE, {"net.0.weight": 0.5}))
    fit(callbacks, lambda: Classifier("sgd", messy=False), data(), max_steps=1)
    assert [name for name, _ in seen] == ["SCALE", "SCALE", "LIMIT", "TRANSFORM", "OBSERVE"]
    assert seen[-1][1] == {"net.0.weight": 0.25}  # two factors multiply


def test_nothing_is_left_on_the_optimizer_after_fit():
    module, trainer = fit([*monitors(), NoiseAdaptiveLR()], Classifier, data())
    optimizer = trainer.optimizers[0]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not any(p._post_accumulate_grad_hooks for p in module.parameters())

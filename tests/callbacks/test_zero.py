"""What the backend for DeepSpeed ZeRO gives and does, against a single process on the joined batches.

The file is also the script of two processes, which run every stage one after the other and save what they saw.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from evolute.callbacks import CurvatureMonitor, LayerMonitor, NoiseAdaptiveLR, StepRadius
from evolute.callbacks.access import (
    Action,
    OptimizerStep,
    Stage,
    attach,
    backend_for,
    base_optimizer,
    detach,
    named_parameters,
    require,
    underway,
)
from tests.conftest import fit
from tests.modules import Mixed, Recorder, classification_data
from tests.processes import run_pair

STAGES = (1, 2, 3)
EXACT = ("plain", "accumulated", "ragged", "adamw", "clipped", "scaled", "shortened", "persistent")
ROUNDED = ("shortened-bf16", "overflow", "accumulated-bf16", "accumulated-bf16-fp32")
CELLS = [(name, stage) for stage in STAGES for name in EXACT + ROUNDED if (name, stage) != ("accumulated-bf16-fp32", 1)]
RATIOS = {"first.weight": 0.5, "second.weight": 0.0, "head.weight": 0.75, "head.bias": 0.25}


class Seen(Callback):
    """What a backend gives at each step, whole, and what the live module is at the end."""

    def __init__(self, act: str = "", accumulate: int = 1) -> None:
        self.accumulate, self.micro_batches = accumulate, 0
        self.seen: dict[str, list[Any]] = {
            key: [] for key in ("gradients", "norms", "accumulated", "before", "weights", "moments", "rates")
        }
        self.live: dict[str, Tensor] = {}
        self.probed: dict[str, Tensor] = {}
        self.parts_come_back = True
        self._actions = [Action(Stage.OBSERVE, self._after, lambda step: True)]
        if act == "scaled":
            self._actions.append(Action(Stage.SCALE, lambda step: RATIOS))
        if act == "shortened":
            self._actions.append(Action(Stage.LIMIT, self._shorten))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._backend = backend_for(trainer, "Seen")
        self._params = named_parameters(pl_module)
        for action in self._actions:
            attach(trainer, action)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.micro_batches += 1
        if self.micro_batches % self.accumulate:
            self._note("accumulated", self._backend.accumulated(self._params))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        parts = self._backend.gradients(self._params, optimizer)
        whole = self._note("gradients", parts)
        self.seen["norms"].append(dict(zip(parts, self._backend.norms(parts), strict=True)))
        back = self._backend.part(self._params, whole)
        self.parts_come_back &= all(torch.equal(back[n], part) for n, part in parts.items())

    def _shorten(self, step: OptimizerStep) -> None:
        step.rescale(0.5)
        step.rescale(0.3)

    def _after(self, step: OptimizerStep) -> None:
        self._note("before", step.before)
        self._note("weights", self._backend.weights(step.params))
        states = {n: self._backend.optimizer_state(step.optimizer, p) for n, p in step.params.items()}
        self.seen["moments"].append({n: s["exp_avg_sq"].clone() for n, s in states.items() if "exp_avg_sq" in s})
        self.seen["rates"].append(step.learning_rates())

    def _note(self, key: str, parts: Any) -> dict[str, Tensor]:
        whole = {n: t.clone() for n, t in self._backend.whole(self._params, parts).items()}
        self.seen[key].append(whole)
        return whole

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.zero = trainer.optimizers[0]
        if not isinstance(trainer.strategy, DeepSpeedStrategy):
            self.live = {n: p.detach().clone() for n, p in self._params.items()}
            return
        import deepspeed

        for name, p in pl_module.named_parameters():
            with deepspeed.zero.GatheredParameters([p]):
                self.live[name] = p.detach().clone()
        with self._backend.unsharded(pl_module) as weights:
            assert weights is not None
            self.probed = {n: w.clone() for n, w in weights.items()}

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        for action in self._actions:
            detach(trainer, action)
        self.closed = not underway(trainer)


class Poisoned(Mixed):
    """Its third loss is not a number."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == 2 else loss


def loader(world: int, micro_batch: int, samples: int = 96) -> DataLoader:
    """Micro-batches of so many samples over all ranks, the same samples whatever their number."""
    data = classification_data(samples)
    mine = DistributedSampler(data, world, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
    return DataLoader(data, batch_size=micro_batch // world, sampler=mine, drop_last=True)


def strategy(stage: int, threshold: int, **config: Any) -> dict[str, Any]:
    """Trainer arguments for two processes under a ZeRO stage; none for one process (stage 0)."""
    from evolute.strategies import CPUDeepSpeedStrategy

    if not stage:
        return {}
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": threshold} if stage == 3 else {})}
    config = {"zero_allow_untested_optimizer": True, "zero_optimization": zero, **config}
    return {"devices": 2, "use_distributed_sampler": False, "strategy": CPUDeepSpeedStrategy(config=config)}


def scenario(name: str, stage: int) -> dict[str, Any]:
    """Run one scenario under a ZeRO stage, or in a single process for stage 0."""
    options: dict[str, Any] = {"max_steps": 4}
    optimizer, samples = ("sgd" if name in EXACT[:3] else "adamw"), 96
    config: dict[str, Any] = {}
    make = Poisoned if name == "overflow" else Mixed
    match name:
        case "accumulated":
            options["accumulate_grad_batches"] = 3
        case "ragged":  # 5 micro-batches an epoch: the last step of each epoch has but one
            options.update(accumulate_grad_batches=2, max_steps=8)
            samples = 40
        case "clipped":
            options["gradient_clip_val"] = 0.05
        case "shortened-bf16" | "overflow":
            options.update(precision="bf16-mixed", max_steps=6)
        case "accumulated-bf16" | "accumulated-bf16-fp32":
            options.update(precision="bf16-mixed", accumulate_grad_batches=3)
            if name.endswith("fp32"):
                config["data_types"] = {"grad_accum_dtype": "fp32"}
    seen = Seen(name.removesuffix("-bf16"), options.get("accumulate_grad_batches", 1) if name != "ragged" else 1)
    recorder = Recorder()
    monitors: list[Callback] = [
        LayerMonitor(every_n_steps=1, budget=None),
        StepRadius(every_n_steps=1, budget=None),
        CurvatureMonitor(every_n_steps=1, budget=None),
        NoiseAdaptiveLR(),
    ]
    callbacks = [*monitors, seen] if name == "overflow" else [seen]
    data = loader(2 if stage else 1, 8, samples)
    given = strategy(stage, 10**5 if name == "persistent" else 0, **config)
    _, trainer = fit(
        callbacks, lambda: make(optimizer, eps=1e-4) if optimizer == "adamw" else make(optimizer), data,
        logger=recorder, log_every_n_steps=1000, **options, **given,
    )  # fmt: skip
    base: Any = base_optimizer(seen.zero)
    hooks = [*base._optimizer_step_pre_hooks, *base._optimizer_step_post_hooks]
    return {
        **seen.seen,
        "live": seen.live,
        "probed": seen.probed,
        "parts come back": seen.parts_come_back,
        "closed": seen.closed and "step" not in vars(seen.zero) and not hooks,
        "steps": trainer.global_step,
        "rows": recorder.rows,
        "states": [callback.state_dict() for callback in monitors[:1] + monitors[3:]] if name == "overflow" else [],
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of two processes saw, by scenario and stage."""
    return run_pair(__file__, tmp_path_factory.mktemp("zero"), 400)


@pytest.fixture(scope="module")
def single() -> dict[str, dict[str, Any]]:
    """What one process saw."""
    return {name: scenario(name, 0) for name in EXACT}


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        wanted = torch.as_tensor(value)
        assert (torch.as_tensor(found[name]) - wanted).norm() <= 1e-5 * wanted.norm().clamp(min=1e-6), name


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", EXACT)
def test_every_step_is_that_of_one_process(ranks, single, name, stage):
    expected = single[name]
    assert len(expected["accumulated"]) == (8 if name == "accumulated" else 0)
    assert all(expected["moments"]) == (name not in EXACT[:3])
    for rank in ranks:
        found = rank[name, stage]
        assert found["steps"] == expected["steps"] == len(expected["gradients"])
        for key in ("gradients", "norms", "accumulated", "before", "weights", "moments", "rates"):
            assert len(found[key]) == len(expected[key])
            for ours, theirs in zip(found[key], expected[key], strict=True):
                assert_close(ours, theirs)


@pytest.mark.parametrize(("name", "stage"), [c for c in CELLS if c[0].startswith("accumulated-bf16")])
def test_gradients_that_accumulate_in_either_precision_add_up_to_the_step_s(ranks, name, stage):
    single = scenario("accumulated-bf16", 0)
    for rank in ranks:
        for key in ("accumulated", "gradients"):
            for ours, theirs in zip(rank[name, stage][key], single[key], strict=True):
                for parameter, value in theirs.items():
                    assert (ours[parameter] - value).norm() <= 0.05 * value.norm(), (key, parameter)


@pytest.mark.parametrize(("name", "stage"), CELLS)
def test_the_live_module_of_every_rank_is_the_masters(ranks, name, stage):
    for rank in ranks:
        live = rank[name, stage]["live"]
        assert "first.bias" in live  # frozen, and so without a master
        for key, master in rank[name, stage]["weights"][-1].items():
            assert torch.equal(live[key], master.to(live[key].dtype)), key
            assert torch.equal(live[key], ranks[0][name, stage]["live"][key])


@pytest.mark.parametrize(("name", "stage"), CELLS)
def test_a_probe_sees_the_masters_and_not_what_rounding_leaves_of_them(ranks, name, stage):
    for rank in ranks:
        found = rank[name, stage]
        assert found["probed"].keys() == found["live"].keys()
        for key, master in found["weights"][-1].items():
            assert torch.equal(found["probed"][key], master), key


@pytest.mark.parametrize("stage", STAGES)
def test_a_parameter_whose_rate_is_scaled_to_nothing_does_not_move(ranks, single, stage):
    for seen in (single["scaled"], ranks[0]["scaled", stage]):
        for before, after in zip(seen["before"], seen["weights"], strict=True):
            assert torch.equal(before["second.weight"], after["second.weight"])
            assert not torch.equal(before["third.bias"], after["third.bias"])


@pytest.mark.parametrize(("name", "stage"), CELLS)
def test_whole_tensors_go_back_into_parts_and_nothing_is_left_on_the_optimizer(ranks, name, stage):
    for rank in ranks:
        assert rank[name, stage]["parts come back"] or name == "overflow"  # there a part is not a number
        assert rank[name, stage]["closed"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_deepspeed_skips_moves_nothing_and_later_ones_go_on(ranks, stage):
    for rank in ranks:
        found = rank["overflow", stage]
        assert not all(g.isfinite().all() for g in found["gradients"][2].values())
        assert len(found["gradients"]) == 6
        assert len(found["weights"]) == 5  # nobody acts after an update that did not take place
        for key, before in found["before"][2].items():
            assert torch.equal(before, found["weights"][1][key])
        assert all(w.isfinite().all() for w in found["live"].values())
        for state in found["states"]:
            for values in (state.get("noise", {}), state.get("ratios", {}), state.get("variance", {})):
                assert all(value == value for value in values.values())
    rows = ranks[0]["overflow", stage]["rows"]
    assert rows[2]["noise/nonfinite"] == 1.0
    for metric in ("layer/update_ratio/head.weight", "step/ghost_ratio", "curvature/sharpness", "lr_ratio/head.weight"):
        assert metric in rows[5]
        assert metric not in rows[2]


def zero_trainer(accumulate: int = 1, **config: Any) -> Any:
    """As much of a trainer as a backend looks at before the fit."""
    stock = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    stock.config = config
    return SimpleNamespace(strategy=stock, accumulate_grad_batches=accumulate)


def test_deepspeed_without_zero_is_refused():
    with pytest.raises(MisconfigurationException, match="stage 0"):
        backend_for(zero_trainer(zero_optimization={"stage": 0}), "Somebody")


def test_bfloat16_with_float32_gradients_is_refused_where_deepspeed_has_another_optimizer():
    config = {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}
    with pytest.raises(MisconfigurationException, match="grad_accum_dtype"):
        backend_for(zero_trainer(**config), "Somebody")


def test_lightnings_own_accumulation_is_warned_of():
    with pytest.warns(UserWarning, match="ZeROStrategy takes the same arguments"):
        backend_for(zero_trainer(4, zero_optimization={"stage": 2}), "Somebody")


def test_gradients_before_their_reduction_are_refused():
    backend = backend_for(zero_trainer(zero_optimization={"stage": 2}), "Somebody")
    with pytest.raises(MisconfigurationException, match="local gradients"):
        require(backend, "Somebody", local_gradients="use something else")


def main(folder: str) -> None:
    torch.set_num_threads(1)
    results = {(name, stage): scenario(name, stage) for name, stage in CELLS}
    torch.save(results, Path(folder) / f"{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main(sys.argv[1])

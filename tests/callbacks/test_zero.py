"""What the backend for DeepSpeed ZeRO gives, against a single process on the joined batches.

The file is also the script of two processes, which run every stage one after the other and save what they saw.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from evolute.callbacks.access import Action, OptimizerStep, Stage, attach, backend_for, detach, named_parameters
from tests.conftest import fit
from tests.modules import Mixed, classification_data
from tests.processes import run_pair

STAGES = (1, 2, 3)


class Seen(Callback):
    """The gradient that each optimizer step uses, whole, and the weights after it."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []
        self._action = Action(Stage.OBSERVE, self._after)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._backend = backend_for(trainer, "Seen")
        self._params = named_parameters(pl_module)
        attach(trainer, self._action)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._backend.stepping():
            found = self._backend.whole(self._params, self._backend.gradients(self._params, optimizer))
            self.gradients.append({n: g.clone() for n, g in found.items()})

    def _after(self, step: OptimizerStep) -> None:
        whole = self._backend.whole(self._params, self._backend.weights(self._params))
        self.weights.append({n: w.clone() for n, w in whole.items()})

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        detach(trainer, self._action)


def loader(world: int, micro_batch: int, samples: int = 96) -> DataLoader:
    """Micro-batches of so many samples over all ranks, the same samples whatever their number."""
    data = classification_data(samples)
    mine = DistributedSampler(data, world, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
    return DataLoader(data, batch_size=micro_batch // world, sampler=mine, drop_last=True)


def strategy(stage: int, threshold: int = 0) -> dict[str, Any]:
    """Trainer arguments for two processes under a ZeRO stage; none for one process (stage 0)."""
    from evolute.strategies import CPUDeepSpeedStrategy

    if not stage:
        return {}
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": threshold} if stage == 3 else {})}
    config = {"zero_allow_untested_optimizer": True, "zero_optimization": zero}
    return {"devices": 2, "use_distributed_sampler": False, "strategy": CPUDeepSpeedStrategy(config=config)}


def scenario(name: str, stage: int) -> dict[str, Any]:
    """Run one scenario under a ZeRO stage, or in a single process for stage 0."""
    world = 2 if stage else 1
    options: dict[str, Any] = {"max_steps": 4}
    match name:
        case "accumulated":
            options["accumulate_grad_batches"] = 3
        case "ragged":  # 5 micro-batches an epoch: the last step of each epoch has but one
            options.update(accumulate_grad_batches=2, max_steps=8)
    seen = Seen()
    data = loader(world, 8, 40 if name == "ragged" else 96)
    _, trainer = fit([seen], lambda: Mixed("sgd"), data, **options, **strategy(stage))
    return {"gradients": seen.gradients, "weights": seen.weights, "steps": trainer.global_step}


NAMES = ("plain", "accumulated", "ragged")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of two processes saw, by scenario and stage."""
    return run_pair(__file__, tmp_path_factory.mktemp("zero"), 400)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], rel: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= rel * value.norm().clamp(min=1e-6), name


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", NAMES)
def test_accumulated_gradients_and_steps_are_those_of_one_process(ranks, name, stage):
    single = scenario(name, 0)
    for rank in ranks:
        found = rank[name, stage]
        assert found["steps"] == single["steps"]
        for which in ("gradients", "weights"):
            assert len(found[which]) == len(single[which]) == single["steps"]
            for ours, theirs in zip(found[which], single[which], strict=True):
                assert_close(ours, theirs)


def main(folder: str) -> None:
    torch.set_num_threads(1)
    results = {(name, stage): scenario(name, stage) for stage in STAGES for name in NAMES}
    torch.save(results, Path(folder) / f"{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main(sys.argv[1])

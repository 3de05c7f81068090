"""Every callback under every strategy, precision and accumulation, fresh and resumed: the cells, run and compared.

A cell either works, which means that it ends where a single process on the same global batches ends, or refuses with
the message that ``tests/settings.py`` states. The file is also the script of the two processes that run the cells.
"""

import itertools
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, Subset
from torch.utils.data.distributed import DistributedSampler

from evolute.callbacks.access import backend_for, named_parameters
from tests.conftest import fit
from tests.modules import Mixed, Recorder, classification_data
from tests.settings import MATRIX, Refusal

# An epoch is three whole steps and one of 12 samples, which is measured; a resumed run is stopped just before it.
SAMPLES, GLOBAL_BATCH, STEPS, STOP = 60, 16, 6, 3
LIMITS = {"fp32": (5e-5, 5e-5), "bf16": (0.05, 0.15)}
"""How far a cell may be from one process: weights, over their way since the start, and metrics, relatively."""


LEFT_OVER = ("curvature/residual",)
"""What an iteration leaves when it stops, which rounding decides: compared between lives, not between strategies."""


class Cell(NamedTuple):
    """One entry of the matrix."""

    name: str
    strategy: str
    precision: str
    accumulate: int
    life: str

    def __str__(self) -> str:
        return f"{self.name}-{self.strategy}-{self.precision}-accumulate{self.accumulate}-{self.life}"


FACTORS: dict[str, tuple[Any, ...]] = {
    "name": tuple(MATRIX),
    "strategy": ("single", "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"),
    "precision": ("fp32", "bf16"),
    "accumulate": (1, 4),
    "life": ("fresh", "resumed"),
}


def all_cells() -> list[Cell]:
    """Return every combination, strategy by strategy: what DeepSpeed changes in a process stays changed."""
    return sorted(
        (Cell(*c) for c in itertools.product(*FACTORS.values())), key=lambda c: FACTORS["strategy"].index(c[1])
    )


def pairwise_cells() -> list[Cell]:
    """Return few cells in which every two values of two factors meet at least once: greedily, always the same ones."""

    def pairs(cell: Cell) -> set[Any]:
        return set(itertools.combinations(enumerate(cell), 2))

    cells = all_cells()
    missing = set().union(*map(pairs, cells))
    chosen: list[Cell] = []
    while missing:
        best = max(cells, key=lambda cell: len(pairs(cell) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return [cell for cell in cells if cell in chosen]


def trainer_options(strategy: str, precision: str) -> dict[str, Any]:
    """Return the Trainer's arguments for a strategy and a precision.

    ``bf16`` is mixed precision: autocast over float32 weights in one process and under DDP, and under DeepSpeed its
    own kind, in which the module is bfloat16 and the optimizer steps float32 masters of it.
    """
    options: dict[str, Any] = {"precision": {"fp32": "32-true", "bf16": "bf16-mixed"}[precision]}
    if strategy == "single":
        return options
    options.update(devices=2, use_distributed_sampler=False)
    if strategy == "DDP":
        return {**options, "strategy": "ddp"}
    from evolute.strategies import CPUDeepSpeedStrategy

    stage = int(strategy[-1])
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:  # otherwise parameters as small as these would stay whole on every rank
        zero["stage3_param_persistence_threshold"] = 0
    config = {"zero_allow_untested_optimizer": True, "zero_optimization": zero}
    return {**options, "strategy": CPUDeepSpeedStrategy(config=config)}


def module(policy: bool = False, scene: bool = False) -> Mixed:
    """Return the module of every cell: tied and frozen parameters, two groups; a policy loss or Gaussians if needed.

    A large ``eps`` keeps AdamW from turning the rounding of a gradient near zero into a step of full length. The
    weights start as bfloat16 numbers, because DeepSpeed rounds them before it makes its masters.
    """
    made = Mixed(eps=1e-4, policy=policy)
    if scene:
        made.become_scene()
    for p in made.parameters():
        p.data = p.data.bfloat16().float()
    return made


def refusal_of(cell: Cell) -> Refusal | None:
    """Return what the settings say of a cell that refuses, None of one that works."""
    stated = [r for r in MATRIX[cell.name].refuses if all(getattr(cell, k) in r.values(k) for k in r.where)]
    return stated[0] if stated else None


class End(Callback):
    """The trained weights, whole, at the end of training; and a checkpoint, if there is a place for it."""

    def __init__(self, checkpoint: Path | None = None) -> None:
        self.checkpoint = checkpoint
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        backend, params = backend_for(trainer, "End"), named_parameters(pl_module)
        whole = backend.whole(params, backend.weights(params))
        # A parametrization keeps the weight under a name of its own.
        self.weights = {n.replace(".parametrizations.weight.original", ".weight"): w.clone() for n, w in whole.items()}
        if self.checkpoint is not None:
            trainer.save_checkpoint(self.checkpoint, weights_only=False)


class Rest(DataLoader):
    """A loader whose first epoch begins where an earlier run stopped."""

    skip = 0

    def __iter__(self) -> Iterator[Any]:
        skip, self.skip = self.skip, 0
        return itertools.islice(super().__iter__(), skip, None)


def train(cell: Cell, steps: int, save: Path | None = None, resume: Path | None = None) -> dict[str, Any]:
    """Fit once; return the final weights and, on rank 0, what was recorded."""
    world = 1 if cell.strategy == "single" else 2
    data = classification_data(SAMPLES)
    mine = list(DistributedSampler(data, world, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False))
    loader = Rest(Subset(data, mine), batch_size=GLOBAL_BATCH // world // cell.accumulate)
    loader.skip = 0 if resume is None else STOP * cell.accumulate
    recorder, end = Recorder(), End(save)
    setting = MATRIX[cell.name]
    fit(
        [setting.make(**setting.everywhere), end],
        partial(module, setting.policy, setting.scene),
        loader,
        ckpt_path=None if resume is None else str(resume),
        max_steps=steps,
        accumulate_grad_batches=cell.accumulate,
        gradient_clip_val=0.2,
        logger=recorder,
        log_every_n_steps=1000,
        **trainer_options(cell.strategy, cell.precision),
    )
    return {"weights": end.weights, "rows": recorder.rows}


def run_cell(cell: Cell, folder: Path) -> dict[str, Any]:
    """Run a cell; return weights and rows, or the message it refused with."""
    try:
        if cell.life == "fresh":
            return train(cell, STEPS)
        checkpoint = folder / f"{cell}.ckpt"
        first = train(cell, STOP, save=checkpoint)
        second = train(cell, STEPS, resume=checkpoint)
        return {"weights": second["weights"], "rows": {**first["rows"], **second["rows"]}}
    except MisconfigurationException as refusal:
        return {"refused": str(refusal)}


def deviations(found: dict[str, Any], reference: dict[str, Any], start: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield how far weights and metrics are from the reference's; a metric that only one has is not a number away.

    A weight's distance is over its way since the start. A metric's is over the largest value of its kind in the run,
    over layers and steps, because some pass through zero: the trace, what is left of a signal.
    """
    for name, w in reference["weights"].items():
        began = start.get(name)
        way = w - began if began is not None and w.shape == began.shape else w  # it was added, or rows of it
        yield name, float((found["weights"][name] - w).norm() / way.norm())
    ours, theirs = _values(found), _values(reference)
    largest: dict[str, float] = {}
    for (metric, _), value in theirs.items():
        largest[_kind(metric)] = max(largest.get(_kind(metric), 1e-12), abs(value))
    for metric, step in {**theirs, **ours}:
        apart = abs(ours.get((metric, step), float("nan")) - theirs.get((metric, step), float("nan")))
        yield f"{metric} at {step}", apart / largest.get(_kind(metric), 1.0)


def _values(result: dict[str, Any]) -> dict[tuple[str, int], float]:
    """Return all that was recorded but clock times, by metric and step."""
    return {(m, step): v for step, row in result["rows"].items() for m, v in row.items() if "time" not in m}


def _kind(metric: str) -> str:
    return "/".join(metric.split("/")[:2]) if metric.count("/") > 1 else metric


def main(folder: str, which: str) -> None:
    """Run the cells that need two processes, and the uninterrupted runs of those that are resumed."""
    torch.set_num_threads(1)
    chosen = {"all": all_cells, "pairwise": pairwise_cells}[which]()
    needed = {*chosen, *(cell._replace(life="fresh") for cell in chosen)}
    results: dict[Any, Any] = {}
    for cell in all_cells():
        if cell in needed and cell.strategy != "single":
            print(cell, flush=True)  # the last one in the log of a pair that failed
            results[tuple(cell)] = run_cell(cell, Path(folder))
    torch.save(results, Path(folder) / f"{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])

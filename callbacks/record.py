"""Where measurements go: every logger, ``callback_metrics``, and the run folder, at the step they were made."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor


def record(trainer: L.Trainer, prefix: str, values: Mapping[str, Tensor | float], step: int) -> dict[str, float]:
    """Send scalars to every logger at optimizer step ``step``, whatever ``log_every_n_steps`` is.

    ``LightningModule.log`` would drop what falls between two logging steps and file the rest under a later step.
    All tensors travel to the host in one transfer.

    Args:
        trainer: the running trainer.
        prefix: first part of the metric names, ``curvature`` in ``curvature/sharpness``.
        values: scalars by name. A non-finite value is recorded as such; it is a fact of the run.
        step: optimizer step of the measurement, from 0.

    Returns:
        The values as floats, under their full names.
    """
    scalars = {f"{prefix}/{name}": value for name, value in values.items()}
    tensors = {name: v for name, v in scalars.items() if isinstance(v, Tensor)}
    if tensors:
        host = torch.stack([v.detach().double().reshape(()) for v in tensors.values()]).tolist()
        scalars.update(zip(tensors, host, strict=True))
    floats = {name: float(value) for name, value in scalars.items()}
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in floats.items()})
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(floats, step=step)
    return floats


def record_arrays(trainer: L.Trainer, prefix: str, arrays: Mapping[str, Tensor], step: int) -> None:
    """Write arrays to ``arrays/<prefix>/<step>.npz`` of the run folder, on rank 0; nothing if no logger has one."""
    folder = run_folder(trainer)
    if not trainer.is_global_zero or folder is None:
        return
    path = folder / "arrays" / prefix / f"{step:08d}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    host: dict[str, Any] = {name: a.detach().cpu().numpy() for name, a in arrays.items()}
    part = path.with_name(path.name + ".part")  # whole or absent, should the run be killed
    with part.open("wb") as file:
        np.savez(file, **host)
    part.replace(path)


def run_folder(trainer: L.Trainer) -> Path | None:
    """Return the folder where the run's ``metrics.csv`` is, else the first that a logger writes to, else None."""
    folders = [Path(f) for logger in trainer.loggers for f in (logger.log_dir, logger.save_dir) if f]
    return next((f for f in folders if (f / "metrics.csv").is_file()), folders[0] if folders else None)


def finite(values: Mapping[str, float]) -> bool:
    """Say whether every value is finite: a callback updates its state only then."""
    return all(math.isfinite(value) for value in values.values())

"""Checkpoints that a run resumes from exactly: same batches, same randomness, same rows in the log."""

import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from evolute.callbacks.metrics_csv import MetricsCSV

_KEY = "evolute"


class RunCheckpoint(Callback):
    """Save everything a run needs to go on as if it had not been interrupted.

    Stock Lightning saves inside a step (before its validation, its log row, its epoch end), keeps no random state, and
    after a resume replays the epoch's batches and shifts its step counters. This callback saves at the *start* of the
    next batch, when all that belongs to the step is done, and puts a resumed run back to that very point: random
    states of Python, NumPy, torch and CUDA on every rank, loop counters, and the rows of :class:`MetricsCSV`. With a
    data module that knows its position the next batch is the next batch. A checkpoint is written
    beside its name and moved there whole. Under DeepSpeed it is a directory, to which every process writes its own
    pieces; :func:`evolute.callbacks.zero_checkpoint.load_checkpoint` reads it as if one process had written it.

    Put it first among the callbacks, so that no other one acts on the next batch before the state is saved.

    Args:
        every_n_steps: optimizer steps between two checkpoints; the end of training is always saved.
        keep: newest checkpoints to keep.
        folder: where, relative to ``trainer.default_root_dir``.

    Raises:
        MisconfigurationException: if ``every_n_steps`` or ``keep`` is below 1.
    """

    def __init__(self, every_n_steps: int = 100, keep: int = 2, folder: str = "checkpoints") -> None:
        if every_n_steps < 1:
            raise MisconfigurationException(f"RunCheckpoint(every_n_steps={every_n_steps}): must be at least 1")
        if keep < 1:
            raise MisconfigurationException(f"RunCheckpoint(keep={keep}): must be at least 1")
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.folder = folder
        self._at_batch_start = False
        self._saved_step = -1
        self._restore: dict[str, Any] | None = None

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._restore is not None:
            self._put_back(trainer, self._restore)
            self._restore = None
            return
        if trainer.global_step % self.every_n_steps == 0:
            self.save_at_batch_start(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step and trainer.global_step != self._saved_step:
            self.save(trainer)

    def save_at_batch_start(self, trainer: L.Trainer) -> None:
        """Save what training has done so far, unless it is saved already; for ``on_train_batch_start`` alone."""
        if trainer.global_step and trainer.global_step != self._saved_step:
            self._at_batch_start = True
            self.save(trainer)
            self._at_batch_start = False

    def save(self, trainer: L.Trainer) -> Path:
        """Write a checkpoint of the current step, whole or not at all, and drop the oldest ones."""
        folder = Path(trainer.default_root_dir) / self.folder
        path = folder / f"step={trainer.global_step:08d}.ckpt"
        temporary = path.with_suffix(".tmp")
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.flush()
        if trainer.is_global_zero:
            _remove(temporary)  # of a killed process: its pieces must not get among ours
        trainer.strategy.barrier()
        trainer.save_checkpoint(temporary, weights_only=False)
        if trainer.local_rank == 0:
            _to_disk(temporary)  # a machine that loses power must not be left with the name and not the content
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            if path.is_dir() or temporary.is_dir():  # which replace nothing
                _remove(path)
            os.replace(temporary, path)
            for old in checkpoints(folder)[: -self.keep]:
                _remove(old)
        trainer.strategy.barrier()
        self._saved_step = trainer.global_step
        return path

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        epoch_loop = trainer.fit_loop.epoch_loop
        checkpoint[_KEY] = {
            "module": module_path(pl_module),
            "random": _gathered(trainer, _random_state()),
            "log_step": epoch_loop._batches_that_stepped,
            "progress": {name: p.state_dict() for name, p in _progress(trainer).items()}
            if self._at_batch_start
            else None,
        }

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get(_KEY)
        if saved is None:
            raise MisconfigurationException(
                "this checkpoint was not written by RunCheckpoint, so the run cannot be continued exactly; "
                "load its weights instead"
            )
        self._restore = saved
        self._saved_step = int(checkpoint["global_step"])

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Not when the checkpoint is loaded: the run may still be refused, or be finished, and then nothing changes.
        if self._restore is None:
            return
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.rewind(self._restore["log_step"])
        if trainer.is_global_zero:
            _forget(Path(trainer.default_root_dir), self.folder, self._restore["log_step"])

    def _put_back(self, trainer: L.Trainer, saved: dict[str, Any]) -> None:
        """Make counters and generators what they were when the checkpoint was made, at this same hook."""
        trainer.fit_loop.epoch_loop._batches_that_stepped = saved["log_step"]
        if saved["progress"] is not None:
            for name, progress in _progress(trainer).items():
                progress.load_state_dict(saved["progress"][name])
        if len(saved["random"]) == trainer.world_size:
            _set_random_state(saved["random"][trainer.global_rank])


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the whole checkpoints of a folder, oldest first."""
    found = [p for p in Path(folder).glob("step=*.ckpt") if re.fullmatch(r"step=\d+\.ckpt", p.name)]
    return sorted(found, key=lambda p: int(p.stem.split("=")[1]))


def _to_disk(path: Path) -> None:
    """Wait until the content of a file, or of the files in a folder, is on the disk."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def _remove(path: Path) -> None:
    """Remove a file or a folder, which loses its name before the first of its files."""
    if path.is_dir():
        nameless = path.with_suffix(".old.tmp")
        shutil.rmtree(nameless, ignore_errors=True)
        path.rename(nameless)
        shutil.rmtree(nameless)
    else:
        path.unlink(missing_ok=True)


def _forget(run: Path, folder: str, step: int) -> None:
    """Remove what a killed process left behind: half a checkpoint, and arrays of steps that will be taken again."""
    for half in (run / folder).glob("*.tmp"):
        _remove(half)
    for arrays in (run / "arrays").rglob("*.npz"):
        if arrays.stem.isdigit() and int(arrays.stem) >= step:
            arrays.unlink()


def module_path(module: L.LightningModule) -> str:
    """Return the import path of a module's class: what a checkpoint says it belongs to."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _progress(trainer: L.Trainer) -> dict[str, Any]:
    loop = trainer.fit_loop.epoch_loop
    return {
        "batch": loop.batch_progress,
        "scheduler": loop.scheduler_progress,
        "optimizer": loop.automatic_optimization.optim_progress,
        "manual": loop.manual_optimization.optim_step_progress,
        "validation": loop.val_loop.batch_progress,
    }


def _random_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, cached = np.random.get_state()
    assert not isinstance(keys, int)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def _gathered(trainer: L.Trainer, state: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every rank's state, in order: a checkpoint is written by one of them."""
    if trainer.world_size == 1:
        return [state]
    states: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(states, state)
    return states

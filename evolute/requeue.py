"""A run that makes room: saved at the next batch, then left, to be started again."""

import contextlib
import signal
import traceback
from collections.abc import Callable, Generator
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch.utils.data._utils import signal_handling
from typing_extensions import override

from evolute.callbacks import RunCheckpoint


class Interrupted(Exception):
    """The run was told to stop and can be continued."""


@contextlib.contextmanager
def interruptible(told: Callable[[], bool]) -> Generator[None]:
    """Take any error of a run that was told to stop for an interruption, and show its traceback.

    SLURM signals all processes of a step; one that the run depends on may end before the run has stopped.

    Raises:
        Interrupted: instead of the error.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, Interrupted) or not told():
            raise
        traceback.print_exc()
        raise Interrupted(f"told to stop, failed before it was saved ({type(error).__name__})") from error


class StopWhenTold(Callback):
    """Save and leave training once any rank was told to stop.

    Signals reach the ranks at different steps, so they vote: one boolean, reduced over the ranks before each optimizer
    step. All leave at the same one, at the start of its first batch, where :class:`RunCheckpoint` saves exactly.
    Put it next to that callback, ahead of all others.

    Args:
        checkpoint: what saves.
        told: says whether this process was told to stop.

    Raises:
        Interrupted: out of ``Trainer.fit``, when everything is saved.
    """

    def __init__(self, checkpoint: RunCheckpoint, told: Callable[[], bool]) -> None:
        self.checkpoint = checkpoint
        self.told = told
        self._voted_at = -1
        self._unshield = _nothing

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Lightning's own handler of SIGTERM calls a collective from within the handler, while the other ranks may be
        # in another one, and makes the run stop where no exact checkpoint can be written.
        trainer._signal_connector.register_signal_handlers = _nothing
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # nor what it sets: ours is the vote
        self._unshield = shield_loader_workers()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._unshield()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._unshield()

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._voted_at:  # within an accumulation window, whose gradient no checkpoint holds
            return
        self._voted_at = step
        if trainer.strategy.reduce_boolean_decision(self.told(), all=False):
            self.checkpoint.save_at_batch_start(trainer)
            raise Interrupted(f"told to stop, saved at step {step}")


def shield_loader_workers() -> Callable[[], None]:
    """Keep SIGTERM from the workers that data loaders start from now on; SLURM sends it to them as well.

    They would die of it, and the run with them, before it can save. Workers end by a message from their loader, or when
    this process is gone; torch sends them SIGTERM only if that took too long.

    Returns:
        A function that undoes it.
    """
    handlers: Any = signal_handling
    set_handlers = handlers._set_worker_signal_handlers

    def shielded(*args: Any) -> None:
        set_handlers(*args)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def undo() -> None:
        handlers._set_worker_signal_handlers = set_handlers

    handlers._set_worker_signal_handlers = shielded
    return undo


def _nothing() -> None:
    """Stand in for what is not to be done."""

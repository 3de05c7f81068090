"""A run that makes room: saved at the next batch, then left, to be started again."""

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from evolute.callbacks import RunCheckpoint


class Interrupted(Exception):
    """The run was told to stop and can be continued; ``step`` optimizer steps are saved."""

    def __init__(self, step: int) -> None:
        super().__init__(f"told to stop, saved at step {step}")
        self.step = step


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

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Lightning's own handler of SIGTERM calls a collective from within the handler, while the other ranks may be
        # in another one, and makes the run stop where no exact checkpoint can be written.
        trainer._signal_connector.register_signal_handlers = lambda: None

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
            raise Interrupted(step)

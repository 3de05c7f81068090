"""When a callback measures, and what that costs."""

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException


class Pace:
    """The cadence of one monitor: every so many optimizer steps, less often if it would cost too much.

    It counts optimizer steps itself (``trainer.global_step`` is moved only after them) and decides one step ahead,
    since some measurements begin a step early. With a budget, a measurement that is due is put off by another
    ``every_n_steps`` while the time already spent exceeds ``budget`` times the wall-clock of the fit; rank 0 decides
    and tells the others. Without one the cadence depends on the step alone.

    Call :meth:`begin` in ``on_train_start``, :meth:`open` in ``on_before_optimizer_step`` and :meth:`close` once the
    step is done and measured.

    Args:
        who: the callback's name, for messages.
        every_n_steps: optimizer steps between two measurements; step 0 is measured.
        budget: largest share of wall-clock to spend, in (0, 1]; None for no limit.

    Attributes:
        step: the optimizer step under way, or the next one between two steps, from 0.
        now: whether it is measured.
        soon: whether the one after it is measured.

    Raises:
        MisconfigurationException: if ``every_n_steps`` is below 1 or ``budget`` outside (0, 1].
    """

    def __init__(self, who: str, every_n_steps: int, budget: float | None = None) -> None:
        if every_n_steps < 1:
            raise MisconfigurationException(f"{who}(every_n_steps={every_n_steps}): must be at least 1")
        if budget is not None and not 0.0 < budget <= 1.0:
            raise MisconfigurationException(f"{who}(budget={budget}): a share of wall-clock, in (0, 1], or None")
        self.every_n_steps = every_n_steps
        self.budget = budget
        self.step = 0
        self.now = False
        self.soon = False
        self._begun = False
        self._opened = False
        self._next = 0
        self._spent = 0.0
        self._elapsed_before = 0.0
        self._started: float | None = None
        self._unrecorded = 0.0

    def begin(self, trainer: L.Trainer) -> None:
        """Start the clock; decide about the first two steps, unless a checkpoint already did."""
        self._started = time.perf_counter()
        if not self._begun:
            self.now, self.soon = self._due(trainer, 0), self._due(trainer, 1)
        self._begun = True

    def open(self, trainer: L.Trainer) -> None:
        """Note that the update of step ``step`` is about to happen."""
        if self._opened:  # the step before was skipped (a gradient scaler does that), so nobody closed it
            self.close(trainer)
        self._opened = True

    def close(self, trainer: L.Trainer) -> None:
        """Go on to the next step."""
        self._opened = False
        self.step += 1
        self.now, self.soon = self.soon, self._due(trainer, self.step + 1)

    def wanted(self, step: int) -> bool:
        """Say whether ``step``, the one under way or the one after it, is measured."""
        return self.now if step == self.step else self.soon

    def _due(self, trainer: L.Trainer, step: int) -> bool:
        if step < self._next:
            return False
        self._next = step + self.every_n_steps - step % self.every_n_steps
        return self.affordable(trainer)

    def affordable(self, trainer: L.Trainer) -> bool:
        """Say whether the budget allows a measurement now; all ranks hear what rank 0 finds."""
        if self.budget is None:
            return True
        within = self._spent <= self.budget * self._elapsed()
        return bool(trainer.strategy.broadcast(within)) if trainer.world_size > 1 else within

    @contextmanager
    def timed(self) -> Generator[None]:
        """Count the time of the block as spent."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            self._spent += seconds
            self._unrecorded += seconds

    def time_ms(self) -> float:
        """Return the milliseconds spent since the last call: the value of ``<name>/time_ms``."""
        spent, self._unrecorded = self._unrecorded, 0.0
        return 1e3 * spent

    def _elapsed(self) -> float:
        return self._elapsed_before + (time.perf_counter() - self._started if self._started is not None else 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the step, the decisions taken about it and the next, and the clock."""
        counters = {"step": self.step, "now": self.now, "soon": self.soon, "begun": self._begun, "opened": self._opened}
        return {**counters, "next": self._next, "spent": self._spent, "elapsed": self._elapsed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the checkpoint was made."""
        self.step, self.now, self.soon = state["step"], state["now"], state["soon"]
        self._begun, self._opened, self._next = state["begun"], state["opened"], state["next"]
        self._spent, self._elapsed_before = state["spent"], state["elapsed"]

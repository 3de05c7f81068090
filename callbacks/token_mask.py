"""What the callbacks that take tokens out of a policy loss have in common."""

from abc import ABC, abstractmethod
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from evolute.callbacks.access import (
    Action,
    OptimizerStep,
    Stage,
    TokenCall,
    TokenDoor,
    attach,
    attach_mask,
    backend_for,
    detach,
    detach_mask,
    gather_rows,
    recover,
)
from evolute.callbacks.pace import Pace
from evolute.callbacks.record import record

Denominator = Literal["kept", "original"]
REJECTED, SIGN, SEQUENCE, EMPTIED = range(4)
"""Columns of what is noted of every token that could be rejected: whether it was; the sign of its advantage; its part
of its sequence; and of its sequence if that lost all its tokens."""


class TokenMask(Callback, ABC):
    """Takes tokens out of a policy loss before it is reduced. A subclass says which, in :meth:`wanted`.

    Tokens with an advantage of 0 have no gradient; they are neither rejected nor counted. A micro-batch's decision is
    made once, in its first forward pass, and replayed by whatever evaluates its loss again.

    Args:
        denominator: ``"kept"`` averages the loss over the tokens that are left, ``"original"`` over all, so that
            rejecting never weighs the others more.
        start_step: first optimizer step that is acted on; before it, only recorded.
        dry_run: decide and record, change nothing.

    Raises:
        MisconfigurationException: if a value is out of range, the module has no policy loss or optimises manually, or
            the strategy is unknown.
    """

    prefix = "mask"
    order = 0
    columns = 4

    def __init__(self, denominator: Denominator = "kept", start_step: int = 0, dry_run: bool = False) -> None:
        who = type(self).__name__
        if denominator not in ("kept", "original"):
            raise MisconfigurationException(f"{who}(denominator={denominator!r}): 'kept' or 'original'")
        if start_step < 0:
            raise MisconfigurationException(f"{who}(start_step={start_step}): must be at least 0")
        self.denominator: Denominator = denominator
        self.start_step = start_step
        self.dry_run = dry_run
        self._pace = Pace(who, 1)
        self._action = Action(Stage.OBSERVE, self._stepped)
        self._steps_seen = 0
        self._noted: list[Tensor] = []
        self._door: TokenDoor | None = None

    @property
    def acting(self) -> bool:
        """Whether tokens are really taken out at this step."""
        return not self.dry_run and self._steps_seen >= self.start_step

    @abstractmethod
    def wanted(self, call: TokenCall, rows: Tensor) -> Tensor:
        """Return which of the tokens ``rows`` [n], counted along B T, to reject [n]."""

    def extra(self) -> Tensor | None:
        """Return further columns [n, c] about the tokens of the last :meth:`wanted`."""
        return None

    def summary(self, noted: Tensor) -> dict[str, Tensor | float]:
        """Return what to record of a step, from the columns of all its tokens on all ranks [n, 4 + c]."""
        count = max(1, len(noted))
        rejected, sign = noted[:, REJECTED], noted[:, SIGN]
        values: dict[str, Tensor | float] = {
            "reject_frac": rejected.sum() / count,
            "tokens": float(len(noted)),
            "seq_all_rejected": noted[:, EMPTIED].sum() / noted[:, SEQUENCE].sum().clamp(min=1),
        }
        for name, side in (("pos", sign > 0), ("neg", sign < 0)):
            values[f"reject_frac_{name}_adv"] = rejected[side].sum() / side.sum().clamp(min=1)
        return values

    def finish(self, trainer: L.Trainer) -> None:
        """Act on a whole step, after the optimizer's; collective over ranks."""

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(self).__name__} counts the steps of automatic optimisation, and {type(pl_module).__name__} "
                "optimises manually"
            )
        self._backend = backend_for(trainer, type(self).__name__)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trainer = trainer
        self._noted = []
        self._door = attach_mask(trainer, self)
        attach(trainer, self._action)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._door is not None:
            self._door.begin(batch)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._door is not None:
            self._door.end()

    def choose(self, call: TokenCall) -> Tensor:
        """Return the tokens to keep [B, T], and note what is recorded of them."""
        with self._pace.timed():
            counted = (call.mask & (call.advantages != 0)).flatten()
            rows = counted.nonzero().flatten()
            rejected = self.wanted(call, rows) if len(rows) else torch.zeros_like(rows, dtype=torch.bool)
            kept = torch.ones_like(counted).index_fill_(0, rows[rejected], False).view(call.mask.shape)
            self._note(call, rows, rejected)
            return kept

    def _note(self, call: TokenCall, rows: Tensor, rejected: Tensor) -> None:
        sequence = rows // call.mask.shape[1]
        sizes = sequence.bincount(minlength=len(call.mask))
        lost = sequence[rejected].bincount(minlength=len(call.mask))
        part = 1.0 / sizes[sequence].double()
        advantage = call.advantages.flatten()[rows].double()
        columns = [rejected.double(), advantage.sign(), part, part * (lost == sizes)[sequence]]
        extra = self.extra() if len(rows) else None
        noted = torch.stack(columns, dim=1)
        if self.columns > len(columns):
            more = noted.new_zeros(len(rows), self.columns - len(columns)) if extra is None else extra.double()
            noted = torch.cat([noted, more], dim=1)
        self._noted.append(noted)

    def settled(self, call: TokenCall, kept: Tensor) -> None:
        """Hear which tokens [B, T] all masks together kept."""

    def probed(self, call: TokenCall) -> None:
        """Hear of a call of the loss in a probe."""

    def _stepped(self, step: OptimizerStep) -> None:
        with self._pace.timed():
            device = self._noted[0].device if self._noted else torch.device("cpu")
            noted = torch.cat(self._noted) if self._noted else torch.zeros(0, self.columns, dtype=torch.float64)
            self._noted = []
            self.finish(self._trainer)
            values = self.summary(gather_rows(noted.to(device), self._trainer))
            if self._door is not None:
                self._door.stepped()
        record(self._trainer, self.prefix, {**values, "time_ms": self._pace.time_ms()}, self._steps_seen)
        self._steps_seen += 1

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        recover(trainer)
        detach_mask(trainer, self)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        detach(trainer, self._action)
        detach_mask(trainer, self)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps_seen": self._steps_seen}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps_seen = state_dict["steps_seen"]

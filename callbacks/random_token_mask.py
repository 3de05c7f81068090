"""Take tokens at random out of a policy loss: the control of every method that chooses them."""

from typing import Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from evolute.callbacks.access import TokenCall
from evolute.callbacks.token_mask import Denominator, TokenMask


class RandomTokenMask(TokenMask):
    """Reject tokens of a policy loss at random, at a given rate.

    What a method gains by rejecting tokens may be due to which ones it rejects, or to the smaller step alone; this
    control has the second without the first. The choice depends on seed, step, micro-batch and rank only, so a resumed
    run repeats it.

    Example::

        Trainer(callbacks=[CAPO(dry_run=True), RandomTokenMask("capo")])

    Args:
        rate: share of tokens to reject, in [0, 1); ``"capo"`` rejects in every micro-batch as many as the
            :class:`CAPO` of the same Trainer would, which should then run with ``dry_run=True``.
        seed: of the choice.
        denominator: see :class:`TokenMask`, as are the others.
        start_step: first step that is acted on.
        dry_run: decide and record, change nothing.

    Raises:
        MisconfigurationException: as :class:`TokenMask` does, and if the rate is outside [0, 1).
    """

    prefix = "random_mask"
    order = 1

    def __init__(
        self,
        rate: float | Literal["capo"],
        seed: int = 0,
        denominator: Denominator = "kept",
        start_step: int = 0,
        dry_run: bool = False,
    ) -> None:
        super().__init__(denominator, start_step, dry_run)
        if rate != "capo" and (isinstance(rate, str) or not 0.0 <= rate < 1.0):
            raise MisconfigurationException(f"RandomTokenMask(rate={rate!r}): a share in [0, 1), or 'capo'")
        self.rate = rate
        self.seed = seed

    def wanted(self, call: TokenCall, rows: Tensor) -> Tensor:
        """Return a random choice among the tokens."""
        mixed = (self.seed, self._steps_seen, call.micro_batch, self._trainer.global_rank)
        generator = torch.Generator().manual_seed(hash(mixed) % 2**63)  # integers hash alike in every process
        drawn = torch.rand(len(rows), generator=generator).to(rows.device)
        if isinstance(self.rate, float | int):
            return drawn < self.rate
        if "CAPO" not in call.proposals:
            raise MisconfigurationException("RandomTokenMask(rate='capo') needs a CAPO(dry_run=True) beside it")
        count = int((~call.proposals["CAPO"]).sum())
        return torch.zeros_like(rows, dtype=torch.bool).index_fill_(0, drawn.argsort()[:count], True)

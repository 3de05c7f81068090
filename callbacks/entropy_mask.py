"""Take tokens out of a policy loss by the entropy of the policy at them."""

from typing import Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from evolute.callbacks.access import TokenCall
from evolute.callbacks.token_mask import Denominator, TokenMask


class EntropyMask(TokenMask):
    """Reject the tokens at which the policy is surest, or least sure.

    ``EntropyMask(0.8)`` keeps the fifth of the tokens with the highest entropy (arXiv 2506.01939; TRL's
    ``top_entropy_quantile=0.2``); the other way round it is close to what :class:`CAPO` does, without its arithmetic.

    Args:
        quantile: share of the tokens of a micro-batch to reject, in [0, 1).
        reject: ``"low"`` or ``"high"`` entropy.
        denominator: see :class:`TokenMask`, as are the others.
        start_step: first step that is acted on.
        dry_run: decide and record, change nothing.

    Raises:
        MisconfigurationException: as :class:`TokenMask` does, and if the quantile is outside [0, 1).
    """

    prefix = "entropy_mask"

    def __init__(
        self,
        quantile: float = 0.8,
        reject: Literal["low", "high"] = "low",
        denominator: Denominator = "kept",
        start_step: int = 0,
        dry_run: bool = False,
    ) -> None:
        super().__init__(denominator, start_step, dry_run)
        if not 0.0 <= quantile < 1.0:
            raise MisconfigurationException(f"EntropyMask(quantile={quantile}): a share in [0, 1)")
        if reject not in ("low", "high"):
            raise MisconfigurationException(f"EntropyMask(reject={reject!r}): 'low' or 'high'")
        self.quantile = quantile
        self.reject = reject

    def wanted(self, call: TokenCall, rows: Tensor) -> Tensor:
        """Return the tokens on the wrong side of the quantile."""
        entropy = torch.cat([torch.special.entr(z.softmax(-1)).sum(-1) for _, z in call.logits(rows)])
        order = entropy.argsort(descending=self.reject == "high", stable=True)
        count = int(self.quantile * len(rows))
        return torch.zeros_like(rows, dtype=torch.bool).index_fill_(0, order[:count], True)

"""How far a step really moved a policy, beside what was predicted."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from evolute.callbacks.access import Backend, TokenCall, gather_rows, probing
from evolute.geometry import predicted_shifts


class RealizedKL:
    """Evaluates a micro-batch's policy once more after the step, and compares.

    The first call of the loss in which a step is decided is remembered: the candidates of its tokens, with their
    probabilities. After the step a probe runs the batch again, and its hook brings the new ones.
    """

    def __init__(self) -> None:
        self._before: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._divergence: Tensor | None = None

    def remember(self, rows: Tensor, ids: Tensor, probs: Tensor, policy: Tensor) -> None:
        """Keep tokens, counted along B T [n], candidates and probabilities [n, k], predicted shifts [n]."""
        self._before = (rows, ids, probs, policy)

    def hear(self, call: TokenCall) -> None:
        """Compare the probabilities in a call of the loss with those remembered."""
        if self._before is None:
            return
        rows, ids, probs, _ = self._before
        if not len(rows) or call.actions.numel() <= int(rows.max()):
            return
        parts, begin = [], 0
        for some, z in call.logits(rows):
            here = slice(begin, begin + len(some))
            moved = z.gather(-1, ids[here]).log_softmax(-1) - probs[here].log()
            any_action, one = torch.zeros_like(some), torch.ones_like(moved[:, 0])
            parts.append(predicted_shifts(moved.nan_to_num(), probs[here], any_action, one).kl)
            begin += len(some)
        self._divergence = torch.cat(parts)

    def measure(
        self, trainer: L.Trainer, module: L.LightningModule, backend: Backend, batch: Any, batch_idx: int
    ) -> dict[str, Tensor]:
        """Return the mean KL(old || new) over the tokens remembered, nats, and its rank correlation with the shifts."""
        remembered = self._before
        self._divergence = None
        with probing(trainer, module, backend, batch, batch_idx) as probe, torch.no_grad():
            probe.loss()
        self._before = None
        found = torch.zeros(0, 2)
        if remembered is not None and self._divergence is not None:
            found = torch.stack([self._divergence.double(), remembered[3].double()], dim=1)
        found = gather_rows(found, trainer)
        if len(found) < 3:
            return {}
        ranks = found.argsort(dim=0, stable=True).argsort(dim=0, stable=True).double().T
        return {"realized_kl": found[:, 0].mean(), "realized_rank_corr": torch.corrcoef(ranks)[0, 1]}

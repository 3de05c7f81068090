"""What CAPO has to know of the head of a policy: that it is linear, and how its optimizer moves it."""

from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from evolute.callbacks.access import Backend, TokenCall


class Rate(NamedTuple):
    """How the optimizer of a head moves it: learning rate, Adam's decays and damping."""

    lr: float
    betas: tuple[float, float]
    eps: float


class HeadReader:
    """Reads the head behind a loss over tokens.

    Args:
        trainer: whose optimizers move it.
        backend: of the trainer's strategy.
    """

    def __init__(self, trainer: L.Trainer, backend: Backend) -> None:
        self._trainer, self._backend = trainer, backend
        self._checked = False

    def rate(self, call: TokenCall) -> Rate:
        """Return the rate of the parameter group that owns the head; of the first group if none does."""
        weight = getattr(call.arguments.get("head"), "weight", None)
        groups = [group for optimizer in self._trainer.optimizers for group in self._backend.groups(optimizer)]
        owners = [group for group, params in groups if any(p is weight for p in params)]
        group: dict[str, Any] = owners[0] if owners else groups[0][0]
        beta1, beta2 = group.get("betas", (0.9, 0.999))
        return Rate(float(group["lr"]), (float(beta1), float(beta2)), float(group.get("eps", 1e-8)))

    def check(self, call: TokenCall, rows: Tensor) -> None:
        """Look once at how the loss is called.

        Raises:
            MisconfigurationException: if it is not given hidden states, if the head is not linear, or if the logits
                are not what the head makes of the hidden states.
        """
        if self._checked:
            return
        if call.arguments.get("hidden") is None:
            raise MisconfigurationException(
                f"CAPO needs the inputs of the head: call {type(call.loss).__name__} with hidden=..., the hidden "
                "states [B, T, H] at the positions that predict the actions, besides logits=..."
            )
        head = call.arguments.get("head")
        if head is not None and not bool(call.hidden(rows[:1]).isfinite().all()):
            return  # another call will tell
        self._checked = True
        if head is None:
            return
        self._check_linear(call, rows[:1])
        self._say_what_is_a_proxy(head)

    def _check_linear(self, call: TokenCall, row: Tensor) -> None:
        hidden = call.hidden(row)
        # Far enough out for a softcap to bend, and by a power of two: a linear head is doubled to the last bit.
        zero, once, twice = self._wide(call.scores(torch.cat([0 * hidden, 16 * hidden, 32 * hidden])))
        bent = (twice - zero) - 2 * (once - zero)
        if not bool(bent.abs().max() <= 0.05 * (once - zero).abs().max() + 1e-30):
            raise MisconfigurationException(
                f"CAPO models a linear head, and {type(call.arguments['head']).__name__} is not linear in its input "
                "(a softcap, a norm or an activation in it?): give the linear layer alone as head=..."
            )
        given = call.arguments.get("logits")
        if given is None:
            return
        made = self._wide(call.scores(hidden))
        found = self._wide(given.detach().flatten(0, 1)[row])
        if not bool((found - made).abs().max() <= 0.05 * made.abs().max() + 1e-30):
            raise MisconfigurationException(
                "CAPO: the logits are not what the head makes of the hidden states at the same positions; hidden "
                "states one position off, or a scale or softcap after the head?"
            )

    @staticmethod
    def _wide(scores: Tensor) -> Tensor:
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def _say_what_is_a_proxy(self, head: nn.Module) -> None:
        weight = getattr(head, "weight", None)
        module = self._trainer.lightning_module
        others = [m for m in module.modules() if m is not head and getattr(m, "weight", None) is weight]
        reasons = [
            reason
            for reason, holds in (
                ("has adapters", type(head) is not nn.Linear),
                ("is frozen", isinstance(weight, Tensor) and not weight.requires_grad),
                ("shares its weight with another layer", isinstance(weight, Tensor) and bool(others)),
            )
            if holds
        ]
        if reasons:
            rank_zero_warn(f"CAPO: the head {' and '.join(reasons)}, so its predicted shifts are a proxy")

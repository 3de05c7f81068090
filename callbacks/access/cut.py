"""A loss, cut at its logits: what Gauss-Newton needs to know of it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _Cut(TorchFunctionMode):
    """Note what goes into cross-entropies while it is active, or put something else in its place."""

    def __init__(self, given: Tensor | None = None) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self._given, self._offset = given, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.cross_entropy or func is F.binary_cross_entropy_with_logits:
            logits = args[0] if args else kwargs["input"]
            self.seen.append(logits)
            if self._given is not None:
                flat = self._given[self._offset : self._offset + logits.numel()]
                self._offset += logits.numel()
                logits = flat.view(logits.shape)
            args, kwargs = (logits, *args[1:]), {k: v for k, v in kwargs.items() if k != "input"}
        return func(*args, **kwargs)


class CutLoss:
    """The two halves of a loss: parameters to logits, and logits to loss.

    The logits are what goes into torch's cross-entropies (binary ones with logits too), all of them, flat.

    Args:
        loss: a loss at the weights as they are; it draws the same random numbers at every call.
        who: the callback's name, for messages.
    """

    def __init__(self, loss: Callable[[], Tensor], who: str) -> None:
        self._loss, self._who = loss, who

    def logits(self) -> Tensor:
        """Return the logits [n], with their graph.

        Raises:
            MisconfigurationException: if no cross-entropy is called.
        """
        with _Cut() as cut:
            self._loss()
        if not cut.seen:
            raise MisconfigurationException(
                f"{self._who} cuts the loss where it calls cross_entropy or binary_cross_entropy_with_logits of "
                "torch.nn.functional, and it calls neither: compute it with one of them"
            )
        return torch.cat([logits.reshape(-1) for logits in cut.seen])

    def loss(self, logits: Tensor) -> Tensor:
        """Return the loss that these logits [n] have."""
        with _Cut(logits):
            return self._loss()

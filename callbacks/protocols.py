"""What a callback may ask of a module, by shape, never by class."""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

LossOn = Tensor | tuple[Tensor, Tensor, Tensor]


@runtime_checkable
class ProbeLoss(Protocol):
    """A module that can evaluate its loss on a batch, with no side effect, as often as it is asked.

    Without this method a probe calls ``training_step`` with logging muted and restores what it can. Modules with
    rollouts, files, external calls or manual optimisation need it.
    """

    def loss_on(self, batch: Any) -> LossOn:
        """Return the loss, or ``(loss, logits [n, K], targets [n])``, of ``batch``."""
        ...

"""The loss of a probe along the step that was just taken."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import lightning as L
import torch
from torch import Tensor

from evolute.callbacks.access import mean_over_ranks
from evolute.geometry.curvature.engines import differentiable_twice, gradients


class StepLine:
    """Losses and gradients on the line through the weights before (0) and after (1) a step.

    Args:
        loss: the loss at parameters by name.
        params: the probe's parameters.
        before: gives those that moved, before the step, whole; asked once, and only if another place than the step's
            end is looked at, for sharded weights have to travel.
        moved: how they moved.
        trainer: of the run; values are means over its ranks, so all ranks decide alike.
    """

    def __init__(
        self,
        loss: Callable[[Mapping[str, Tensor]], Tensor],
        params: Mapping[str, Tensor],
        before: Callable[[], Mapping[str, Tensor]],
        moved: Mapping[str, Tensor],
        trainer: L.Trainer,
    ) -> None:
        self._loss, self._params, self._moved, self._trainer = loss, params, moved, trainer
        self._before = cache(before)
        self._known: dict[float, float] = {}

    def loss(self, multiple: float) -> float:
        """Return the loss at a multiple of the step: one forward pass, at most once for each."""
        if multiple not in self._known:
            with torch.no_grad():
                value = self._loss(self._at(multiple)).detach()
            self._known[multiple] = float(mean_over_ranks(value, self._trainer))
        return self._known[multiple]

    def gradients(self, multiple: float) -> Sequence[Tensor]:
        """Return this rank's gradient there, one tensor a parameter, with the kernels that the Hessian uses."""
        point = {name: p.requires_grad_() for name, p in self._at(multiple).items()}
        with differentiable_twice():
            return gradients(self._loss(point), list(point.values()))

    def update(self) -> list[Tensor | None]:
        """Return the step, one tensor a parameter, None for those that stayed."""
        return [self._moved.get(name) for name in self._params]

    def _at(self, multiple: float) -> dict[str, Tensor]:
        before = self._before()
        return {
            name: torch.add(before[name], self._moved[name], alpha=multiple).to(p.dtype)
            if name in self._moved
            else p.detach()
            for name, p in self._params.items()
        }

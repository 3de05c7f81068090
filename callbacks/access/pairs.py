"""Two estimates of one gradient, from what a run computes anyway: what every noise estimate needs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from evolute.callbacks.access.backend import Backend, require

PairSource = Literal["consecutive", "split"]


@dataclass
class GradientPair:
    """Two gradients of the same loss from independent data.

    Attributes:
        first, second: what this rank holds of the gradients, by parameter name, each a mean over samples of its own.
        noise_share: factor that turns ``|first - second|^2`` into the squared noise of the step's own gradient.
        to_step: factor that turns ``first - second`` into a tensor with the covariance of the step's own gradient
            (consecutive gradients keep the paper's convention instead: factor 1, twice that covariance).
    """

    first: dict[str, Tensor]
    second: dict[str, Tensor]
    noise_share: float
    to_step: float

    def seen_only(self) -> None:
        """Leave out the rows that one of the two gradients has nothing for: copies with zeros take their place.

        A gradient that is sparse by rows (Gaussians out of view, items out of a batch) otherwise differs from the next
        one mostly by which rows they have.
        """
        for name, a in self.first.items():
            b = self.second[name]
            if a.ndim:
                seen = [(g if g.ndim == 1 else g.flatten(1).any(1)) != 0 for g in (a, b)]
                both = (seen[0] & seen[1]).view(-1, *(1 for _ in a.shape[1:]))
                self.first[name], self.second[name] = a * both, b * both

    def difference(self) -> dict[str, Tensor]:
        """Return ``(first - second) to_step``, by name. It takes the place of ``first``: nothing is copied."""
        differences = list(self.first.values())
        torch._foreach_sub_(differences, list(self.second.values()))
        if self.to_step != 1.0:
            torch._foreach_mul_(differences, self.to_step)
        return dict(zip(self.first, differences, strict=True))


class GradientPairs:
    """Collect gradient pairs at the steps that ``wanted`` asks for.

    ``consecutive``: the gradients of two steps in a row (LANTON's practical option, arXiv 2510.14009). It needs one
    copy of the gradient from the step before a measurement to the measurement, and the drift of the true gradient
    between the steps counts as noise. ``split``: the two halves of the micro-batches of one step, at the same weights,
    without drift; it needs ``accumulate_grad_batches >= 2`` and one copy of the gradient from half-way to the step.

    Call :meth:`open` in ``on_fit_start``, :meth:`after_backward` in ``on_after_backward``, :meth:`pair` and then
    :meth:`keep` in ``on_before_optimizer_step``. Under a strategy that shards, each rank holds its own pieces.
    """

    def __init__(self, source: PairSource, wanted: Callable[[int], bool]) -> None:
        self.source = source
        self._wanted = wanted
        self._held: dict[str, Tensor] = {}
        self._saved: dict[str, Tensor] | None = None
        self._micro_batches = 0
        self._backend: Backend | None = None
        self._params: Mapping[str, Tensor] = {}

    def open(self, backend: Backend, params: Mapping[str, Tensor]) -> None:
        """Start to collect the gradients of some parameters."""
        self._backend, self._params = backend, params

    def refuse(self, trainer: L.Trainer, backend: Backend, who: str) -> None:
        """Refuse what this source cannot work with.

        Raises:
            MisconfigurationException: if halves are asked for, and a step is one micro-batch or the strategy hides
                them.
        """
        if self.source == "split":
            require(backend, f'{who}(estimator="split")', halves='use estimator="consecutive"')
        if self.source == "split" and trainer.accumulate_grad_batches < 2:
            raise MisconfigurationException(
                f'{who}(estimator="split") compares the halves of a step, and accumulate_grad_batches is '
                f'{trainer.accumulate_grad_batches}: set it to 2 or more, or use estimator="consecutive"'
            )

    def after_backward(self, trainer: L.Trainer, step: int) -> None:
        """Note a micro-batch; half-way through a wanted step, keep a copy of the gradient so far."""
        if self.source != "split":
            return
        self._micro_batches += 1
        if self._micro_batches == trainer.accumulate_grad_batches // 2 and self._wanted(step):
            assert self._backend is not None
            self._held = self._backend.accumulated(self._params)

    def pair(self, trainer: L.Trainer, gradients: Mapping[str, Tensor], step: int) -> GradientPair | None:
        """Return the pair of step ``step``, or None if it is not wanted or the other gradient is missing."""
        if self.source == "split":
            return self._halves(trainer, gradients, step)
        if self._saved is not None and self._backend is not None:
            self._held, self._saved = self._backend.part(self._params, self._saved), None
        earlier, self._held = self._held, {}
        if not self._wanted(step) or not earlier:
            return None
        both = [name for name in gradients if name in earlier]
        first, second = {n: earlier[n] for n in both}, {n: gradients[n] for n in both}
        return GradientPair(first, second, noise_share=0.5, to_step=1.0)

    def keep(self, gradients: Mapping[str, Tensor], step: int) -> None:
        """Hold a copy of step ``step``'s gradients if the next step is wanted; call it after the pair has been used."""
        if self.source == "consecutive" and self._wanted(step + 1):
            self._held = {name: g.clone() for name, g in gradients.items()}

    def _halves(self, trainer: L.Trainer, gradients: Mapping[str, Tensor], step: int) -> GradientPair | None:
        parts, self._micro_batches = self._micro_batches, 0
        half, self._held = self._held, {}
        planned = trainer.accumulate_grad_batches
        first_parts, second_parts = planned // 2, parts - planned // 2
        if not half or not self._wanted(step) or second_parts < 1:  # a short last step of an epoch has no second half
            return None
        # Lightning divides every micro-batch's loss by the planned number of them.
        first = {n: g * (planned / first_parts) for n, g in half.items() if n in gradients}
        second = {n: (gradients[n] - half[n]) * (planned / second_parts) for n in first}
        # Var(first - second) = s (1/a + 1/b) and the step's is s / (a + b), for a and b micro-batches of variance s.
        share = first_parts * second_parts / parts**2
        return GradientPair(first, second, noise_share=share, to_step=share**0.5)

    def forget(self) -> None:
        """Drop the gradient held: the rows of the parameters are no longer what they were."""
        self._held = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the gradient held between two steps, whole: a resumed run measures what an uninterrupted one would."""
        if self._saved is not None:  # not taken up yet
            return {"held": self._saved}
        if self.source != "consecutive" or self._backend is None:
            return {"held": {}}
        return {"held": self._backend.whole(self._params, self._held)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the gradient held when the checkpoint was made."""
        self._saved = dict(state["held"])

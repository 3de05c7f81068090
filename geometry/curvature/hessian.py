"""Products with the Hessian of a loss."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from evolute.geometry.curvature.engines import (
    EngineChoice,
    choose_engine,
    differentiable_twice,
    gradients,
    pulled_back,
    require_twice_differentiable,
    scalar,
)
from evolute.geometry.curvature.finite_difference import central_difference
from evolute.geometry.curvature.operator import CurvatureOperator, Point

Loss = Callable[[], Tensor]


class Hessian(CurvatureOperator):
    """Hessian of a loss over named parameters, at the point where it is built.

    ``H @ v`` costs about two gradients: the forward pass and the first backward are done once, at construction, and
    their graph serves all products until ``close`` (or the end of a ``with`` block) frees it. ``.grad`` is never
    touched, the caller's gradient mode does not matter, and attention runs on the MATH kernel.

    Engines:
        ``"autograd"``: reverse over reverse, exact. It also works through non-reentrant activation checkpointing.
        ``"finite_difference"``: central differences of gradients, two gradients a product, for losses without a second
        derivative (custom kernels, compiled modules). The parameters move during a product and come back bit-identical.
        ``loss`` is called anew, so it must be deterministic: fix dropout.
        ``"auto"``: autograd; where double backward raises, finite differences from then on, with one warning that gives
        the reason. Some kernels raise only at the first product, and ``engine`` tells what is in use after it. A custom
        ``autograd.Function`` whose backward computes outside autograd without saying so (``once_differentiable``)
        cannot be noticed and would count as constant; name the engine yourself.

    Example::

        with Hessian(lambda: loss_fn(model(x), y), dict(model.named_parameters())) as H:
            sharpness = top_eigenpairs(H).values[0]

    Args:
        loss: returns the loss, a scalar tensor, computed from the parameters as they are.
        params: the parameters by name; those the loss does not use contribute zeros.
        engine: see above.

    Raises:
        ValueError: if ``params`` is empty, holds a tensor twice or one without gradients, if the loss is no scalar, or
            ``engine`` is unknown.
        RuntimeError: at a product, if parameters moved since construction (see ``Point`` for the guarantee), after
            ``close``, or if the chosen engine cannot differentiate the loss.
    """

    def __init__(self, loss: Loss, params: Mapping[str, Tensor], engine: EngineChoice = "auto") -> None:
        point = Point(params)
        super().__init__(
            point,
            choose_engine(engine, lambda: _Autograd(loss, point), lambda: _FiniteDifference(loss, point)),
        )


class _Autograd:
    """Reverse over reverse on one kept graph."""

    name = "autograd"

    def __init__(self, loss: Loss, point: Point) -> None:
        self._tensors = point.tensors
        with differentiable_twice():
            value = scalar(loss())
            require_twice_differentiable(value)
            kept = gradients(value, self._tensors, create_graph=True)
        self.loss = value.detach()
        self.gradients = [g.detach() for g in kept]
        self._kept: list[Tensor] = kept

    def product(self, wanted: Sequence[int], parts: Sequence[Tensor]) -> Sequence[Tensor | None]:
        # A gradient that depends on no parameter (linear, unused) has no graph, and a zero row in the Hessian.
        pairs = [(self._kept[i], v) for i, v in zip(wanted, parts, strict=True) if self._kept[i].requires_grad]
        if not pairs:
            return [None] * len(wanted)
        with differentiable_twice():
            return pulled_back([g for g, _ in pairs], [self._tensors[i] for i in wanted], [v for _, v in pairs])

    def close(self) -> None:
        self._kept = []


class _FiniteDifference:
    """Central differences of gradients."""

    name = "finite_difference"

    def __init__(self, loss: Loss, point: Point) -> None:
        self._function = loss
        self._point = point
        self.loss, self.gradients = self._evaluate(range(len(point.tensors)))

    def product(self, wanted: Sequence[int], parts: Sequence[Tensor]) -> Sequence[Tensor | None]:
        return central_difference(self._point, wanted, parts, lambda: self._evaluate(wanted)[1])

    def _evaluate(self, wanted: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        with torch.inference_mode(False), torch.enable_grad():
            value = scalar(self._function())
            found = gradients(value, [self._point.tensors[i] for i in wanted])
        return value.detach(), found

    def close(self) -> None:
        del self._function

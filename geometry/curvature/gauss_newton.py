"""Products with the generalised Gauss-Newton matrix."""

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


class GaussNewton(CurvatureOperator):
    """Gauss-Newton matrix ``G = J^T H_z J``: the part of the Hessian that does not bend the network.

    ``J`` is the Jacobian of the logits in the parameters and ``H_z`` the Hessian of the loss in the logits. ``G`` is
    positive semi-definite if the loss is convex in the logits; for cross-entropy it is the Fisher matrix, and ``H - G``
    vanishes with the residuals (Sagun et al., arXiv 1706.04454, sec. 3).

    Graphs are kept as in ``Hessian``. The engine ``"autograd"`` finds ``J v`` as the derivative of ``w -> J^T w``,
    which is linear; ``"finite_difference"`` takes it from central differences of the logits and needs only first
    derivatives of the network.

    Args:
        logits: returns the network's output, of any shape, computed from the parameters as they are.
        loss: maps that output to the scalar loss.
        params: the parameters by name; those the logits do not use contribute zeros.
        engine: ``"auto"``, ``"autograd"`` or ``"finite_difference"``, as in ``Hessian``.

    Raises:
        ValueError, RuntimeError: as ``Hessian`` does.
    """

    def __init__(
        self,
        logits: Callable[[], Tensor],
        loss: Callable[[Tensor], Tensor],
        params: Mapping[str, Tensor],
        engine: EngineChoice = "auto",
    ) -> None:
        point = Point(params)
        super().__init__(
            point,
            choose_engine(
                engine,
                lambda: _DoubleVJP(logits, loss, point),
                lambda: _DifferencedLogits(logits, loss, point),
            ),
        )


class _KeptLogits:
    """The graphs of the network and, cut off from it, of the loss."""

    def __init__(self, logits: Callable[[], Tensor], loss: Callable[[Tensor], Tensor], point: Point) -> None:
        self._tensors = point.tensors
        with differentiable_twice():
            self._z = logits()
            if not self._z.requires_grad:
                raise ValueError("the logits depend on no parameter: compute them without detach or no_grad")
            self._leaf = self._z.detach().requires_grad_()
            value = scalar(loss(self._leaf))
            (self._slope,) = gradients(value, [self._leaf], create_graph=True)
            found = pulled_back([self._z], self._tensors, [self._slope.detach()])
        self.loss = value.detach()
        self.gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(found, self._tensors, strict=True)]

    def pull_back(self, dz: Tensor, wanted: Sequence[int]) -> Sequence[Tensor | None]:
        """Return ``J^T H_z dz`` on the wanted parameters."""
        if not self._slope.requires_grad:  # a loss linear in the logits
            return [None] * len(wanted)
        with differentiable_twice():
            (curved,) = pulled_back([self._slope], [self._leaf], [dz])
            if curved is None:
                return [None] * len(wanted)
            chosen = [self._tensors[i] for i in wanted]
            return pulled_back([self._z], chosen, [curved])

    def close(self) -> None:
        del self._z, self._leaf, self._slope


class _DoubleVJP(_KeptLogits):
    name = "autograd"

    def __init__(self, logits: Callable[[], Tensor], loss: Callable[[Tensor], Tensor], point: Point) -> None:
        super().__init__(logits, loss, point)
        require_twice_differentiable(self._z)
        with differentiable_twice():
            self._w = torch.zeros_like(self._z).requires_grad_()
            self._pulled = pulled_back([self._z], self._tensors, [self._w], create_graph=True)

    def product(self, wanted: Sequence[int], parts: Sequence[Tensor]) -> Sequence[Tensor | None]:
        pairs = [(g, v) for i, v in zip(wanted, parts, strict=True) if (g := self._pulled[i]) is not None]
        if not pairs:
            return [None] * len(wanted)
        with differentiable_twice():
            (dz,) = pulled_back([g for g, _ in pairs], [self._w], [v for _, v in pairs])
        return [None] * len(wanted) if dz is None else self.pull_back(dz, wanted)

    def close(self) -> None:
        super().close()
        del self._w, self._pulled


class _DifferencedLogits(_KeptLogits):
    name = "finite_difference"

    def __init__(self, logits: Callable[[], Tensor], loss: Callable[[Tensor], Tensor], point: Point) -> None:
        self._point = point
        self._logits = logits
        super().__init__(logits, loss, point)

    def product(self, wanted: Sequence[int], parts: Sequence[Tensor]) -> Sequence[Tensor | None]:
        (dz,) = central_difference(self._point, wanted, parts, self._evaluate)
        return self.pull_back(dz, wanted)

    def _evaluate(self) -> list[Tensor]:
        with torch.no_grad():
            return [self._logits()]

    def close(self) -> None:
        super().close()
        del self._logits

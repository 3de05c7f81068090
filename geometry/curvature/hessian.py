"""Products with the Hessian of a loss."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from evolute.geometry.curvature.finite_difference import central_difference
from evolute.geometry.curvature.operator import CurvatureOperator, Engine, Point, differentiable_twice

EngineChoice = Literal["auto", "autograd", "finite_difference"]
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
        the reason. Most kernels raise only at the first product, and ``engine`` tells what is in use after it. A custom
        ``autograd.Function`` whose backward hides operations from autograd raises nothing; name the engine yourself.

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
        if engine not in ("auto", "autograd", "finite_difference"):
            raise ValueError(f'engine={engine!r}: choose "auto", "autograd" or "finite_difference"')
        point = Point(params)
        made: Engine
        if engine == "finite_difference":
            made = FiniteDifference(loss, point)
        elif engine == "autograd":
            made = Autograd(loss, point)
        else:
            made = WithFallback(lambda: Autograd(loss, point), lambda: FiniteDifference(loss, point))
        super().__init__(point, made)


class Autograd:
    """Reverse over reverse on one kept graph."""

    name = "autograd"

    def __init__(self, loss: Loss, point: Point) -> None:
        self._tensors = point.tensors
        with differentiable_twice():
            value = scalar(loss())
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
            return torch.autograd.grad(
                [g for g, _ in pairs],
                [self._tensors[i] for i in wanted],
                [v for _, v in pairs],
                retain_graph=True,
                allow_unused=True,
            )

    def close(self) -> None:
        self._kept = []


class FiniteDifference:
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
        self._function = _closed


class WithFallback:
    """One engine, until it raises; then the other."""

    def __init__(self, first: Callable[[], Engine], second: Callable[[], Engine]) -> None:
        self._second = second
        try:
            self._engine = first()
        except RuntimeError as error:
            self._engine = self._fall_back(error)

    @property
    def name(self) -> str:
        return self._engine.name

    @property
    def loss(self) -> Tensor:
        return self._engine.loss

    @property
    def gradients(self) -> Sequence[Tensor]:
        return self._engine.gradients

    def product(self, wanted: Sequence[int], parts: Sequence[Tensor]) -> Sequence[Tensor | None]:
        try:
            return self._engine.product(wanted, parts)
        except RuntimeError as error:
            if self._engine.name != "autograd":
                raise
            self._engine.close()
            self._engine = self._fall_back(error)
        return self._engine.product(wanted, parts)

    def close(self) -> None:
        self._engine.close()
        self._second = _closed

    def _fall_back(self, error: RuntimeError) -> Engine:
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        engine = self._second()  # raises by itself where even one gradient is impossible
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(f"second derivatives by finite differences, because autograd failed: {reason}", stacklevel=5)
        return engine


def scalar(value: Tensor) -> Tensor:
    """Return ``value`` as a 0-dimensional tensor, or raise ValueError if it has more than one entry."""
    if value.numel() != 1:
        raise ValueError(f"the loss must be a scalar, got shape {tuple(value.shape)}: reduce it with mean() or sum()")
    return value.reshape(())


def gradients(value: Tensor, tensors: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    """Return d value / d tensors, zeros for those that ``value`` does not use; ``.grad`` stays as it is."""
    if not value.requires_grad:
        raise ValueError("the loss does not depend on any parameter: compute it from them, without detach or no_grad")
    found = torch.autograd.grad(value, tensors, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)]


def _closed() -> Tensor:
    raise RuntimeError("this operator is closed")

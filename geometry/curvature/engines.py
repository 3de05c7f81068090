"""How products are made: what an engine is, how one is chosen, and what engines share."""

import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

EngineChoice = Literal["auto", "autograd", "finite_difference"]


class Engine(Protocol):
    """How products are made at one point. ``wanted`` are positions in the full list of parameters."""

    @property
    def name(self) -> str:
        """``"autograd"`` or ``"finite_difference"``."""
        ...

    @property
    def loss(self) -> Tensor:
        """The loss at the point, a detached scalar."""
        ...

    @property
    def gradients(self) -> Sequence[Tensor]:
        """Its gradient, one detached tensor a parameter, of all parameters."""
        ...

    def product(self, wanted: Sequence[int], parts: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Return the block of the matrix on the wanted parameters, times ``parts``; None stands for zeros."""
        ...

    def close(self) -> None:
        """Let go of graphs and copies."""
        ...


def choose_engine(choice: str, exact: Callable[[], Engine], differences: Callable[[], Engine]) -> Engine:
    """Build the engine of that name; "auto" is the exact one until it raises, then finite differences.

    Raises:
        ValueError: if ``choice`` is none of the three.
    """
    if choice == "autograd":
        return exact()
    if choice == "finite_difference":
        return differences()
    if choice == "auto":
        return _WithFallback(exact, differences)
    raise ValueError(f'engine={choice!r}: choose "auto", "autograd" or "finite_difference"')


@contextmanager
def differentiable_twice() -> Generator[None]:
    """Record a graph that can be differentiated twice, whatever mode the caller is in.

    Gradients are switched on, and attention runs on the MATH kernel: the fused kernels have no second derivative.
    A product must enter it too, because activation checkpointing runs parts of the forward again inside backward.
    """
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


def scalar(value: Tensor) -> Tensor:
    """Return ``value`` as a 0-dimensional tensor, or raise ValueError if it has more than one entry."""
    if value.numel() != 1:
        raise ValueError(f"the loss must be a scalar, got shape {tuple(value.shape)}: reduce it with mean() or sum()")
    return value.reshape(())


def gradients(value: Tensor, tensors: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    """Return d value / d tensors, zeros for those that ``value`` does not use; ``.grad`` stays as it is."""
    if not value.requires_grad:
        raise ValueError("the loss does not depend on any parameter: compute it from them, without detach or no_grad")
    found = pulled_back([value], tensors, create_graph=create_graph, keep=create_graph)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)]


def pulled_back(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    vectors: Sequence[Tensor] | None = None,
    create_graph: bool = False,
    keep: bool = True,
) -> tuple[Tensor | None, ...]:
    """Return the vector-Jacobian product, None for inputs that the outputs do not use; by default the graph is kept."""
    return torch.autograd.grad(
        outputs, inputs, vectors, create_graph=create_graph, retain_graph=keep, allow_unused=True
    )


def require_twice_differentiable(value: Tensor) -> None:
    """Raise RuntimeError if the graph of ``value`` holds a ``once_differentiable`` custom function.

    Such a function raises by itself only if the gradient that reaches it needs a graph; behind an L1 loss, say, it does
    not, and its second derivative would silently be zero.
    """
    seen: set[Any] = set()
    stack: list[Any] = [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
        # The decorator's wrapper is the only backward that is defined in torch's own module.
        if getattr(backward, "__globals__", None) is vars(torch.autograd.function):
            raise RuntimeError(f"{node.name()} is marked once_differentiable: it has no second derivative")
        stack.extend(following for following, _ in node.next_functions)


class _WithFallback:
    """One engine, until it raises; then the other."""

    def __init__(self, first: Callable[[], Engine], second: Callable[[], Engine]) -> None:
        self._second: Callable[[], Engine] = second
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

    def _fall_back(self, error: RuntimeError) -> Engine:
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        engine = self._second()  # raises by itself where even one gradient is impossible
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(f"second derivatives by finite differences, because autograd failed: {reason}", stacklevel=5)
        return engine

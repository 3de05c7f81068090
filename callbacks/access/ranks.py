"""What several processes know together: curvature over all their probe batches, and the spread of their gradients."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import lightning as L
import torch
from torch import Tensor


class FlatOperator(Protocol):
    """A symmetric operator over flattened parameters, with the gradient at its point."""

    @property
    def shape(self) -> torch.Size:
        """``(P, P)``."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of products."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of products."""
        ...

    @property
    def gradient(self) -> Tensor:
        """Gradient at the point, flat [P]."""
        ...

    def flatten(self, parts: Sequence[Tensor | None]) -> Tensor:
        """Join one tensor a parameter into a flat [P] vector."""
        ...

    def unflatten(self, v: Tensor) -> list[Tensor]:
        """Split a flat [P] vector into tensors of the parameters' shapes."""
        ...

    def __matmul__(self, v: Tensor, /) -> Tensor: ...


class MeanOverRanks:
    """The mean of every rank's operator: one all-reduce of a flat vector a product.

    Every rank must make the same products in the same order; vectors come out equal on all ranks, so what Lanczos
    decides from them does too.
    """

    def __init__(self, H: FlatOperator, trainer: L.Trainer) -> None:
        self._H = H
        self._trainer = trainer
        self._gradient: Tensor | None = None
        self.shape, self.dtype, self.device = H.shape, H.dtype, H.device
        self.flatten, self.unflatten = H.flatten, H.unflatten

    @property
    def gradient(self) -> Tensor:
        """Gradient of the mean loss, flat [P]; reduced once."""
        if self._gradient is None:
            self._gradient = mean_over_ranks(self._H.gradient, self._trainer)
        return self._gradient

    def __matmul__(self, v: Tensor, /) -> Tensor:
        return mean_over_ranks(self._H @ v, self._trainer)


def mean_over_ranks(value: Tensor, trainer: L.Trainer) -> Tensor:
    """Return the mean of a tensor over all ranks, a new one; in one process the tensor itself."""
    if trainer.world_size == 1:
        return value
    reduced = trainer.strategy.reduce(value.clone(), reduce_op="mean")  # it works in place
    assert isinstance(reduced, Tensor)
    return reduced


def gather_values(values: Tensor, trainer: L.Trainer) -> Tensor:
    """Return the values [n] of all ranks, joined, none below 0; ranks may hold different numbers of them."""
    if trainer.world_size == 1:
        return values
    counts = trainer.strategy.all_gather(torch.tensor(len(values), device=values.device))
    padded = values.new_full((int(counts.max()),), -1.0)
    padded[: len(values)] = values
    gathered = trainer.strategy.all_gather(padded).reshape(-1)
    return gathered[~(gathered < 0)]


def gather_rows(rows: Tensor, trainer: L.Trainer) -> Tensor:
    """Return the rows [n, c] of all ranks, joined in the order of ranks, the same on all of them.

    Ranks may hold different numbers of rows; one that holds none need not know c.
    """
    if trainer.world_size == 1:
        return rows
    shapes = trainer.strategy.all_gather(torch.tensor(rows.shape, device=rows.device)).reshape(-1, 2)
    counts, width = shapes[:, 0].tolist(), int(shapes[:, 1].max())
    padded = rows.new_zeros(max(counts), width)
    padded[: len(rows), : rows.shape[1]] = rows
    gathered = trainer.strategy.all_gather(padded).reshape(len(counts), max(counts), width)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])


class LocalSquares:
    """Squared norms of each rank's own gradient, noted before DDP averages it, without a further backward.

    A hook on each parameter runs when its gradient has been accumulated; DDP's reduction starts after it. Hooks stand
    from :meth:`open` to :meth:`close` only, so steps that are not measured pay nothing. Under accumulation the last
    micro-batch counts: the gradient is then the rank's mean over all of them.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._squares: dict[str, Tensor] = {}

    def open(self, params: Mapping[str, Tensor]) -> None:
        """Start to listen."""
        self.close()
        self._handles = [p.register_post_accumulate_grad_hook(self._noting(name)) for name, p in params.items()]

    def close(self) -> dict[str, Tensor]:
        """Stop listening; return the squared norms by name, in float32 or wider, of scaled gradients if they are."""
        for handle in self._handles:
            handle.remove()
        squares, self._handles, self._squares = self._squares, [], {}
        return squares

    def _noting(self, name: str) -> Any:
        def note(p: Tensor) -> None:
            if p.grad is not None:
                wide = torch.promote_types(p.dtype, torch.float32)
                self._squares[name] = torch.linalg.vector_norm(p.grad, dtype=wide).square()

        return note


def over_ranks(H: FlatOperator, trainer: L.Trainer) -> FlatOperator:
    """Return ``H`` itself in one process, its mean over ranks in several."""
    return MeanOverRanks(H, trainer) if trainer.world_size > 1 else H

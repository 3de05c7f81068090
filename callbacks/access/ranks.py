"""Curvature of the loss over all ranks' probe batches."""

from collections.abc import Sequence
from typing import Protocol

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
        self._strategy = trainer.strategy
        self.shape, self.dtype, self.device = H.shape, H.dtype, H.device
        self.flatten, self.unflatten = H.flatten, H.unflatten

    @property
    def gradient(self) -> Tensor:
        """Gradient of the mean loss, flat [P]."""
        return self._mean(self._H.gradient)

    def __matmul__(self, v: Tensor, /) -> Tensor:
        return self._mean(self._H @ v)

    def _mean(self, v: Tensor) -> Tensor:
        reduced = self._strategy.reduce(v, reduce_op="mean")
        assert isinstance(reduced, Tensor)
        return reduced


def over_ranks(H: FlatOperator, trainer: L.Trainer) -> FlatOperator:
    """Return ``H`` itself in one process, its mean over ranks in several."""
    return MeanOverRanks(H, trainer) if trainer.world_size > 1 else H

"""Trace and Frobenius norm of an operator from random products (Hutchinson)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from evolute.geometry.curvature.operator import SymmetricOperator


@dataclass(frozen=True)
class TraceSamples:
    """What ``n`` random sign vectors ``z`` tell.

    Attributes:
        quadratic: [n], ``z^T H z``; its mean estimates the trace, its variance is ``2 (||H||_F^2 - ||diag H||^2)``.
        squared: [n], ``||H z||^2``; its mean estimates ``||H||_F^2`` from the same products.
    """

    quadratic: Tensor
    squared: Tensor

    @property
    def trace(self) -> Tensor:
        """Estimate of the trace, scalar."""
        return self.quadratic.mean()

    @property
    def stderr(self) -> Tensor:
        """Standard error of ``trace``, scalar; nan from a single sample."""
        n = len(self.quadratic)
        if n == 1:
            return torch.full_like(self.quadratic[0], torch.nan)
        return self.quadratic.std() / n**0.5

    @property
    def frobenius(self) -> Tensor:
        """Estimate of the Frobenius norm, scalar."""
        return self.squared.mean().sqrt()


def trace_samples(H: SymmetricOperator, samples: int, generator: torch.Generator | None = None) -> TraceSamples:
    """Multiply ``H`` with random sign (Rademacher) vectors and return what each says of trace and Frobenius norm.

    Args:
        H: anything with ``shape`` [P, P], ``dtype``, ``device`` and ``@``.
        samples: number of vectors, one product each.
        generator: by default a private one with a fixed seed; the global generator is never used.

    Raises:
        ValueError: if ``samples`` is below 1.
    """
    if samples < 1:
        raise ValueError(f"samples={samples}: must be at least 1")
    source = generator or torch.Generator().manual_seed(0)
    wide = torch.promote_types(H.dtype, torch.float32)
    quadratic: list[Tensor] = []
    squared: list[Tensor] = []
    for _ in range(samples):
        signs = torch.randint(0, 2, (H.shape[0],), device=source.device, generator=source) * 2 - 1
        z = signs.to(H.device, H.dtype)
        product = (H @ z).to(wide)
        quadratic.append(product @ z.to(wide))
        squared.append(product @ product)
    return TraceSamples(torch.stack(quadratic), torch.stack(squared))


def hutchinson_trace(H: SymmetricOperator, samples: int = 64, generator: torch.Generator | None = None) -> Tensor:
    """Return Hutchinson's estimate of the trace of ``H``, a scalar tensor; exact for diagonal matrices.

    ``trace_samples`` takes the same arguments and gives the standard error and the Frobenius norm too.
    """
    return trace_samples(H, samples, generator).trace

"""Trace, diagonal and Frobenius norm of an operator from random products (Hutchinson, Bekas, Hutch++)."""

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
        return _standard_error(self.quadratic)

    @property
    def frobenius(self) -> Tensor:
        """Estimate of the Frobenius norm, scalar."""
        return self.squared.mean().sqrt()


@dataclass(frozen=True)
class SketchedTrace:
    """What Hutch++ found.

    Attributes:
        captured: trace of ``H`` within the sketched subspace, exact, scalar.
        remainder: [n], samples of the trace outside of it.
        products: products spent.
    """

    captured: Tensor
    remainder: Tensor
    products: int

    @property
    def trace(self) -> Tensor:
        """Estimate of the trace, scalar."""
        return self.captured + self.remainder.mean()

    @property
    def stderr(self) -> Tensor:
        """Standard error of ``trace`` given the subspace, scalar; nan from a single sample."""
        return _standard_error(self.remainder)


@dataclass(frozen=True)
class Diagonal:
    """Estimate of the diagonal and the standard error of each entry (nan from a single sample), both [P]."""

    values: Tensor
    stderr: Tensor


def trace_samples(H: SymmetricOperator, samples: int, generator: torch.Generator | None = None) -> TraceSamples:
    """Multiply ``H`` with random sign (Rademacher) vectors and return what each says of trace and Frobenius norm.

    Args:
        H: anything with ``shape`` [P, P], ``dtype``, ``device`` and ``@``.
        samples: number of vectors, one product each.
        generator: by default a private one with a fixed seed; the global generator is never used.

    Raises:
        ValueError: if ``samples`` is below 1.
    """
    _require_samples(samples)
    source = generator or torch.Generator().manual_seed(0)
    wide = torch.promote_types(H.dtype, torch.float32)
    quadratic: list[Tensor] = []
    squared: list[Tensor] = []
    for _ in range(samples):
        z = random_signs(H, source)
        product = (H @ z).to(wide)
        quadratic.append(product @ z.to(wide))
        squared.append(product @ product)
    return TraceSamples(torch.stack(quadratic), torch.stack(squared))


def hutchinson_trace(H: SymmetricOperator, samples: int = 64, generator: torch.Generator | None = None) -> Tensor:
    """Return Hutchinson's estimate of the trace of ``H``, a scalar tensor; exact for diagonal matrices.

    ``trace_samples`` takes the same arguments and gives the standard error and the Frobenius norm too.
    """
    return trace_samples(H, samples, generator).trace


def hutch_plus_plus(
    H: SymmetricOperator, products: int = 48, generator: torch.Generator | None = None
) -> SketchedTrace:
    """Estimate the trace by Hutch++ (Meyer, Musco, Musco and Woodruff, arXiv 2010.09649, algorithm 1).

    A third of the products sketches the range of ``H``, a third takes the trace there exactly, and a third samples
    what is left. It is unbiased, exact if the rank is at most ``products // 3``, and better than Hutchinson at equal
    cost where few eigenvalues hold most of the Frobenius norm, as in Hessians with outliers; on a flat spectrum it is
    worse by a factor of up to 3 in the variance.

    Args:
        H: anything with ``shape`` [P, P], ``dtype``, ``device`` and ``@``.
        products: products to spend, rounded down to a multiple of 3. The sketch holds ``products // 3`` vectors of P
            entries, twice.
        generator: by default a private one with a fixed seed; the global generator is never used.

    Raises:
        ValueError: if ``products`` is below 3.
    """
    if products < 3:
        raise ValueError(f"products={products}: must be at least 3")
    source = generator or torch.Generator().manual_seed(0)
    wide = torch.promote_types(H.dtype, torch.float32)
    third = min(products // 3, H.shape[0])
    sketch = torch.stack([(H @ random_signs(H, source)).to(wide) for _ in range(third)], dim=1)
    basis, _ = torch.linalg.qr(sketch)
    captured = torch.stack([q @ (H @ q.to(H.dtype)).to(wide) for q in basis.unbind(1)]).sum()
    remainder: list[Tensor] = []
    for _ in range(third):
        z = random_signs(H, source).to(wide)
        z = z - basis @ (basis.T @ z)
        remainder.append(z @ (H @ z.to(H.dtype)).to(wide))
    return SketchedTrace(captured, torch.stack(remainder), 3 * third)


def hutchinson_diagonal(H: SymmetricOperator, samples: int = 64, generator: torch.Generator | None = None) -> Diagonal:
    """Estimate the diagonal of ``H`` as the mean of ``z * (H z)`` over random sign vectors ``z``.

    Unbiased (Bekas, Kokiopoulou and Saad, Appl. Numer. Math. 57, 2007); the variance of entry ``i`` is ``sum_j!=i
    H_ij^2 / samples``, so it is exact for diagonal matrices.

    Args:
        H: anything with ``shape`` [P, P], ``dtype``, ``device`` and ``@``.
        samples: number of vectors, one product each.
        generator: by default a private one with a fixed seed; the global generator is never used.

    Raises:
        ValueError: if ``samples`` is below 1.
    """
    _require_samples(samples)
    source = generator or torch.Generator().manual_seed(0)
    wide = torch.promote_types(H.dtype, torch.float32)
    mean = torch.zeros(H.shape[0], dtype=wide, device=H.device)
    squares = torch.zeros_like(mean)  # sum of squared deviations, updated as Welford does
    for n in range(1, samples + 1):
        z = random_signs(H, source)
        entry = z.to(wide) * (H @ z).to(wide)
        change = entry - mean
        mean += change / n
        squares += change * (entry - mean)
    if samples == 1:
        return Diagonal(mean, torch.full_like(mean, torch.nan))
    return Diagonal(mean, (squares / (samples * (samples - 1))).sqrt())


def random_signs(H: SymmetricOperator, source: torch.Generator) -> Tensor:
    """Return a vector [P] of -1 and 1 in the dtype and on the device of ``H``."""
    signs = torch.randint(0, 2, (H.shape[0],), device=source.device, generator=source) * 2 - 1
    return signs.to(H.device, H.dtype)


def _standard_error(samples: Tensor) -> Tensor:
    n = len(samples)
    if n == 1:
        return torch.full_like(samples[0], torch.nan)
    return samples.std() / n**0.5


def _require_samples(samples: int) -> None:
    if samples < 1:
        raise ValueError(f"samples={samples}: must be at least 1")

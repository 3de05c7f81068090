"""Spectral density by stochastic Lanczos quadrature, and what is read off it: bulk, outliers, mass about zero."""

from dataclasses import dataclass

import torch
from torch import Tensor

from evolute.geometry.curvature.krylov import KrylovSpace
from evolute.geometry.curvature.operator import SymmetricOperator
from evolute.geometry.curvature.trace import random_signs

_POINTS = 1024
# The Gaussian that stands for an eigenvalue: sigma^2 = 1e-5 on a spectrum of range 1, as in google/spectral-density.
_WIDTH = 1e-5**0.5


@dataclass(frozen=True)
class SpectralDensity:
    """Density of the eigenvalues, with the quadrature it was made from; float64, on the CPU.

    A probe ``z`` sees each eigenvalue with the weight ``(u^T z)^2 / ||z||^2``, whose mean is ``1 / P`` an eigenvalue.

    Attributes:
        grid: [points], equally spaced over the spectrum.
        density: [points], the mean over probes; integrates to 1.
        stderr: [points], its standard error over probes; nan from a single probe.
        nodes: [probes, steps], Ritz values, ascending in each row; a probe that broke down early is padded with its
            last.
        weights: [probes, steps], their weights, which sum to 1 in each row; 0 for padding.
        size: P.
        products: products spent.
    """

    grid: Tensor
    density: Tensor
    stderr: Tensor
    nodes: Tensor
    weights: Tensor
    size: int
    products: int

    @property
    def largest(self) -> Tensor:
        """Largest eigenvalue seen, scalar; a lower bound, in general tight."""
        return self.nodes.max()

    @property
    def smallest(self) -> Tensor:
        """Smallest eigenvalue seen, scalar; an upper bound."""
        return self.nodes.min()

    def mass(self, low: float = -torch.inf, high: float = torch.inf) -> tuple[Tensor, Tensor]:
        """Return the share of eigenvalues in [low, high], and its standard error over probes (nan from one)."""
        inside = (self.nodes >= low) & (self.nodes <= high)
        return _mean_and_error((self.weights * inside).sum(dim=1))

    def cdf(self, x: Tensor) -> Tensor:
        """Return the share of eigenvalues at or below each of ``x`` [n], as [n], not smoothed."""
        below = self.nodes.unsqueeze(-1) <= x.to(self.nodes)
        return (self.weights.unsqueeze(-1) * below).sum(dim=1).mean(dim=0)

    def moment(self, power: int) -> tuple[Tensor, Tensor]:
        """Return the mean of ``lambda^power`` over eigenvalues, and its standard error over probes (nan from one).

        Each probe's moment equals ``z^T H^power z / P`` for ``power <= 2 steps - 1``.
        """
        return _mean_and_error((self.weights * self.nodes**power).sum(dim=1))

    def near_zero_mass(self, relative: float = 1e-3) -> tuple[Tensor, Tensor]:
        """Return the share of eigenvalues with ``|lambda| <= relative * lambda_1``, and its standard error.

        ``lambda_1`` is the largest eigenvalue by size.
        """
        edge = float(self.nodes.abs().max()) * relative
        return self.mass(-edge, edge)

    def negative_mass(self, relative: float = 1e-3) -> tuple[Tensor, Tensor]:
        """Return the share of eigenvalues below those near zero, ``lambda < -relative * |lambda_1|``, and its error.

        What lies within is not counted: there the sign of a Ritz value says nothing.
        """
        edge = float(self.nodes.abs().max()) * relative
        inside = self.nodes < -edge
        return _mean_and_error((self.weights * inside).sum(dim=1))

    def bulk_edge(self, classes: int | None = None) -> Tensor:
        """Return where the bulk ends, scalar.

        With the number of classes ``K`` of the problem: the quantile ``1 - 2 K / P``. Without: six standard deviations
        above the mean of the mass within ``lambda_1 / 100`` of zero, for spectra that have a bulk there (Sagun et al.,
        arXiv 1706.04454, describe both parts; the two cuts are ours).

        Raises:
            ValueError: if ``classes`` is not in [1, P / 2), or there is no mass near zero and ``classes`` is not given.
        """
        nodes, weights = self.nodes.flatten(), self.weights.flatten() / len(self.nodes)
        if classes is not None:
            if not 1 <= classes < self.size / 2:
                raise ValueError(f"classes={classes}: must be at least 1 and below P / 2 = {self.size / 2}")
            order = nodes.argsort()
            reached = weights[order].cumsum(0) >= 1 - 2 * classes / self.size
            return nodes[order][int(reached.to(torch.int8).argmax())]
        near = nodes.abs() <= nodes.abs().max() / 100
        total = weights[near].sum()
        if total <= 0:
            raise ValueError("no eigenvalue lies within a hundredth of the largest of zero: pass classes")
        mean = (weights * nodes)[near].sum() / total
        variance = (weights[near] * (nodes[near] - mean).square()).sum() / total
        return mean + 6 * variance.sqrt()

    def outliers(self, edge: float | Tensor | None = None) -> Tensor:
        """Return the outliers, descending: the Ritz values above the largest relative gap beyond the bulk's edge.

        In each probe the values above the edge are cut where the ratio of one to the next below is largest; the count
        is the median over probes, the values are means over the probes that have so many. Eigenvalues that coincide
        count once. For cross-entropy on ``K`` classes, ``K - 1`` or ``K`` are expected (Sagun et al.).

        Args:
            edge: no value below is an outlier; by default ``bulk_edge()``, but at least a twentieth of the largest
                value (ours: further down, ratios between neighbours say little).
        """
        bound = max(float(self.bulk_edge()), float(self.largest) / 20) if edge is None else float(edge)
        found: list[Tensor] = []
        for nodes, weights in zip(self.nodes, self.weights, strict=True):
            ladder = nodes[weights > 0].flip(0)
            beyond = ladder[ladder > bound]
            following = torch.cat([ladder[1:], ladder.new_zeros(1)])[: len(beyond)].clamp(min=0.0)
            ratios = beyond / following  # infinite where nothing positive follows
            found.append(beyond[: int(ratios.argmax()) + 1] if len(beyond) else beyond)
        count = int(torch.tensor([len(f) for f in found]).median())
        return torch.stack([f[:count] for f in found if len(f) >= count]).mean(dim=0)


def spectral_density(
    H: SymmetricOperator, probes: int = 8, steps: int = 64, generator: torch.Generator | None = None
) -> SpectralDensity:
    """Estimate the density of the eigenvalues of ``H`` by stochastic Lanczos quadrature, with error bars over probes.

    From each random sign vector ``steps`` Lanczos steps are made with full reorthogonalisation. Ritz values and the
    squared first entries of their vectors are a Gauss quadrature of the spectrum as that vector sees it, exact for
    polynomials up to degree ``2 steps - 1`` (Golub and Meurant; Ghorbani, Krishnan and Xiao, arXiv 1901.10159). Where a
    Krylov space is exhausted early (low rank, few distinct eigenvalues) the rule is exact with fewer nodes. For the
    curve each node becomes a Gaussian with a standard deviation of 0.32 % of the spectrum's range.

    Args:
        H: anything with ``shape`` [P, P], ``dtype``, ``device`` and ``@``; taken to be symmetric.
        probes: random vectors.
        steps: products for each; as many vectors of P entries are held, in float32 or wider.
        generator: by default a private one with a fixed seed; the global generator is never used.

    Raises:
        ValueError: if ``probes`` or ``steps`` is below 1.
        FloatingPointError: if a product is not finite.
    """
    if probes < 1 or steps < 1:
        raise ValueError(f"probes={probes}, steps={steps}: both must be at least 1")
    source = generator or torch.Generator().manual_seed(0)
    nodes = torch.zeros(probes, steps, dtype=torch.float64)
    weights = torch.zeros_like(nodes)
    space = KrylovSpace(H, source, min(steps + 1, H.shape[0]))
    for i in range(probes):
        space.clear()
        space.append(random_signs(H, source))
        while space.waiting and len(space.done) < steps:
            space.expand()
        values, vectors = space.ritz()
        nodes[i, : len(values)] = torch.from_numpy(values)
        nodes[i, len(values) :] = float(values[-1])
        weights[i, : len(values)] = torch.from_numpy(vectors[0] ** 2)
    grid, curves = _smoothed(nodes, weights)
    density, stderr = _mean_and_error(curves)
    return SpectralDensity(grid, density, stderr, nodes, weights, H.shape[0], space.products)


def _smoothed(nodes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return a grid [points] over the nodes and one smooth curve a probe on it, [probes, points]."""
    low, high = float(nodes.min()), float(nodes.max())
    # A single point of mass has no range; its own size, or 1 at zero, sets the scale.
    sigma = _WIDTH * (high - low if high - low > 1e-12 * max(abs(low), abs(high)) else max(abs(low), abs(high)) or 1.0)
    grid = torch.linspace(low - 5 * sigma, high + 5 * sigma, _POINTS, dtype=nodes.dtype)
    bells = torch.exp(-0.5 * ((grid - nodes.unsqueeze(-1)) / sigma).square()) / (sigma * (2 * torch.pi) ** 0.5)
    return grid, (weights.unsqueeze(-1) * bells).sum(dim=1)


def _mean_and_error(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard error over the first dimension; the error of a single sample is nan."""
    n = len(samples)
    error = samples.std(dim=0) / n**0.5 if n > 1 else torch.full_like(samples[0], torch.nan)
    return samples.mean(dim=0), error

"""Where a fixed number of primitives goes: more of them where shape and colour change."""

from typing import Literal

import torch
from torch import Tensor

from evolute.geometry.points.neighbourhoods import Neighbourhoods, neighbourhoods

Normalise = Literal["minmax", "quantile"]


def allocation_probabilities(
    points: Tensor,
    colors: Tensor,
    k: int,
    shape_weight: float = 0.5,
    texture_weight: float = 0.5,
    normalise: Normalise = "minmax",
    base_ratio: float = 0.0,
    found: Neighbourhoods | None = None,
) -> Tensor:
    """Return the probability that each point becomes a primitive.

    ``(a kappa + b tau) / sum`` with surface variation ``kappa`` and texture variation ``tau``, each brought to [0, 1]
    over the cloud (GTLR-GS, arXiv 2603.23192, equation 4, as a reproduction cites it). Where neither says anything
    (both constant, or not finite) all points are alike.

    Args:
        points: [N, 3].
        colors: [N, C] in [0, 1].
        k: neighbours.
        shape_weight: ``a``.
        texture_weight: ``b``.
        normalise: ``"minmax"``, the paper's, which one outlier can squeeze; ``"quantile"`` clips at the 1 and 99 %
            quantiles first.
        base_ratio: share of the probability spread evenly, so that flat walls are not starved; 0 is the paper's.
        found: what :func:`neighbourhoods` returned for these arguments, where it is known already.

    Returns:
        [N], at least 0, of sum 1.

    Raises:
        ValueError: if a weight is negative, both are 0, or ``base_ratio`` is not in [0, 1].
    """
    if min(shape_weight, texture_weight) < 0 or shape_weight + texture_weight <= 0:
        raise ValueError(
            f"shape_weight={shape_weight}, texture_weight={texture_weight}: must be at least 0, not both 0"
        )
    if not 0 <= base_ratio <= 1:
        raise ValueError(f"base_ratio={base_ratio}: must lie in [0, 1]")
    if normalise not in ("minmax", "quantile"):
        raise ValueError(f"normalise={normalise!r}: must be 'minmax' or 'quantile'")
    found = neighbourhoods(points, k, colors) if found is None else found
    assert found.texture is not None
    weights = shape_weight * _unit(found.variation, normalise) + texture_weight * _unit(found.texture, normalise)
    total = weights.double().sum()
    uniform = torch.full_like(weights, 1 / max(len(weights), 1), dtype=torch.float64)
    if not bool(total.isfinite()) or float(total) <= 0:
        return uniform.to(points)
    return ((1 - base_ratio) * weights.double() / total + base_ratio * uniform).to(points)


def draw(probabilities: Tensor, budget: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw ``budget`` different indices with the given probabilities; all of them if there are no more.

    Successive draws without replacement, by the exponential race (Efraimidis and Spirakis 2006): any number of points.
    If fewer than ``budget`` have a positive probability, one per cent is spread evenly.

    Args:
        probabilities: [N], at least 0.
        budget: at least 1.
        generator: on the CPU.

    Returns:
        Sorted indices [min(budget, N)].

    Raises:
        ValueError: if ``budget`` is below 1.
    """
    if budget < 1:
        raise ValueError(f"budget={budget}: must be at least 1")
    n = len(probabilities)
    if budget >= n:
        return torch.arange(n)
    p = probabilities.double().cpu()
    if int((p > 0).sum()) < budget:
        p = 0.99 * p + 0.01 / n
    arrivals = torch.empty(n, dtype=torch.float64).exponential_(generator=generator) / p
    return arrivals.topk(budget, largest=False).indices.sort().values


def _unit(values: Tensor, normalise: Normalise) -> Tensor:
    """Bring values to [0, 1]; zeros where they are constant or not finite."""
    values = torch.where(values.isfinite(), values, torch.zeros_like(values))
    if not len(values):
        return values
    if normalise == "quantile":
        sorted_values = values.sort().values  # torch.quantile refuses large inputs
        low, high = sorted_values[int(0.01 * (len(values) - 1))], sorted_values[int(0.99 * (len(values) - 1))]
        values = values.clamp(low, high)
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if bool(high - low > 1e-12 * high.abs()) else torch.zeros_like(values)

"""Central differences at a point, by moving the parameters in place and putting them back bit by bit."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from evolute.geometry.curvature.operator import Point

T = TypeVar("T")

# Step along a unit direction, per dtype of the parameters; the values hessian-eigenthings uses for Hessian products.
# float16 has three more bits of mantissa than bfloat16, hence a step eight times smaller.
_STEP = {torch.float64: 6e-6, torch.float32: 5e-3, torch.float16: 2.5e-2, torch.bfloat16: 0.2}


def central_difference(
    point: Point, wanted: Sequence[int], parts: Sequence[Tensor], evaluate: Callable[[], list[Tensor]]
) -> list[Tensor]:
    """Return the derivative of ``evaluate`` along ``parts``: ``(f(x + e u) - f(x - e u)) / 2e``, scaled by
    ``||parts||``.

    ``u`` is the unit vector along ``parts``. The error is of order ``e^2`` plus rounding over ``e``. The parameters are
    restored from copies, so they end bit-identical, also when ``evaluate`` raises.

    Args:
        point: the parameters and where they stand.
        wanted: positions of the parameters that move.
        parts: the direction, one tensor for each of them.
        evaluate: reads the parameters and returns tensors; it must be deterministic.
    """
    # Written through .data, which bumps no version counter: graphs kept at the point stay valid, as the bits return.
    moving = [point.tensors[i] for i in wanted]
    length = float(torch.stack([torch.linalg.vector_norm(v.double()).cpu() for v in parts]).norm())
    if length == 0.0:
        return [torch.zeros_like(t) for t in evaluate()]
    step = max(_STEP.get(p.dtype, 0.2) for p in moving)
    saved = [p.detach().clone() for p in moving]

    def at(offset: float) -> list[Tensor]:
        for p, kept, v in zip(moving, saved, parts, strict=True):
            p.data.copy_(kept).add_(v, alpha=offset / length)
        return [t.detach() for t in evaluate()]

    try:
        ahead, behind = at(step), at(-step)
    finally:
        for p, kept in zip(moving, saved, strict=True):
            p.data.copy_(kept)
    return [(a - b) * (length / (2 * step)) for a, b in zip(ahead, behind, strict=True)]

"""Colour that depends on the direction of sight: real spherical harmonics up to degree 3."""

import math

import torch
from torch import Tensor

C0 = 0.5 / math.sqrt(math.pi)
"""The constant harmonic: colour is ``C0 * coefficient + 0.5``."""
MAX_DEGREE = 3


def harmonics(degree: int, directions: Tensor) -> Tensor:
    """Return the real spherical harmonics up to ``degree``, in the order and with the signs that 3DGS files use.

    Args:
        degree: 0 to 3.
        directions: unit vectors [N, 3].

    Returns:
        [N, (degree + 1)^2].

    Raises:
        ValueError: if the degree is out of range.
    """
    if not 0 <= degree <= MAX_DEGREE:
        raise ValueError(f"spherical harmonics of degree {degree}: must be 0 to {MAX_DEGREE}")
    x, y, z = directions.unbind(-1)
    basis = [torch.full_like(x, C0)]
    if degree >= 1:
        c = math.sqrt(3 / (4 * math.pi))
        basis += [-c * y, c * z, -c * x]
    if degree >= 2:
        c, c20, c22 = (math.sqrt(k / math.pi) for k in (15 / 4, 5 / 16, 15 / 16))
        basis += [c * x * y, -c * y * z, c20 * (3 * z * z - 1), -c * x * z, c22 * (x * x - y * y)]
    if degree >= 3:
        c33, c32, c31, c30 = (math.sqrt(k / math.pi) for k in (35 / 32, 105 / 4, 21 / 32, 7 / 16))
        basis += [
            -c33 * y * (3 * x * x - y * y),
            c32 * x * y * z,
            -c31 * y * (5 * z * z - 1),
            c30 * z * (5 * z * z - 3),
            -c31 * x * (5 * z * z - 1),
            0.5 * c32 * z * (x * x - y * y),
            -c33 * x * (x * x - 3 * y * y),
        ]
    return torch.stack(basis, -1)

"""Gaussians that move where they are needed without changing what is seen."""

import math

import torch
from torch import Tensor

LIMIT = 51
"""Most copies at one place."""


def relocated(opacities: Tensor, scales: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    """Return opacity and scales of ``n`` Gaussians that together look like the one they lie on.

    ``o' = 1 - (1 - o)^(1/n)``, and scales shrink so that the integral along a ray through the centre stays the same
    (3DGS-MCMC, Kheradmand et al. 2024, equation 9).

    Args:
        opacities: [M] in (0, 1).
        scales: [M, 3], linear.
        copies: how many lie there [M], itself included, at least 1; more than 51 count as 51.

    Returns:
        Opacities [M] and scales [M, 3].
    """
    n = copies.clamp(1, LIMIT).long()
    exact = opacities.double()
    each = 1 - (1 - exact) ** (1 / n.double())
    most = int(n.max()) if len(n) else 1
    total = torch.zeros_like(exact)
    for i in range(1, most + 1):
        inner = sum((-1) ** k * math.comb(i - 1, k) / math.sqrt(k + 1) * each ** (k + 1) for k in range(i))
        total = torch.where(n >= i, total + inner, total)
    factor = exact / total
    return each.to(opacities), (factor[:, None] * scales.double()).to(scales)

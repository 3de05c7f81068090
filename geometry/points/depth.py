"""Depth that Gaussians imply, and how far measured depth is to be trusted."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def depth_confidence(image: Tensor, by: Literal["max", "quantile"] = "max") -> Tensor:
    """Return the confidence in measured depth at each pixel: 1 where the image is flat, 0 at its sharpest edge.

    ``1 - |lap I| / max |lap I|`` of the grey image: a range sensor a little out of line with the camera is wrong
    at edges first. (GTLR-GS, equation 9, as a reproduction cites it.)

    Args:
        image: [H, W] or [H, W, C], any range.
        by: ``"max"`` or the 99 % ``"quantile"`` (then clamped), which one pixel cannot move.

    Returns:
        [H, W] in [0, 1]; 1 everywhere for a constant image.

    Raises:
        ValueError: if ``by`` is unknown.
    """
    if by not in ("max", "quantile"):
        raise ValueError(f"depth_confidence(by={by!r}): must be 'max' or 'quantile'")
    grey = image if image.ndim == 2 else image.mean(-1)
    padded = F.pad(grey[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
    around = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    edge = (around - 4 * grey).abs()
    flat = edge.flatten().sort().values
    top = flat[-1] if by == "max" else flat[int(0.99 * (len(flat) - 1))]
    return 1 - (edge / top).clamp_max(1) if float(top) > 0 else torch.ones_like(edge)


def plane_depth(normal: Tensor, distance: Tensor, rays: Tensor, least: float = 0.1) -> Tensor:
    """Return the depth at which each pixel's ray meets the blended plane, NaN where it grazes it.

    ``sum w d / ((sum w n) . r)``: unbiased for flat Gaussians seen at a slant, where the mean of their centres' depths
    is not (PGSR, Chen et al. 2024; GTLR-GS, equation 8, as a reproduction cites it).

    Args:
        normal: blended normals [H, W, 3], camera axes.
        distance: blended ``n . mu`` [H, W].
        rays: ``K^-1 [u, v, 1]`` at pixel centres [H, W, 3].
        least: smallest ``|normal . ray|`` that counts.

    Returns:
        [H, W], camera z.
    """
    slope = (normal * rays).sum(-1)
    safe = slope.detach().abs() >= least
    depth = distance / torch.where(safe, slope, torch.ones_like(slope))
    return torch.where(safe, depth, torch.full_like(depth, torch.nan))

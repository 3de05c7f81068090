"""What a rendered view is compared by."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

LARGEST = 2.0
"""Residuals of depth are clamped here, in the unit of the scene: one wrong return must not rule."""
LEAST_ALPHA = 0.1
"""Where less is drawn, there is no depth to speak of."""


def photometric(image: Tensor, truth: Tensor, dssim: float) -> Tensor:
    """Return ``(1 - dssim) L1 + dssim (1 - SSIM)`` of images [H, W, 3] (Kerbl et al. 2023, equation 7)."""
    distance = (image - truth).abs().mean()
    return distance if dssim == 0 else (1 - dssim) * distance + dssim * (1 - ssim(image, truth))


def ssim(image: Tensor, truth: Tensor) -> Tensor:
    """Return the structural similarity of images [H, W, 3] in [0, 1]; smaller ones than its window are padded."""
    planes = [i.permute(2, 0, 1)[None] for i in (image, truth)]
    value: Any = structural_similarity_index_measure(planes[0], planes[1], data_range=1.0)
    return value


def depth_residual(depth: Tensor, alpha: Tensor, measured: Tensor, confidence: Tensor) -> Tensor:
    """Return the mean over measured pixels of ``confidence |measured - depth|`` (GTLR-GS, equation 10).

    Args:
        depth: [H, W]; what is not finite does not count.
        alpha: coverage [H, W].
        measured: [H, W], 0 where there is no return.
        confidence: [H, W].
    """
    counts = (measured > 0) & (alpha.detach() > LEAST_ALPHA) & depth.detach().isfinite()
    error = (torch.where(counts, depth, measured) - measured).abs().clamp_max(LARGEST)
    return (confidence * error).sum() / counts.sum().clamp_min(1)

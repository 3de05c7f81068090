"""How good a rendered view is."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from evolute.recipes.splatting.losses import ssim

SHOWN = 3
"""Held-out views whose renders are kept for the report."""


def picture(image: Tensor) -> Tensor:
    """Return an image as a file would hold it: clamped, in 256 levels."""
    return (image.clamp(0, 1) * 255).round() / 255


def image_scores(image: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Return PSNR in dB and SSIM of images [H, W, 3] in [0, 1]."""
    # Identical images have no finite ratio: half a level of error is the most that 8 bits can show.
    floor = torch.full_like(image, 0.5 / 255)
    psnr: Any = peak_signal_noise_ratio(image, truth, data_range=1.0)
    best: Any = peak_signal_noise_ratio(floor, torch.zeros_like(floor), data_range=1.0)
    return {"psnr": torch.minimum(psnr, best), "ssim": ssim(image, truth)}


class LPIPS:
    """Perceptual distance (VGG), where torchvision and the network's weights lie on this machine already."""

    def __init__(self) -> None:
        self._metric: Any = None
        self._asked = False

    def __call__(self, image: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """Return ``{"lpips": ...}`` of images [H, W, 3] in [0, 1], or nothing without the network."""
        if not self._asked:
            self._asked, self._metric = True, _network()
        if self._metric is None:
            return {}
        planes = [i.permute(2, 0, 1)[None].float() for i in (image, truth)]
        return {"lpips": self._metric.to(image.device)(*planes)}


def _network() -> Any:
    weights = list((Path(torch.hub.get_dir()) / "checkpoints").glob("vgg16-*.pth"))
    if importlib.util.find_spec("torchvision") is None or not weights:
        rank_zero_info("LPIPS is left out: it needs torchvision and the VGG weights in torch's hub folder")
        return None
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="vgg", normalize=True).eval()

"""Rendering on a GPU through gsplat."""

from typing import Any

from torch import Tensor

from evolute.models.splatting.scene import Camera, Gaussians


def render_gsplat(gaussians: Gaussians, camera: Camera) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return image [H, W, C], alpha [H, W] and gsplat's own info.

    Raises:
        ImportError: if gsplat is missing.
        ValueError: if the tensors are not on a GPU, which gsplat's kernels need.
    """
    if not gaussians.means.is_cuda:
        raise ValueError(f"render(backend='gsplat'): the tensors are on {gaussians.means.device}, gsplat needs CUDA")
    from gsplat import rasterization

    image, alpha, info = rasterization(
        gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities, gaussians.colors,
        camera.viewmat[None], camera.K[None], camera.width, camera.height, packed=False,
    )  # fmt: skip
    return image[0], alpha[0, ..., 0], info

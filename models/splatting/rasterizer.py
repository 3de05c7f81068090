"""One function that renders, whatever the device."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from evolute.models.splatting.scene import Camera, Gaussians
from evolute.models.splatting.tiles import TILE

Backend = Literal["auto", "gsplat", "numba", "torch"]


@dataclass(frozen=True)
class Rendered:
    """A rendered view.

    Attributes:
        image: blended channels [H, W, C] over black.
        alpha: coverage [H, W] in [0, 1).
        info: what gsplat's strategies ask for: ``means2d`` [1, N, 2] (its gradient can be retained), ``radii``
            [1, N, 2], ``depths`` [1, N], ``width``, ``height``, ``n_cameras``, ``gaussian_ids`` (None).
    """

    image: Tensor
    alpha: Tensor
    info: dict[str, Any]


def choose(gaussians: Gaussians, backend: Backend = "auto") -> Backend:
    """Return the backend that ``"auto"`` means for these tensors: by their device and dtype, never by what imports.

    Raises:
        ValueError: if the name is unknown, or the backend cannot take the tensors.
    """
    means = gaussians.means
    if backend not in ("auto", "gsplat", "numba", "torch"):
        raise ValueError(f"render(backend={backend!r}): must be 'auto', 'gsplat', 'numba' or 'torch'")
    fits = means.device.type == "cpu" and means.dtype == torch.float32
    if backend == "numba" and not fits:
        raise ValueError(f"render(backend='numba'): takes float32 on the CPU, got {means.dtype} on {means.device}")
    if backend != "auto":
        return backend
    return "gsplat" if means.is_cuda and means.dtype == torch.float32 else "numba" if fits else "torch"


def render(gaussians: Gaussians, camera: Camera, backend: Backend = "auto") -> Rendered:
    """Render Gaussians into one view, by the conventions of gsplat, differentiably in all of their tensors.

    Channels are whatever ``gaussians.colors`` holds: colour, depth and other terms come out of one pass. Pixels are
    read at their centres; a low-pass of 0.3 pixels^2 is added to every covariance; alpha is capped at 0.999, skipped
    below 1/255, and a pixel closes at a transmittance of 1e-4 (Kerbl et al. 2023, section 6; gsplat 1.5).

    Args:
        gaussians: what to render.
        camera: the view; brought to the dtype and device of the Gaussians.
        backend: ``"gsplat"`` (CUDA), ``"numba"`` (float32 on the CPU), ``"torch"`` (anything, slowly, the reference),
            or ``"auto"``.

    Raises:
        ValueError: if the backend cannot take the tensors.
        ImportError: if its library is missing, saying how to install it.
    """
    backend = choose(gaussians, backend)
    camera = camera.to(gaussians.means)
    if backend == "gsplat":
        from evolute.models.splatting.raster_gsplat import render_gsplat

        return Rendered(*render_gsplat(gaussians, camera))
    if backend == "numba":
        try:
            from evolute.models.splatting.projection_numba import project
            from evolute.models.splatting.raster_numba import blend
            from evolute.models.splatting.tiles_numba import tile_lists
        except ImportError as error:
            raise ImportError("render(backend='numba') needs numba: pip install evolute[splatting]") from error
    else:
        from evolute.models.splatting.projection import project
        from evolute.models.splatting.raster_torch import blend
        from evolute.models.splatting.tiles import tile_lists
    seen = project(gaussians, camera)
    # With a camera dimension in front: what gsplat's strategies index.
    means2d = seen.means2d[None]
    lists = tile_lists(seen.means2d.detach(), seen.radii, seen.depths.detach(), camera.width, camera.height)
    size = (camera.height, camera.width)
    image, alpha = blend(means2d[0], seen.conics, gaussians.opacities, gaussians.colors, lists, size)
    info = {
        "means2d": means2d, "radii": seen.radii[None], "depths": seen.depths[None], "gaussian_ids": None,
        "width": camera.width, "height": camera.height, "n_cameras": 1, "tile_size": TILE, "pairs": len(lists[0]),
    }  # fmt: skip
    return Rendered(image, alpha, info)

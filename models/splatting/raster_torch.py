"""Blending in plain torch: any dtype and device, the oracle of the others."""

import torch
from torch import Tensor

from evolute.models.splatting.projection import FAINT, OPAQUE, SPENT
from evolute.models.splatting.tiles import TILE


def blend(
    means2d: Tensor,
    conics: Tensor,
    opacities: Tensor,
    colors: Tensor,
    lists: tuple[Tensor, Tensor],
    size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Blend Gaussians front to back, tile by tile, over black.

    Args:
        means2d: [N, 2].
        conics: [N, 3].
        opacities: [N].
        colors: [N, C].
        lists: ids and offsets of :func:`evolute.models.splatting.tiles.tile_lists`.
        size: height and width in pixels.

    Returns:
        Image [H, W, C] and alpha [H, W].
    """
    ids, offsets = lists
    height, width = size
    bounds = offsets.tolist()
    rows: list[Tensor] = []
    for top in range(0, height, TILE):
        row: list[Tensor] = []
        for left in range(0, width, TILE):
            tile = (top // TILE) * -(-width // TILE) + left // TILE
            chosen = ids[bounds[tile] : bounds[tile + 1]]
            v = torch.arange(top, min(top + TILE, height), device=ids.device) + 0.5
            u = torch.arange(left, min(left + TILE, width), device=ids.device) + 0.5
            pixels = torch.stack(torch.meshgrid(u, v, indexing="xy"), -1).to(means2d)
            row.append(_blend_tile(pixels, means2d[chosen], conics[chosen], opacities[chosen], colors[chosen]))
        rows.append(torch.cat(row, 1))
    blended = torch.cat(rows, 0)
    return blended[..., :-1], blended[..., -1]


def _blend_tile(pixels: Tensor, means2d: Tensor, conics: Tensor, opacities: Tensor, colors: Tensor) -> Tensor:
    """Return colours and alpha [h, w, C + 1] of one tile."""
    delta = means2d - pixels[:, :, None]
    dx, dy = delta.unbind(-1)
    a, b, c = conics.unbind(-1)
    exponent = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
    alpha = (opacities * torch.exp(-exponent)).clamp_max(OPAQUE)
    alpha = torch.where((alpha >= FAINT) & (exponent >= 0), alpha, torch.zeros_like(alpha))
    after = torch.cumprod(1 - alpha, -1)
    alpha = torch.where(after > SPENT, alpha, torch.zeros_like(alpha))
    passed = torch.cumprod(1 - alpha, -1)
    before = torch.nn.functional.pad(passed, (1, 0), value=1.0)
    image = (alpha * before[..., :-1]) @ colors
    return torch.cat([image, 1 - before[..., -1:]], -1)

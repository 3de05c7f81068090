"""Which Gaussians touch which tile, front to back."""

import torch
from torch import Tensor

TILE = 16
"""Side of a tile in pixels."""


@torch.no_grad()
def tile_lists(means2d: Tensor, radii: Tensor, depths: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Return, tile by tile in rows, the Gaussians whose boxes touch it, sorted by depth.

    Equal depths keep the order of the Gaussians. No loops: repeat, one stable sort, count.

    Args:
        means2d: [N, 2] in pixels.
        radii: [N, 2], 0 for what is culled.
        depths: [N].
        width: of the image, in pixels.
        height: of the image.

    Returns:
        Gaussian ids [M] in int64, and offsets [tiles + 1] in int64: tile ``t`` has ``ids[offsets[t]:offsets[t + 1]]``.
    """
    across, down = -(-width // TILE), -(-height // TILE)
    seen = (radii > 0).all(-1).nonzero()[:, 0]
    seen = seen[torch.argsort(depths[seen], stable=True)]
    limit = torch.tensor([across, down], device=means2d.device)
    low = torch.floor((means2d[seen] - radii[seen]) / TILE).long().clamp_min(0).minimum(limit)
    high = torch.ceil((means2d[seen] + radii[seen]) / TILE).long().clamp_min(0).minimum(limit)
    wide, high_count = (high - low).unbind(-1)
    counts = wide * high_count
    ids = torch.repeat_interleave(seen, counts)
    begin = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    place = torch.arange(len(ids), device=ids.device) - begin
    row_length = torch.repeat_interleave(wide, counts)
    corner = torch.repeat_interleave(low, counts, dim=0)
    tile = (corner[:, 1] + place // row_length) * across + corner[:, 0] + place % row_length
    order = torch.argsort(tile, stable=True)
    sizes = torch.bincount(tile, minlength=across * down)
    return ids[order], torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])

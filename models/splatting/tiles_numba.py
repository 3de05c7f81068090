"""Tile lists on the CPU through compiled kernels: sorted by depth once, then counted out to the tiles."""

# Numba compiles most of what follows; to a type checker it is untyped.
# pyright: basic
import math

import numpy as np
import torch
from torch import Tensor

from evolute.models.splatting.compiled import inlined, serial
from evolute.models.splatting.tiles import TILE

_DIGIT, _PASSES = 11, 3  # bits of a key that one pass sorts by; 32 bits take three
_SIGN, _ALL = np.uint32(1 << 31), np.uint32(0xFFFFFFFF)


@inlined
def _box(means2d, radii, k, across, down):
    """Return the half-open ranges of columns and of rows of tiles that a Gaussian's box touches."""
    x, y = means2d[k, 0], means2d[k, 1]
    rx, ry = np.float32(radii[k, 0]), np.float32(radii[k, 1])
    size = np.float32(TILE)
    left = min(max(math.floor((x - rx) / size), 0), across)
    right = min(max(math.ceil((x + rx) / size), 0), across)
    top = min(max(math.floor((y - ry) / size), 0), down)
    bottom = min(max(math.ceil((y + ry) / size), 0), down)
    return left, right, top, bottom


@serial
def _by_depth(radii, bits):
    """Return who is drawn, nearest first, equal ones in their order, from the bits of their depths.

    A radix sort: as unsigned numbers, floats sort as they are if the bits of negative ones are turned over, and the
    sign of the others.
    """
    count = 0
    ids = np.empty(len(bits), np.int64)
    keys = np.empty(len(bits), np.uint32)
    for k in range(len(bits)):
        if (radii[k, 0] > 0) & (radii[k, 1] > 0):
            ids[count] = k
            keys[count] = bits[k] ^ (_ALL if bits[k] & _SIGN else _SIGN)
            count += 1
    ids, keys = ids[:count], keys[:count]
    other_ids, other_keys = np.empty_like(ids), np.empty_like(keys)
    for turn in range(_PASSES):
        shift, mask = np.uint32(turn * _DIGIT), np.uint32((1 << _DIGIT) - 1)
        starts = np.zeros((1 << _DIGIT) + 1, np.int64)
        for i in range(count):
            starts[((keys[i] >> shift) & mask) + 1] += 1
        for digit in range(1 << _DIGIT):
            starts[digit + 1] += starts[digit]
        for i in range(count):
            digit = (keys[i] >> shift) & mask
            other_ids[starts[digit]], other_keys[starts[digit]] = ids[i], keys[i]
            starts[digit] += 1
        ids, other_ids, keys, other_keys = other_ids, ids, other_keys, keys
    return ids


@serial
def _lists(means2d, radii, bits, across, down):
    """Return ids and offsets: count what each tile gets, then hand out, nearest first."""
    order = _by_depth(radii, bits)
    offsets = np.zeros(across * down + 1, np.int64)
    for k in order:
        left, right, top, bottom = _box(means2d, radii, k, across, down)
        for row in range(top, bottom):
            for tile in range(row * across + left, row * across + right):
                offsets[tile + 1] += 1
    for tile in range(across * down):
        offsets[tile + 1] += offsets[tile]
    ids, free = np.empty(offsets[-1], np.int64), offsets[:-1].copy()
    for k in order:
        left, right, top, bottom = _box(means2d, radii, k, across, down)
        for row in range(top, bottom):
            for tile in range(row * across + left, row * across + right):
                ids[free[tile]] = k
                free[tile] += 1
    return ids, offsets


@torch.no_grad()
def tile_lists(means2d: Tensor, radii: Tensor, depths: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Return what :func:`evolute.models.splatting.tiles.tile_lists` does, for float32 tensors on the CPU."""
    means, boxes, keys = (t.detach().contiguous().numpy() for t in (means2d, radii, depths))
    ids, offsets = _lists(means, boxes, keys.view(np.uint32), -(-width // TILE), -(-height // TILE))
    return torch.from_numpy(ids), torch.from_numpy(offsets)

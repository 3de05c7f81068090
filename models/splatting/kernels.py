"""Blending compiled for the CPU: one tile a task, Gaussians outside, rows of pixels inside.

A tile's state (transmittance, sums) stays in the innermost cache. The backward pass goes front to back as well: of what
a pixel adds up it keeps what lies *behind* the current Gaussian, starting from the finished image, so nothing but the
image is stored between the passes. Each (tile, Gaussian) pair has its own row of gradients: no atomics, the same bits
in every run.
"""

# Numba compiles what follows; to a type checker it is untyped.
# pyright: basic
import math
import types

import numba
import numpy as np

from evolute.models.splatting.projection import FAINT, OPAQUE, SPENT
from evolute.models.splatting.tiles import TILE

_FAST = {"reassoc", "contract", "nsz", "arcp", "afn"}  # not "nnan": what is not finite must come out as such
_MIDDLE = np.float32(-0.35)
_AT_MIDDLE = np.float32(math.exp(-0.35))
_FAINT, _OPAQUE, _SPENT = np.float32(FAINT), np.float32(OPAQUE), np.float32(SPENT)
_BEYOND = np.float32(5.6)  # exp(-5.6) is below 1/255: the polynomial holds up to here and nothing farther is drawn
_ROW, _AREA = np.uint64(TILE), np.uint64(TILE * TILE)
_2, _3, _4, _5, _6, _7, _8 = (np.uint64(k) for k in range(2, 9))
_ONE, _HALF, _ZERO, _EIGHTH = np.float32(1), np.float32(0.5), np.float32(0), np.float32(0.125)
_C2, _C3, _C4, _C5, _C6, _C7 = (np.float32(1 / math.factorial(k)) for k in range(2, 8))


@numba.njit(inline="always", fastmath=_FAST, error_model="numpy")
def _falloff(s):
    """Return exp(-s) for s in [0, 5.6], outside of which nothing is drawn, to 1e-6: no library call, so it vectorises.

    Taylor polynomial of exp(-s / 8) about the middle of its range, squared three times.
    """
    u = -s * _EIGHTH - _MIDDLE
    p = _C6 + u * _C7
    p = _C5 + u * p
    p = _C4 + u * p
    p = _C3 + u * p
    p = _C2 + u * p
    p = _ONE + u * p
    p = _AT_MIDDLE * (_ONE + u * p)
    p = p * p
    p = p * p
    return p * p


@numba.njit(inline="always", fastmath=_FAST, error_model="numpy")
def _span(center, half, origin, size):
    """Return the half-open range of a tile's pixels whose centres lie within ``half`` of ``center``."""
    low = max(0, math.ceil(center - half - _HALF) - origin)
    high = min(size, math.floor(center + half - _HALF) + 1 - origin)
    return (low, high) if low < high else (0, 0)


@numba.njit(inline="always")
def _open(state, rows, columns):
    """Set transmittance to 1 inside the image and to -1, closed, beyond it: there it is computed and not used."""
    for y in range(TILE):
        for x in range(TILE):
            state[y * TILE + x] = _ONE if (y < rows) & (x < columns) else -_ONE


# The loops over a row run over all of its pixels: the compiler then knows their number and makes vector instructions
# of them, which pays even where a Gaussian covers a few pixels only. For that it also has to see that nothing overlaps:
# what a loop writes lies in few flat arrays, at distances known to it, and is indexed without a sign. (A row taken out
# of a matrix would be counted as a reference, by an atomic instruction, each time.)


def _forward(means, conics, opacities, reach, colors, ids, offsets, image, passed):
    """Blend into ``image`` [H, W, C] and transmittance ``passed`` [H, W]; ``reach`` [N, 2] are half sizes in pixels."""
    height, width, channels = image.shape
    across = (width + TILE - 1) // TILE
    for tile in numba.prange(len(offsets) - 1):
        top, left = (tile // across) * TILE, (tile % across) * TILE
        rows, columns = min(TILE, height - top), min(TILE, width - left)
        light = np.empty(_AREA, np.float32)  # transmittance, negative once a pixel is closed
        _open(light, rows, columns)
        total = np.zeros(channels * TILE * TILE, np.float32)
        lanes = np.empty(2 * TILE, np.float32)  # weight, and x, pixel by pixel of a row
        for x in range(TILE):
            lanes[TILE + x] = x
        left_open = np.float32(rows * columns)
        for at in range(offsets[tile], offsets[tile + 1]):
            k = ids[at]
            mx, my, opacity = means[k, 0], means[k, 1], opacities[k]
            a, b, c = conics[k, 0] * _HALF, conics[k, 1], conics[k, 2] * _HALF
            y0, y1 = _span(my, reach[k, 1], top, rows)
            first = mx - (np.float32(left) + _HALF)
            closed = _ZERO
            for y in range(y0, y1):
                dy = my - (np.float32(top + y) + _HALF)
                cyy, by = c * dy * dy, b * dy
                row = np.uint64(y * TILE)
                for i in range(_ROW):
                    dx = first - lanes[i + _ROW]
                    s = (a * dx + by) * dx + cyy
                    before = light[row + i]
                    alpha = min(_OPAQUE, opacity * _falloff(s))
                    drawn = (alpha >= _FAINT) & (s >= _ZERO) & (s < _BEYOND) & (before > _ZERO)
                    after = before * (_ONE - alpha)
                    ends = drawn & (after <= _SPENT)
                    adds = drawn & (after > _SPENT)
                    lanes[i] = before * alpha if adds else _ZERO
                    light[row + i] = after if adds else (-before if ends else before)
                    closed += _ONE if ends else _ZERO
                for channel in range(channels):
                    color = colors[k, channel]
                    start = np.uint64(channel) * _AREA + row
                    for i in range(_ROW):
                        total[start + i] += lanes[i] * color
            left_open -= closed
            if left_open == _ZERO:
                break
        for y in range(rows):
            for x in range(columns):
                passed[top + y, left + x] = abs(light[y * TILE + x])
                for channel in range(channels):
                    image[top + y, left + x, channel] = total[channel * TILE * TILE + y * TILE + x]


def _backward(
    means, conics, opacities, reach, colors, ids, offsets, image, passed, image_grad, alpha_grad, rows_out
):  # fmt: skip
    """Fill ``rows_out`` [M, 6 + C], zero at entry: gradients of mean (2), conic (3), opacity, colours of each pair."""
    height, width, channels = image.shape
    across = (width + TILE - 1) // TILE
    for tile in numba.prange(len(offsets) - 1):
        top, left = (tile // across) * TILE, (tile % across) * TILE
        rows, columns = min(TILE, height - top), min(TILE, width - left)
        state = np.zeros(2 * TILE * TILE, np.float32)  # transmittance, and what lies behind
        _open(state, rows, columns)
        upstream = np.zeros(channels * TILE * TILE, np.float32)
        lanes = np.empty(9 * TILE, np.float32)  # upstream . colour, weight, six sums, x, pixel by pixel of a row
        for x in range(TILE):
            lanes[8 * TILE + x] = x
        tints = np.empty(channels * TILE, np.float32)
        for y in range(rows):
            for x in range(columns):
                rest = -passed[top + y, left + x] * alpha_grad[top + y, left + x]
                for channel in range(channels):
                    g = image_grad[top + y, left + x, channel]
                    upstream[channel * TILE * TILE + y * TILE + x] = g
                    rest += g * image[top + y, left + x, channel]
                state[TILE * TILE + y * TILE + x] = rest
        left_open = np.float32(rows * columns)
        for at in range(offsets[tile], offsets[tile + 1]):
            k = ids[at]
            mx, my, opacity = means[k, 0], means[k, 1], opacities[k]
            a, b, c = conics[k, 0] * _HALF, conics[k, 1], conics[k, 2] * _HALF
            y0, y1 = _span(my, reach[k, 1], top, rows)
            first = mx - (np.float32(left) + _HALF)
            lanes[: 8 * TILE] = _ZERO
            tints[:] = _ZERO
            closed = _ZERO
            for y in range(y0, y1):
                dy = my - (np.float32(top + y) + _HALF)
                cyy, by = c * dy * dy, b * dy
                row = np.uint64(y * TILE)
                for i in range(_ROW):
                    lanes[i] = _ZERO
                for channel in range(channels):
                    color = colors[k, channel]
                    start = np.uint64(channel) * _AREA + row
                    for i in range(_ROW):
                        lanes[i] += upstream[start + i] * color
                for i in range(_ROW):
                    dx = first - lanes[i + _ROW * _8]
                    s = (a * dx + by) * dx + cyy
                    before = state[row + i]
                    falloff = _falloff(s)
                    alpha = min(_OPAQUE, opacity * falloff)
                    drawn = (alpha >= _FAINT) & (s >= _ZERO) & (s < _BEYOND) & (before > _ZERO)
                    after = before * (_ONE - alpha)
                    ends = drawn & (after <= _SPENT)
                    adds = drawn & (after > _SPENT)
                    w = before * alpha if adds else _ZERO
                    rest = state[row + i + _AREA] - w * lanes[i]
                    by_alpha = before * lanes[i] - rest / (_ONE - alpha)
                    by_alpha = by_alpha if adds & (alpha < _OPAQUE) else _ZERO
                    by_s = -by_alpha * alpha
                    state[row + i] = after if adds else (-before if ends else before)
                    state[row + i + _AREA] = rest
                    lanes[i + _ROW] = w
                    lanes[i + _ROW * _2] += by_s * dx
                    lanes[i + _ROW * _3] += by_s * dy
                    lanes[i + _ROW * _4] += by_s * dx * dx
                    lanes[i + _ROW * _5] += by_s * dx * dy
                    lanes[i + _ROW * _6] += by_s * dy * dy
                    lanes[i + _ROW * _7] += by_alpha * falloff if adds else _ZERO
                    closed += _ONE if ends else _ZERO
                for channel in range(channels):
                    start, tint = np.uint64(channel) * _AREA + row, np.uint64(channel) * _ROW
                    for i in range(_ROW):
                        tints[tint + i] += lanes[i + _ROW] * upstream[start + i]
            sum_x, sum_y = _added(lanes, 2), _added(lanes, 3)
            rows_out[at, 0] = conics[k, 0] * sum_x + b * sum_y
            rows_out[at, 1] = b * sum_x + conics[k, 2] * sum_y
            rows_out[at, 2] = _HALF * _added(lanes, 4)
            rows_out[at, 3] = _added(lanes, 5)
            rows_out[at, 4] = _HALF * _added(lanes, 6)
            rows_out[at, 5] = _added(lanes, 7)
            for channel in range(channels):
                rows_out[at, 6 + channel] = _added(tints, channel)
            left_open -= closed
            if left_open == _ZERO:
                break


@numba.njit(inline="always", fastmath=_FAST)
def _added(lanes, row):
    """Return the sum over row ``row`` of ``lanes``."""
    total = _ZERO
    for i in range(TILE):
        total += lanes[row * TILE + i]
    return total


@numba.njit(cache=True)
def add_rows(ids, rows, out):
    """Add row ``m`` of ``rows`` [M, F] to ``out[ids[m]]``, in order."""
    for at in range(len(ids)):
        k = ids[at]
        for f in range(rows.shape[1]):
            out[k, f] += rows[at, f]


def _compiled(function, parallel):
    # A copy with a name of its own: Numba's cache on disk tells functions apart by name, not by their options.
    copy = types.FunctionType(function.__code__, function.__globals__, function.__name__)
    copy.__qualname__ = f"{function.__name__}_{'parallel' if parallel else 'serial'}"
    return numba.njit(parallel=parallel, cache=True, fastmath=_FAST, error_model="numpy")(copy)


# By one thread or by several. A pool of one would do, but its idle threads spin beside those of torch.
forward = {parallel: _compiled(_forward, parallel) for parallel in (False, True)}
backward = {parallel: _compiled(_backward, parallel) for parallel in (False, True)}

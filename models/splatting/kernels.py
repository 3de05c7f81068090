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
    return low, high


def _forward(means, conics, opacities, reach, colors, ids, offsets, image, passed):
    """Blend into ``image`` [H, W, C] and transmittance ``passed`` [H, W]; ``reach`` [N, 2] are half sizes in pixels."""
    height, width, channels = image.shape
    across = (width + TILE - 1) // TILE
    for tile in numba.prange(len(offsets) - 1):
        top, left = (tile // across) * TILE, (tile % across) * TILE
        rows, columns = min(TILE, height - top), min(TILE, width - left)
        light = np.ones((TILE, TILE), np.float32)
        live = np.ones((TILE, TILE), np.float32)
        total = np.zeros((channels, TILE, TILE), np.float32)
        weight = np.empty(TILE, np.float32)
        left_open = rows * columns
        for at in range(offsets[tile], offsets[tile + 1]):
            k = ids[at]
            mx, my, opacity = means[k, 0], means[k, 1], opacities[k]
            a, b, c = conics[k, 0] * _HALF, conics[k, 1], conics[k, 2] * _HALF
            x0, x1 = _span(mx, reach[k, 0], left, columns)
            y0, y1 = _span(my, reach[k, 1], top, rows)
            for y in range(y0, y1):
                dy = my - (np.float32(top + y) + _HALF)
                cyy, by = c * dy * dy, b * dy
                closed = 0
                for x in range(x0, x1):
                    dx = mx - (np.float32(left + x) + _HALF)
                    s = (a * dx + by) * dx + cyy
                    alpha = min(_OPAQUE, opacity * _falloff(s))
                    drawn = (alpha >= _FAINT) & (s >= _ZERO) & (s < _BEYOND) & (live[y, x] > _ZERO)
                    after = light[y, x] * (_ONE - alpha)
                    ends = drawn & (after <= _SPENT)
                    adds = drawn & (after > _SPENT)
                    weight[x] = light[y, x] * alpha if adds else _ZERO
                    light[y, x] = after if adds else light[y, x]
                    live[y, x] = _ZERO if ends else live[y, x]
                    closed += 1 if ends else 0
                left_open -= closed
                for channel in range(channels):
                    color = colors[k, channel]
                    for x in range(x0, x1):
                        total[channel, y, x] += weight[x] * color
            if left_open == 0:
                break
        for y in range(rows):
            for x in range(columns):
                passed[top + y, left + x] = light[y, x]
                for channel in range(channels):
                    image[top + y, left + x, channel] = total[channel, y, x]


def _backward(
    means, conics, opacities, reach, colors, ids, offsets, image, passed, image_grad, alpha_grad, rows_out
):  # fmt: skip
    """Fill ``rows_out`` [M, 6 + C], zero at entry: gradients of mean (2), conic (3), opacity, colours of each pair."""
    height, width, channels = image.shape
    across = (width + TILE - 1) // TILE
    for tile in numba.prange(len(offsets) - 1):
        top, left = (tile // across) * TILE, (tile % across) * TILE
        rows, columns = min(TILE, height - top), min(TILE, width - left)
        light = np.ones((TILE, TILE), np.float32)
        live = np.ones((TILE, TILE), np.float32)
        behind = np.empty((TILE, TILE), np.float32)
        upstream = np.empty((channels, TILE, TILE), np.float32)
        weight, dot = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
        for y in range(rows):
            for x in range(columns):
                rest = -passed[top + y, left + x] * alpha_grad[top + y, left + x]
                for channel in range(channels):
                    g = image_grad[top + y, left + x, channel]
                    upstream[channel, y, x] = g
                    rest += g * image[top + y, left + x, channel]
                behind[y, x] = rest
        left_open = rows * columns
        for at in range(offsets[tile], offsets[tile + 1]):
            k = ids[at]
            mx, my, opacity = means[k, 0], means[k, 1], opacities[k]
            a, b, c = conics[k, 0] * _HALF, conics[k, 1], conics[k, 2] * _HALF
            x0, x1 = _span(mx, reach[k, 0], left, columns)
            y0, y1 = _span(my, reach[k, 1], top, rows)
            sum_x = sum_y = sum_xx = sum_xy = sum_yy = sum_o = _ZERO
            for y in range(y0, y1):
                dy = my - (np.float32(top + y) + _HALF)
                cyy, by = c * dy * dy, b * dy
                for x in range(x0, x1):
                    dot[x] = _ZERO
                for channel in range(channels):
                    color = colors[k, channel]
                    for x in range(x0, x1):
                        dot[x] += upstream[channel, y, x] * color
                closed = 0
                row = row_x = row_xx = row_o = _ZERO
                for x in range(x0, x1):
                    dx = mx - (np.float32(left + x) + _HALF)
                    s = (a * dx + by) * dx + cyy
                    falloff = _falloff(s)
                    alpha = min(_OPAQUE, opacity * falloff)
                    drawn = (alpha >= _FAINT) & (s >= _ZERO) & (s < _BEYOND) & (live[y, x] > _ZERO)
                    after = light[y, x] * (_ONE - alpha)
                    ends = drawn & (after <= _SPENT)
                    adds = drawn & (after > _SPENT)
                    w = light[y, x] * alpha if adds else _ZERO
                    weight[x] = w
                    behind[y, x] -= w * dot[x]
                    by_alpha = light[y, x] * dot[x] - behind[y, x] / (_ONE - alpha)
                    by_alpha = by_alpha if adds & (opacity * falloff < _OPAQUE) else _ZERO
                    by_s = -by_alpha * alpha
                    row += by_s
                    row_x += by_s * dx
                    row_xx += by_s * dx * dx
                    row_o += by_alpha * falloff
                    light[y, x] = after if adds else light[y, x]
                    live[y, x] = _ZERO if ends else live[y, x]
                    closed += 1 if ends else 0
                left_open -= closed
                sum_x += row_x
                sum_y += row * dy
                sum_xx += row_xx
                sum_xy += row_x * dy
                sum_yy += row * dy * dy
                sum_o += row_o
                for channel in range(channels):
                    g = _ZERO
                    for x in range(x0, x1):
                        g += weight[x] * upstream[channel, y, x]
                    rows_out[at, 6 + channel] += g
            rows_out[at, 0] = conics[k, 0] * sum_x + b * sum_y
            rows_out[at, 1] = b * sum_x + conics[k, 2] * sum_y
            rows_out[at, 2] = _HALF * sum_xx
            rows_out[at, 3] = sum_xy
            rows_out[at, 4] = _HALF * sum_yy
            rows_out[at, 5] = sum_o
            if left_open == 0:
                break


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

"""Blending compiled for the CPU: one tile a task, Gaussians outside, pixels inside.

A tile's state (transmittance, sums) stays in the innermost cache. The backward pass goes front to back as well: of what
a pixel adds up it keeps what lies *behind* the current Gaussian, starting from the finished image, so nothing but the
image is stored between the passes. Several threads give each (tile, Gaussian) pair a row of gradients of its own, one
thread adds them up as it goes: no atomics, the same bits in every run.
"""

# Numba compiles what follows; to a type checker it is untyped.
# pyright: basic
import math

import numba
import numpy as np

from evolute.models.splatting.compiled import by_threads, inlined, serial
from evolute.models.splatting.projection import FAINT, OPAQUE, SPENT
from evolute.models.splatting.tiles import TILE

_MIDDLE = np.float32(-0.35)
_AT_MIDDLE = np.float32(math.exp(-0.35))
_FAINT, _OPAQUE, _SPENT = np.float32(FAINT), np.float32(OPAQUE), np.float32(SPENT)
_BEYOND = np.float32(5.6)  # exp(-5.6) is below 1/255: the polynomial holds up to here and nothing farther is drawn
PATCH = (4, 4)
"""Rows and columns of pixels that are worked on at once: 16, for vector instructions."""
_DOWN, _ACROSS = PATCH
_LANES = _DOWN * _ACROSS
_W, _AREA = np.uint64(_LANES), np.uint64(TILE * TILE)
_2, _3, _4, _5, _6, _7, _8, _9 = (np.uint64(k * _LANES) for k in range(2, 10))
GROUP = 4
"""Channels that are worked on at once; colours come padded to a multiple."""
_2AREA, _3AREA = np.uint64(2) * _AREA, np.uint64(3) * _AREA
_ONE, _HALF, _ZERO, _EIGHTH = np.float32(1), np.float32(0.5), np.float32(0), np.float32(0.125)
_C2, _C3, _C4, _C5, _C6, _C7 = (np.float32(1 / math.factorial(k)) for k in range(2, 8))
_PATIENCE = 16  # Gaussians between two looks at whether a tile has a pixel left that is open


@inlined
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


@inlined
def _span(center, half, origin, size):
    """Return the half-open range of a tile's pixels whose centres lie within ``half`` of ``center``."""
    low = max(0, math.ceil(center - half - _HALF) - origin)
    high = min(size, math.floor(center + half - _HALF) + 1 - origin)
    return (low, high) if low < high else (0, 0)


@inlined
def _place(y, x):
    """Return where a tile keeps a pixel: patch by patch, and row by row in it."""
    patch = y // _DOWN * (TILE // _ACROSS) + x // _ACROSS
    return patch * _LANES + y % _DOWN * _ACROSS + x % _ACROSS


@inlined
def _patches(center, half, origin, size, side):
    """Return the half-open range of a tile's patches, ``side`` pixels wide, that :func:`_span` touches."""
    low, high = _span(center, half, origin, size)
    return low // side, (high + side - 1) // side


@inlined
def _open(state, rows, columns):
    """Set transmittance to 1 inside the image and to -1, closed, beyond it: there it is computed and not used."""
    for y in range(TILE):
        for x in range(TILE):
            state[_place(y, x)] = _ONE if (y < rows) & (x < columns) else -_ONE


@inlined
def _number(lanes, at):
    """Write the row and the column of each pixel of a patch behind ``at``."""
    for i in range(_LANES):
        lanes[at + i] = i // _ACROSS
        lanes[at + _LANES + i] = i % _ACROSS


@inlined
def _any_open(state):
    """Say whether a tile's transmittance, the first of its state, is still positive anywhere."""
    count = _ZERO
    for i in range(TILE * TILE):
        count += _ONE if state[i] > _ZERO else _ZERO
    return count > _ZERO


# The loops over pixels run over as many as make a patch: the compiler then knows their number and makes vector
# instructions of them. For that it has to see that nothing overlaps: what a loop writes lies in few flat arrays, at
# distances known to it, and is indexed without a sign. A short body would be unrolled first and stay scalar, which is
# why channels come in groups. (A row taken out of a matrix would be counted as a reference, by an atomic instruction.)


@inlined
def _add_colors(total, lanes, colors, k, pixel):
    """Add one Gaussian's colours, by the weights in the lanes, to the sums of a patch."""
    for group in range(0, colors.shape[1], GROUP):
        c0, c1, c2, c3 = colors[k, group], colors[k, group + 1], colors[k, group + 2], colors[k, group + 3]
        start = np.uint64(group) * _AREA + pixel
        for i in range(_W):
            w = lanes[i]
            total[start + i] += w * c0
            total[start + _AREA + i] += w * c1
            total[start + _2AREA + i] += w * c2
            total[start + _3AREA + i] += w * c3


def _forward(means, conics, opacities, reach, colors, ids, offsets, image, passed):
    """Blend into ``image`` [H, W, C] and transmittance ``passed`` [H, W]; ``reach`` [N, 2] are half sizes in pixels."""
    height, width, channels = image.shape
    across = (width + TILE - 1) // TILE
    for tile in numba.prange(len(offsets) - 1):
        top, left = (tile // across) * TILE, (tile % across) * TILE
        rows, columns = min(TILE, height - top), min(TILE, width - left)
        light = np.empty(_AREA, np.float32)  # transmittance, negative once a pixel is closed
        _open(light, rows, columns)
        total = np.zeros(colors.shape[1] * TILE * TILE, np.float32)
        lanes = np.empty(3 * _LANES, np.float32)  # weight, row, column
        _number(lanes, _LANES)
        for at in range(offsets[tile], offsets[tile + 1]):
            if (at - offsets[tile]) % _PATIENCE == _PATIENCE - 1 and not _any_open(light):
                break
            k = ids[at]
            mx, my, opacity = means[k, 0], means[k, 1], opacities[k]
            a, b, c = conics[k, 0] * _HALF, conics[k, 1], conics[k, 2] * _HALF
            y0, y1 = _patches(my, reach[k, 1], top, rows, _DOWN)
            x0, x1 = _patches(mx, reach[k, 0], left, columns, _ACROSS)
            for y in range(y0, y1):
                for x in range(x0, x1):
                    first_x = mx - (np.float32(left + x * _ACROSS) + _HALF)
                    first_y = my - (np.float32(top + y * _DOWN) + _HALF)
                    pixel = np.uint64((y * (TILE // _ACROSS) + x) * _LANES)
                    for i in range(_W):
                        dy, dx = first_y - lanes[i + _W], first_x - lanes[i + _2]
                        s = (a * dx + b * dy) * dx + c * dy * dy
                        before = light[pixel + i]
                        alpha = min(_OPAQUE, opacity * _falloff(s))
                        drawn = (alpha >= _FAINT) & (s >= _ZERO) & (s < _BEYOND) & (before > _ZERO)
                        after = before * (_ONE - alpha)
                        ends = drawn & (after <= _SPENT)
                        adds = drawn & (after > _SPENT)
                        lanes[i] = before * alpha if adds else _ZERO
                        light[pixel + i] = after if adds else (-before if ends else before)
                    _add_colors(total, lanes, colors, k, pixel)
        for y in range(rows):
            for x in range(columns):
                passed[top + y, left + x] = abs(light[_place(y, x)])
                for channel in range(channels):
                    image[top + y, left + x, channel] = total[channel * TILE * TILE + _place(y, x)]


@inlined
def _behind(image, passed, image_grad, alpha_grad, top, left, rows, columns, state, upstream):
    """Fill a tile's upstream gradients, channel by channel, and what lies behind everything: the whole image."""
    for y in range(rows):
        for x in range(columns):
            rest = -passed[top + y, left + x] * alpha_grad[top + y, left + x]
            for channel in range(image.shape[2]):
                g = image_grad[top + y, left + x, channel]
                upstream[channel * TILE * TILE + _place(y, x)] = g
                rest += g * image[top + y, left + x, channel]
            state[TILE * TILE + _place(y, x)] = rest


@inlined
def _patch_backward(state, upstream, lanes, tints, colors, k, pixel, first_y, first_x, a, b, c, opacity):
    """Take one Gaussian off the state of a patch, and add to the lanes what its pixels say of it."""
    for i in range(_W):
        lanes[i] = _ZERO
    for group in range(0, colors.shape[1], GROUP):
        c0, c1, c2, c3 = colors[k, group], colors[k, group + 1], colors[k, group + 2], colors[k, group + 3]
        start = np.uint64(group) * _AREA + pixel
        for i in range(_W):
            lanes[i] += (
                upstream[start + i] * c0
                + upstream[start + _AREA + i] * c1
                + upstream[start + _2AREA + i] * c2
                + upstream[start + _3AREA + i] * c3
            )
    for i in range(_W):
        dy, dx = first_y - lanes[i + _8], first_x - lanes[i + _9]
        s = (a * dx + b * dy) * dx + c * dy * dy
        before = state[pixel + i]
        falloff = _falloff(s)
        alpha = min(_OPAQUE, opacity * falloff)
        drawn = (alpha >= _FAINT) & (s >= _ZERO) & (s < _BEYOND) & (before > _ZERO)
        after = before * (_ONE - alpha)
        ends = drawn & (after <= _SPENT)
        adds = drawn & (after > _SPENT)
        w = before * alpha if adds else _ZERO
        rest = state[pixel + i + _AREA] - w * lanes[i]
        by_alpha = before * lanes[i] - rest / (_ONE - alpha)
        by_alpha = by_alpha if adds & (alpha < _OPAQUE) else _ZERO
        by_s = -by_alpha * alpha
        state[pixel + i] = after if adds else (-before if ends else before)
        state[pixel + i + _AREA] = rest
        lanes[i + _W] = w
        lanes[i + _2] += by_s * dx
        lanes[i + _3] += by_s * dy
        lanes[i + _4] += by_s * dx * dx
        lanes[i + _5] += by_s * dx * dy
        lanes[i + _6] += by_s * dy * dy
        lanes[i + _7] += by_alpha * falloff if adds else _ZERO
    for group in range(0, colors.shape[1], GROUP):
        start, tint = np.uint64(group) * _AREA + pixel, np.uint64(group) * _W
        for i in range(_W):
            w = lanes[i + _W]
            tints[tint + i] += w * upstream[start + i]
            tints[tint + _W + i] += w * upstream[start + _AREA + i]
            tints[tint + _2 + i] += w * upstream[start + _2AREA + i]
            tints[tint + _3 + i] += w * upstream[start + _3AREA + i]


@inlined
def _added(lanes, row):
    """Return the sum over row ``row`` of ``lanes``."""
    total = _ZERO
    for i in range(_LANES):
        total += lanes[row * _LANES + i]
    return total


@inlined
def _collect(lanes, tints, conics, k, out, at):
    """Add what the pixels of a tile said of one Gaussian to a row: mean (2), conic (3), opacity, colours."""
    sum_x, sum_y = _added(lanes, 2), _added(lanes, 3)
    out[at, 0] += conics[k, 0] * sum_x + conics[k, 1] * sum_y
    out[at, 1] += conics[k, 1] * sum_x + conics[k, 2] * sum_y
    out[at, 2] += _HALF * _added(lanes, 4)
    out[at, 3] += _added(lanes, 5)
    out[at, 4] += _HALF * _added(lanes, 6)
    out[at, 5] += _added(lanes, 7)
    for channel in range(out.shape[1] - 6):
        out[at, 6 + channel] += _added(tints, channel)


def _backward(
    means, conics, opacities, reach, colors, ids, offsets, image, passed, image_grad, alpha_grad, pairs, rows_out
):  # fmt: skip
    """Add gradients of mean (2), conic (3), opacity and colours to ``rows_out``: a row a pair if ``pairs``, else a
    row a Gaussian, which only one thread may do.
    """
    height, width, _ = image.shape
    across = (width + TILE - 1) // TILE
    for tile in numba.prange(len(offsets) - 1):
        top, left = (tile // across) * TILE, (tile % across) * TILE
        rows, columns = min(TILE, height - top), min(TILE, width - left)
        state = np.zeros(2 * TILE * TILE, np.float32)  # transmittance, and what lies behind
        _open(state, rows, columns)
        upstream = np.zeros(colors.shape[1] * TILE * TILE, np.float32)
        _behind(image, passed, image_grad, alpha_grad, top, left, rows, columns, state, upstream)
        lanes = np.empty(10 * _LANES, np.float32)  # upstream . colour, weight, six sums, row, column
        _number(lanes, 8 * _LANES)
        tints = np.empty(colors.shape[1] * _LANES, np.float32)
        for at in range(offsets[tile], offsets[tile + 1]):
            if (at - offsets[tile]) % _PATIENCE == _PATIENCE - 1 and not _any_open(state):
                break
            k = ids[at]
            y0, y1 = _patches(means[k, 1], reach[k, 1], top, rows, _DOWN)
            x0, x1 = _patches(means[k, 0], reach[k, 0], left, columns, _ACROSS)
            lanes[: 8 * _LANES] = _ZERO
            tints[:] = _ZERO
            a, b, c = conics[k, 0] * _HALF, conics[k, 1], conics[k, 2] * _HALF
            for y in range(y0, y1):
                for x in range(x0, x1):
                    first_x = means[k, 0] - (np.float32(left + x * _ACROSS) + _HALF)
                    first_y = means[k, 1] - (np.float32(top + y * _DOWN) + _HALF)
                    pixel = np.uint64((y * (TILE // _ACROSS) + x) * _LANES)
                    _patch_backward(
                        state, upstream, lanes, tints, colors, k, pixel, first_y, first_x, a, b, c, opacities[k]
                    )
            _collect(lanes, tints, conics, k, rows_out, at if pairs else k)


@serial
def add_rows(ids, rows, out):
    """Add row ``m`` of ``rows`` [M, F] to ``out[ids[m]]``, in order."""
    for at in range(len(ids)):
        k = ids[at]
        for f in range(rows.shape[1]):
            out[k, f] += rows[at, f]


@serial
def half_sizes(conics, opacities, reach):
    """Fill ``reach`` [N, 2]: half of the box around the ellipse of alpha 1/255, negative where alpha never is that."""
    for k in range(len(conics)):
        a, b, c = np.float64(conics[k, 0]), np.float64(conics[k, 1]), np.float64(conics[k, 2])
        farthest = math.log(np.float64(opacities[k]) * 255)
        det = max(a * c - b * b, 1e-20)
        if farthest < 0:
            reach[k, 0] = reach[k, 1] = -1
        else:  # A hair more, so that rounding never decides against the test on alpha itself.
            x, y = math.sqrt(2 * farthest * c / det), math.sqrt(2 * farthest * a / det)
            reach[k, 0] = x * (1 + 1e-5) + 1e-3 if x < 1e6 else 1e6
            reach[k, 1] = y * (1 + 1e-5) + 1e-3 if y < 1e6 else 1e6


forward, backward = by_threads(_forward), by_threads(_backward)

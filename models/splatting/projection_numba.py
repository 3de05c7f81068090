"""Projection on the CPU through compiled kernels, with a backward pass by hand.

The same formulas as :func:`evolute.models.splatting.projection.project`, a Gaussian at a time and in float64 between
float32 inputs and outputs, which costs nothing here and loses nothing on Gaussians far longer than wide. The backward
pass computes the forward pass again: nothing but the inputs is kept.
"""

# Numba compiles most of what follows; to a type checker it is untyped.
# pyright: basic
import math
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

from evolute.models.splatting.compiled import by_threads, inlined, several_threads
from evolute.models.splatting.projection import LOW_PASS, SIGMAS, Projected
from evolute.models.splatting.projection import project as project_torch
from evolute.models.splatting.scene import Camera, Gaussians

_LEAST_DET = 1e-10
_LEAST_NORM = 1e-12  # of a quaternion, as torch's normalize has it
_NEAR, _FAR = 0.01, 1e10


@inlined
def _local(view, mean):
    """Return a world point in camera coordinates; ``view`` [3, 4] is a tuple of its twelve entries, by rows."""
    a, b, c = np.float64(mean[0]), np.float64(mean[1]), np.float64(mean[2])
    return (
        view[0] * a + view[1] * b + view[2] * c + view[3],
        view[4] * a + view[5] * b + view[6] * c + view[7],
        view[8] * a + view[9] * b + view[10] * c + view[11],
    )


@inlined
def _unit(quat):
    """Return a quaternion at length 1, and its length."""
    w, x, y, z = np.float64(quat[0]), np.float64(quat[1]), np.float64(quat[2]), np.float64(quat[3])
    norm = max(math.sqrt(w * w + x * x + y * y + z * z), _LEAST_NORM)
    return w / norm, x / norm, y / norm, z / norm, norm


@inlined
def _turn(w, x, y, z):
    """Return the rotation matrix of a unit quaternion, by rows."""
    return (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip


@inlined
def _times(a0, a1, a2, m):
    """Return the row (a0, a1, a2) times a 3 x 3 matrix given by rows."""
    return (
        a0 * m[0] + a1 * m[3] + a2 * m[6],
        a0 * m[1] + a1 * m[4] + a2 * m[7],
        a0 * m[2] + a1 * m[5] + a2 * m[8],
    )


@inlined
def _times_transposed(a0, a1, a2, m):
    """Return the row (a0, a1, a2) times the transpose of a 3 x 3 matrix given by rows."""
    return (
        a0 * m[0] + a1 * m[1] + a2 * m[2],
        a0 * m[3] + a1 * m[4] + a2 * m[5],
        a0 * m[6] + a1 * m[7] + a2 * m[8],
    )


@inlined
def _held(ratio, low, high):
    """Return a ratio kept within the widened field of view."""
    return min(max(ratio, low), high)


@inlined
def _covariance(row_x, row_y, scales):
    """Return xx, xy, yy of the image-space covariance from the rows of Jacobian times both rotations."""
    x0, x1, x2 = row_x[0] * scales[0], row_x[1] * scales[1], row_x[2] * scales[2]
    y0, y1, y2 = row_y[0] * scales[0], row_y[1] * scales[1], row_y[2] * scales[2]
    return (
        x0 * x0 + x1 * x1 + x2 * x2 + LOW_PASS,
        x0 * y0 + x1 * y1 + x2 * y2,
        y0 * y0 + y1 * y1 + y2 * y2 + LOW_PASS,
    )


def _forward(means, scales, quats, view, lens, means2d, conics, depths, radii):
    """Fill ``means2d`` [N, 2], ``conics`` [N, 3], ``depths`` [N] and ``radii`` [N, 2].

    ``view`` holds the entries of the upper rows of the view matrix [12], ``lens`` fx, fy, cx, cy, the bounds of x/z
    and of y/z, width and height [10].
    """
    v = _twelve(view)
    w = (v[0], v[1], v[2], v[4], v[5], v[6], v[8], v[9], v[10])
    fx, fy, cx, cy = lens[0], lens[1], lens[2], lens[3]
    for k in numba.prange(len(means)):
        x, y, depth = _local(v, means[k])
        visible = (depth > _NEAR) & (depth < _FAR)
        z = depth if visible else 1.0
        at_x, at_y = x / z, y / z
        held_x, held_y = _held(at_x, lens[4], lens[5]), _held(at_y, lens[6], lens[7])
        qw, qx, qy, qz, _ = _unit(quats[k])
        turn = _turn(qw, qx, qy, qz)
        ax = _times(fx / z, 0.0, -fx * held_x / z, w)
        ay = _times(0.0, fy / z, -fy * held_y / z, w)
        row_x, row_y = _times(ax[0], ax[1], ax[2], turn), _times(ay[0], ay[1], ay[2], turn)
        a, b, c = _covariance(row_x, row_y, scales[k])
        det = max(a * c - b * b, _LEAST_DET)
        conics[k, 0], conics[k, 1], conics[k, 2] = c / det, -b / det, a / det
        px, py = fx * at_x + cx, fy * at_y + cy
        means2d[k, 0], means2d[k, 1], depths[k] = px, py, depth
        rx, ry = math.ceil(SIGMAS * math.sqrt(a)), math.ceil(SIGMAS * math.sqrt(c))
        inside = (px + rx > 0) & (py + ry > 0) & (px - rx < lens[8]) & (py - ry < lens[9])
        drawn = visible & inside & (rx < 2.0**31) & (ry < 2.0**31)
        radii[k, 0], radii[k, 1] = (np.int32(rx), np.int32(ry)) if drawn else (np.int32(0), np.int32(0))


@inlined
def _twelve(v):
    return v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11]


@inlined
def _conic_backward(a, b, c, g):
    """Return the gradients of xx, xy, yy of a covariance from those of its inverse."""
    raw = a * c - b * b
    det = max(raw, _LEAST_DET)
    by_det = -(g[0] * c - g[1] * b + g[2] * a) / (det * det) if raw > _LEAST_DET else 0.0
    return g[2] / det + by_det * c, -g[1] / det - 2 * b * by_det, g[0] / det + by_det * a


@inlined
def _turn_backward(w, x, y, z, norm, g):
    """Return the gradient of a quaternion of length ``norm`` from that of its rotation matrix, by rows."""
    gw = 2 * (z * (g[3] - g[1]) + y * (g[2] - g[6]) + x * (g[7] - g[5]))
    gx = 2 * (y * (g[1] + g[3]) + z * (g[2] + g[6]) + w * (g[7] - g[5]) - 2 * x * (g[4] + g[8]))
    gy = 2 * (x * (g[1] + g[3]) + z * (g[5] + g[7]) + w * (g[2] - g[6]) - 2 * y * (g[0] + g[8]))
    gz = 2 * (x * (g[2] + g[6]) + y * (g[5] + g[7]) + w * (g[3] - g[1]) - 2 * z * (g[0] + g[4]))
    along = w * gw + x * gx + y * gy + z * gz  # the length is divided out: nothing changes along it
    return (gw - w * along) / norm, (gx - x * along) / norm, (gy - y * along) / norm, (gz - z * along) / norm


@inlined
def _jacobian_backward(gx, gy, w, fx, fy, z, held):
    """Return the gradients of x/z and y/z as held, and of z, from those of Jacobian times rotation, by rows."""
    x0, _, x2 = _times_transposed(gx[0], gx[1], gx[2], w)
    _, y1, y2 = _times_transposed(gy[0], gy[1], gy[2], w)
    by_z = (fx * (held[0] * x2 - x0) + fy * (held[1] * y2 - y1)) / (z * z)
    return -fx * x2 / z, -fy * y2 / z, by_z


def _backward(
    means, scales, quats, view, lens, means2d_grad, conics_grad, depths_grad, means_grad, scales_grad, quats_grad
):  # fmt: skip
    """Fill ``means_grad`` [N, 3], ``scales_grad`` [N, 3] and ``quats_grad`` [N, 4], zero at entry."""
    v = _twelve(view)
    w = (v[0], v[1], v[2], v[4], v[5], v[6], v[8], v[9], v[10])
    fx, fy = lens[0], lens[1]
    for k in numba.prange(len(means)):
        g2, gc, by_depth = means2d_grad[k], conics_grad[k], np.float64(depths_grad[k])
        if (g2[0] == 0) & (g2[1] == 0) & (gc[0] == 0) & (gc[1] == 0) & (gc[2] == 0) & (by_depth == 0):
            continue
        x, y, depth = _local(v, means[k])
        visible = (depth > _NEAR) & (depth < _FAR)
        z = depth if visible else 1.0
        at_x, at_y = x / z, y / z
        held = _held(at_x, lens[4], lens[5]), _held(at_y, lens[6], lens[7])
        qw, qx, qy, qz, norm = _unit(quats[k])
        turn = _turn(qw, qx, qy, qz)
        ax = _times(fx / z, 0.0, -fx * held[0] / z, w)
        ay = _times(0.0, fy / z, -fy * held[1] / z, w)
        bx, by = _times(ax[0], ax[1], ax[2], turn), _times(ay[0], ay[1], ay[2], turn)
        s0, s1, s2 = np.float64(scales[k, 0]), np.float64(scales[k, 1]), np.float64(scales[k, 2])
        a, b, c = _covariance(bx, by, scales[k])
        ga, gb, gcc = _conic_backward(a, b, c, (np.float64(gc[0]), np.float64(gc[1]), np.float64(gc[2])))
        # Covariance = (B S)(B S)^T: gradients of the rows of B S over those of S, in the unit of B times S.
        px = (
            s0 * (2 * ga * bx[0] + gb * by[0]), s1 * (2 * ga * bx[1] + gb * by[1]), s2 * (2 * ga * bx[2] + gb * by[2])
        )  # fmt: skip
        py = (
            s0 * (2 * gcc * by[0] + gb * bx[0]), s1 * (2 * gcc * by[1] + gb * bx[1]),
            s2 * (2 * gcc * by[2] + gb * bx[2]),
        )  # fmt: skip
        scales_grad[k, 0] = px[0] * bx[0] + py[0] * by[0]
        scales_grad[k, 1] = px[1] * bx[1] + py[1] * by[1]
        scales_grad[k, 2] = px[2] * bx[2] + py[2] * by[2]
        px, py = (px[0] * s0, px[1] * s1, px[2] * s2), (py[0] * s0, py[1] * s1, py[2] * s2)
        gq = _turn_backward(qw, qx, qy, qz, norm, (
            ax[0] * px[0] + ay[0] * py[0], ax[0] * px[1] + ay[0] * py[1], ax[0] * px[2] + ay[0] * py[2],
            ax[1] * px[0] + ay[1] * py[0], ax[1] * px[1] + ay[1] * py[1], ax[1] * px[2] + ay[1] * py[2],
            ax[2] * px[0] + ay[2] * py[0], ax[2] * px[1] + ay[2] * py[1], ax[2] * px[2] + ay[2] * py[2],
        ))  # fmt: skip
        quats_grad[k, 0], quats_grad[k, 1], quats_grad[k, 2], quats_grad[k, 3] = gq
        gax, gay = _times_transposed(px[0], px[1], px[2], turn), _times_transposed(py[0], py[1], py[2], turn)
        by_held_x, by_held_y, by_z = _jacobian_backward(gax, gay, w, fx, fy, z, held)
        by_x = (fx * g2[0] + (by_held_x if held[0] == at_x else 0.0)) / z
        by_y = (fy * g2[1] + (by_held_y if held[1] == at_y else 0.0)) / z
        by_depth += by_z - at_x * by_x - at_y * by_y if visible else 0.0
        gm = _times(by_x, by_y, by_depth, w)
        means_grad[k, 0], means_grad[k, 1], means_grad[k, 2] = gm


_FORWARD, _BACKWARD = by_threads(_forward), by_threads(_backward)


def _lens(camera: Camera) -> Tensor:
    """Return fx, fy, cx, cy, the bounds of x/z and of y/z as ``project`` holds them, width and height, in float64."""
    K = camera.K.double()
    fx, fy, cx, cy = K[0, 0].item(), K[1, 1].item(), K[0, 2].item(), K[1, 2].item()
    margin_x, margin_y = 0.15 * camera.width / fx, 0.15 * camera.height / fy
    bounds = -cx / fx - margin_x, (camera.width - cx) / fx + margin_x
    bounds += -cy / fy - margin_y, (camera.height - cy) / fy + margin_y
    return torch.tensor([fx, fy, cx, cy, *bounds, camera.width, camera.height], dtype=torch.float64)


class Project(torch.autograd.Function):
    """Autograd's door to the kernels; see :func:`project`."""

    @override
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, means: Tensor, scales: Tensor, quats: Tensor, view: Tensor, lens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return means2d [N, 2], conics [N, 3], depths [N] and radii [N, 2]."""
        inputs = [t.detach().contiguous() for t in (means, scales, quats, view, lens)]
        n = len(means)
        out = torch.empty(n, 2), torch.empty(n, 3), torch.empty(n), torch.empty(n, 2, dtype=torch.int32)
        _FORWARD[several_threads()](*(t.numpy() for t in (*inputs, *out)))
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(out[3])
        return out

    @override
    @staticmethod
    @once_differentiable  # second derivatives are refused, not wrong: who wants them takes differences
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of means, scales and quats."""
        saved = ctx.saved_tensors
        out = [torch.zeros_like(t) for t in saved[:3]]
        _BACKWARD[several_threads()](*(t.contiguous().numpy() for t in (*saved, *grads[:3], *out)))
        return *out, None, None


def project(gaussians: Gaussians, camera: Camera) -> Projected:
    """Project as :func:`evolute.models.splatting.projection.project` does, for float32 tensors on the CPU.

    A camera that is itself differentiated is left to that function. A Gaussian's numbers depend on it alone: any
    number of threads gives the same bits.
    """
    if camera.viewmat.requires_grad or camera.K.requires_grad:
        return project_torch(gaussians, camera)
    view = camera.viewmat[:3].double().flatten()
    made: Any = Project.apply(gaussians.means, gaussians.scales, gaussians.quats, view, _lens(camera))
    return Projected(*made)

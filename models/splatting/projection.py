"""Gaussians in space to Gaussians in the image, by the conventions of gsplat."""

from dataclasses import dataclass

import torch
from torch import Tensor

from evolute.models.splatting.scene import Camera, Gaussians

LOW_PASS = 0.3
"""Variance in pixels^2 added to every projected Gaussian (``eps2d`` of gsplat)."""
SIGMAS = 3.33
"""Radius of the box in standard deviations: at it even an opaque Gaussian is below :data:`FAINT`."""
FAINT = 1 / 255
"""Blending skips what is fainter."""
OPAQUE = 0.999
"""Largest alpha."""
SPENT = 1e-4
"""A pixel is closed before the Gaussian that would bring its transmittance to this."""


@dataclass(frozen=True)
class Projected:
    """Gaussians as a camera sees them; what is culled has radius 0 and takes no part.

    Attributes:
        means2d: centres [N, 2] in pixels.
        conics: inverse 2-D covariance [N, 3]: xx, xy, yy.
        depths: camera z [N].
        radii: half sizes of the bounding box [N, 2] in whole pixels, int32.
    """

    means2d: Tensor
    conics: Tensor
    depths: Tensor
    radii: Tensor


def rotations(quats: Tensor) -> Tensor:
    """Return rotation matrices [N, 3, 3] of quaternions [N, 4] ``w x y z``; they are normalised here."""
    w, x, y, z = torch.nn.functional.normalize(quats, dim=-1).unbind(-1)
    entries = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(entries, -1).reshape(-1, 3, 3)


def project(gaussians: Gaussians, camera: Camera, near: float = 0.01, far: float = 1e10) -> Projected:
    """Project Gaussians by the local affine approximation of the perspective map (EWA splatting).

    Differentiable in means, scales and quats. The Jacobian is taken at a point that is kept within 1.3 times the field
    of view, as gsplat does, so that Gaussians far aside do not blow up.

    Args:
        gaussians: in world coordinates.
        camera: the view, in the same dtype.
        near: Gaussians with camera z at or below it are culled.
        far: likewise at or above it.
    """
    local = camera.local(gaussians.means)
    x, y, z = local.unbind(-1)
    visible = (z > near) & (z < far)
    z = torch.where(visible, z, torch.ones_like(z))  # nothing culled may reach a gradient as 0 * inf
    (fx, cx), (fy, cy) = camera.K[0, 0::2].unbind(), camera.K[1, 1:].unbind()
    margin_x, margin_y = 0.15 * camera.width / fx, 0.15 * camera.height / fy
    u = torch.minimum(torch.maximum(x / z, -cx / fx - margin_x), (camera.width - cx) / fx + margin_x)
    v = torch.minimum(torch.maximum(y / z, -cy / fy - margin_y), (camera.height - cy) / fy + margin_y)
    zero = torch.zeros_like(z)
    jacobian = torch.stack([fx / z, zero, -fx * u / z, zero, fy / z, -fy * v / z], -1).reshape(-1, 2, 3)
    half = jacobian @ camera.viewmat[:3, :3] @ rotations(gaussians.quats) * gaussians.scales[:, None, :]
    covariance = half @ half.transpose(1, 2)
    a, b, c = covariance[:, 0, 0] + LOW_PASS, covariance[:, 0, 1], covariance[:, 1, 1] + LOW_PASS
    det = (a * c - b * b).clamp_min(1e-10)
    conics = torch.stack([c / det, -b / det, a / det], -1)
    means2d = torch.stack([fx * x / z + cx, fy * y / z + cy], -1)
    with torch.no_grad():
        radii = torch.ceil(SIGMAS * torch.sqrt(torch.stack([a, c], -1)))
        size = torch.tensor([camera.width, camera.height]).to(means2d)
        inside = ((means2d + radii > 0) & (means2d - radii < size)).all(-1)
        drawn = visible & inside & torch.isfinite(radii).all(-1)
        radii = torch.where(drawn[:, None], radii, torch.zeros_like(radii)).int()
    return Projected(means2d, conics, local[:, 2], radii)

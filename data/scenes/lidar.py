"""Coloured point clouds, and the sparse depth they give a camera."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evolute.data.scenes.scene import Floats, View

BEHIND = 0.05
"""A return this much (relative) behind its neighbours in the image is seen through a gap of a nearer surface."""


def read_cloud(path: str | Path) -> tuple[Floats, Floats]:
    """Read points [P, 3] and colours [P, 3] in [0, 1] from a .ply; without colours they are grey.

    Raises:
        ValueError: naming the file, if it cannot be read, has no coordinates, fewer than two points, or some that are
            not finite.
    """
    from plyfile import PlyData, PlyParseError

    try:
        vertex = PlyData.read(str(path))["vertex"]
    except (PlyParseError, OSError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable point cloud ({error})") from error
    held = {p.name for p in vertex.properties}
    missing = [name for name in "xyz" if name not in held]
    if missing:
        raise ValueError(f"{path}: the points lack the properties {', '.join(missing)}")
    points = np.stack([np.asarray(vertex[name], np.float64) for name in "xyz"], 1)
    if len(points) < 2:
        raise ValueError(f"{path}: holds {len(points)} point{'s' * (len(points) != 1)}, a scene needs at least 2")
    if not np.isfinite(points).all():
        raise ValueError(f"{path}: {int((~np.isfinite(points)).any(1).sum())} of {len(points)} points are not finite")
    if not {"red", "green", "blue"} <= held:
        return points, np.full_like(points, 0.5)
    colors = np.stack([np.asarray(vertex[name]) for name in ("red", "green", "blue")], 1)
    scale = np.iinfo(colors.dtype).max if np.issubdtype(colors.dtype, np.integer) else 1.0
    return points, np.clip(colors.astype(np.float64) / scale, 0, 1)


def write_cloud(path: str | Path, points: Floats, colors: Floats) -> Path:
    """Write a coloured cloud as binary .ply: float32 coordinates, 8-bit colours."""
    from plyfile import PlyData, PlyElement

    vertex = np.empty(len(points), [(n, "<f4") for n in "xyz"] + [(n, "u1") for n in ("red", "green", "blue")])
    for axis, name in enumerate("xyz"):
        vertex[name] = points[:, axis]
    for channel, name in enumerate(("red", "green", "blue")):
        vertex[name] = np.round(np.clip(colors[:, channel], 0, 1) * 255)
    PlyData([PlyElement.describe(vertex, "vertex")], byte_order="<").write(str(path))
    return Path(path)


def project_cloud(points: Floats, view: View) -> NDArray[np.float32]:
    """Return the depth [H, W] that a cloud gives a view: camera z of the nearest point in each pixel, 0 without one.

    A cloud has gaps, through which points of farther surfaces are seen. A return that lies more than five per cent
    behind the nearest one in the 3 x 3 pixels around it is therefore left out.
    """
    from scipy.ndimage import minimum_filter

    local = points @ view.viewmat[:3, :3].T + view.viewmat[:3, 3]
    local = local[local[:, 2] > 1e-3]
    pixel = local @ view.K.T
    u, v = (np.floor(pixel[:, axis] / pixel[:, 2]).astype(np.int64) for axis in (0, 1))
    inside = (u >= 0) & (u < view.width) & (v >= 0) & (v < view.height)
    nearest = np.full((view.height, view.width), np.inf, np.float32)
    np.minimum.at(nearest, (v[inside], u[inside]), local[inside, 2].astype(np.float32))
    around = minimum_filter(nearest, size=3, mode="nearest")
    return np.where(np.isfinite(nearest) & (nearest <= around * (1 + BEHIND)), nearest, np.float32(0))

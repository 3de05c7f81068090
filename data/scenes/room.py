"""A room made to order: ray-cast images with exact poses and depth, and a simulated LiDAR scan. All of it synthetic."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evolute.data.scenes.colmap import write_colmap
from evolute.data.scenes.lidar import write_cloud
from evolute.data.scenes.scene import Floats, Scene, View
from evolute.data.scenes.transforms import write_transforms

SIZE = np.array([4.0, 4.0, 2.4])
"""Of the room, in metres; z is up, the origin lies in the middle of the floor."""
LIGHT = np.array([0.3, -0.4, 0.87])
STATIONS = ((-1.2, -1.1, 1.3), (1.3, -0.4, 1.5), (-0.2, 1.4, 1.2))
_WALLS, _BOX, _BALL, _RING = range(4)


class _World:
    """Meshes and what happens where a ray meets them."""

    def __init__(self) -> None:
        import trimesh

        room = trimesh.creation.box(extents=SIZE)
        room.apply_translation([0, 0, SIZE[2] / 2])
        room.invert()
        box = trimesh.creation.box(extents=[0.7, 0.5, 0.8])
        box.apply_transform(trimesh.transformations.rotation_matrix(0.5, [0, 0, 1]))
        box.apply_translation([0.8, 0.7, 0.4])
        ball = trimesh.creation.icosphere(subdivisions=5, radius=0.45)
        x, y, z = ball.vertices.T
        ball.vertices = ball.vertices * (1 + 0.06 * np.sin(14 * x) * np.sin(14 * y) * np.sin(14 * z))[:, None]
        ball.apply_translation([-0.7, 0.5, 0.5])
        ring = trimesh.creation.torus(major_radius=0.4, minor_radius=0.13, major_sections=96, minor_sections=48)
        ring.apply_transform(trimesh.transformations.rotation_matrix(1.1, [1, 0.3, 0]))
        ring.apply_translation([0.1, -0.6, 0.55])
        meshes = [room, box, ball, ring]
        self.whole: Any = trimesh.util.concatenate(meshes)
        self.owner = np.repeat(np.arange(len(meshes)), [len(m.faces) for m in meshes])
        self.normals = self.whole.face_normals
        try:
            from trimesh.ray.ray_pyembree import RayMeshIntersector
        except ImportError as error:
            raise ImportError("the procedural room needs embree: pip install evolute[splatting]") from error
        self.rays: Any = RayMeshIntersector(self.whole)

    def cast(self, origins: Floats, directions: Floats) -> tuple[Floats, NDArray[np.int64]]:
        """Return distances along the rays (inf where nothing is met) and the face met (-1)."""
        distance, face = np.full(len(origins), np.inf), np.full(len(origins), -1)
        found = self.rays.intersects_first(origins, directions)
        hit = found >= 0
        # On the plane of the face, in float64: embree's own points are float32.
        corner, normal = self.whole.triangles[found[hit], 0], self.normals[found[hit]]
        distance[hit] = ((corner - origins[hit]) * normal).sum(1) / (directions[hit] * normal).sum(1)
        face[hit] = found[hit]
        return distance, face

    def albedo(self, points: Floats, faces: NDArray[np.int64]) -> Floats:
        """Return colours [n, 3] without light."""
        x, y, z = points.T
        owner, up = self.owner[faces], self.normals[faces][:, 2]
        color = np.full((len(points), 3), [0.86, 0.85, 0.82])
        checks = (np.floor(x / 0.4) + np.floor(y / 0.4)) % 2
        floor = (owner == _WALLS) & (up > 0.5)
        color[floor] = np.where(checks[floor, None] > 0, [0.75, 0.72, 0.65], [0.25, 0.3, 0.38])
        for kind, base, swing, waves in (
            (_BOX, (0.65, 0.35, 0.25), (0.25, 0.2, 0.1), (13.0, 17.0, 11.0)),
            (_BALL, (0.3, 0.55, 0.35), (0.2, 0.3, 0.25), (19.0, 13.0, 16.0)),
            (_RING, (0.35, 0.4, 0.7), (0.3, 0.25, 0.2), (23.0, 19.0, 21.0)),
        ):
            at = owner == kind
            pattern = np.sin(waves[0] * x[at]) * np.sin(waves[1] * y[at]) * np.sin(waves[2] * z[at] + 1)
            color[at] = np.array(base) + np.sign(pattern)[:, None] * np.abs(pattern)[:, None] ** 0.5 * np.array(swing)
        return np.clip(color, 0, 1)

    def shade(self, points: Floats, faces: NDArray[np.int64]) -> Floats:
        """Return Lambert-shaded colours [n, 3]."""
        light = np.clip(self.normals[faces] @ (LIGHT / np.linalg.norm(LIGHT)), 0, 1)
        return self.albedo(points, faces) * (0.55 + 0.45 * light)[:, None]


def make_room(
    folder: str | Path,
    views: int = 40,
    width: int = 96,
    height: int = 96,
    lidar: int = 120_000,
    noise: float = 0.01,
    seed: int = 0,
) -> Path:
    """Ray-cast the room into ``folder``, in the formats that the readers read.

    Written are ``images/*.png`` (2 x 2 samples a pixel), ``depth/*.npy`` (exact camera z at pixel centres, metres),
    ``lidar.ply`` (three stations, range noise), ``sparse/0/*.txt`` and ``transforms.json``. The room measures 4 x 4 x
    2.4 m: near-white walls, a checkered floor, a box, a dented ball and a ring with textures. The cameras stand on a
    wobbling circle and look inward.

    Args:
        folder: made if missing.
        views: number of images.
        width: of an image, in pixels.
        height: of an image.
        lidar: rays of the scanner.
        noise: standard deviation of the measured range, in metres.
        seed: of the scanner's directions and noise.

    Returns:
        The folder.

    Raises:
        ValueError: if a number is below 1, or the noise negative.
        ImportError: if trimesh or embree is missing.
    """
    for name, value in (("views", views), ("width", width), ("height", height), ("lidar", lidar)):
        if value < 1:
            raise ValueError(f"make_room({name}={value}): must be at least 1")
    if not noise >= 0:
        raise ValueError(f"make_room(noise={noise}): must be at least 0")
    folder = Path(folder)
    for part in ("images", "depth"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    world = _World()
    scene = Scene([_take(world, folder, i, views, width, height) for i in range(views)])
    scene.points, scene.colors = _scan(world, lidar, noise, seed)
    write_cloud(folder / "lidar.ply", scene.points, scene.colors)
    write_colmap(scene, folder)
    write_transforms(scene, folder / "transforms.json", "lidar.ply")
    return folder


def _take(world: _World, folder: Path, index: int, views: int, width: int, height: int) -> View:
    """Ray-cast one view and write its image and depth."""
    from PIL import Image

    angle = 2 * math.pi * index / views
    reach = 1.45 + 0.2 * math.sin(3 * angle)
    eye = np.array([reach * math.cos(angle), reach * math.sin(angle), 1.3 + 0.35 * math.sin(2 * angle + 0.5)])
    viewmat = look_at(eye, np.array([0.0, 0.0, 0.6 + 0.15 * math.cos(3 * angle)]))
    focal = 0.65 * width
    K = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])
    view = View(
        folder / "images" / f"{index:04d}.png", viewmat, K, width, height, folder / "depth" / f"{index:04d}.npy"
    )
    total = np.zeros((height * width, 3))
    for du, dv in ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)):
        total += _pixels(world, view, eye, du, dv)[0]
    Image.fromarray(np.round(total.reshape(height, width, 3) / 4 * 255).astype(np.uint8)).save(view.path)
    depth = _pixels(world, view, eye, 0.5, 0.5)[1]
    assert view.depth_path is not None
    np.save(view.depth_path, depth.reshape(height, width).astype(np.float32))
    return view


def _pixels(world: _World, view: View, eye: Floats, du: float, dv: float) -> tuple[Floats, Floats]:
    """Return colours [H W, 3] and camera z [H W] at one place within every pixel."""
    u, v = np.meshgrid(np.arange(view.width) + du, np.arange(view.height) + dv)
    local = np.stack([u.ravel(), v.ravel(), np.ones(u.size)], 1) @ np.linalg.inv(view.K).T
    directions = local @ view.viewmat[:3, :3]  # z of the camera is 1, so distances are depths
    origins = np.broadcast_to(eye, directions.shape)
    depth, face = world.cast(origins, directions)
    hit = face >= 0
    color = np.zeros((len(directions), 3))
    color[hit] = world.shade((origins + depth[:, None] * directions)[hit], face[hit])
    return color, np.where(hit, depth, 0.0)


def _scan(world: _World, rays: int, noise: float, seed: int) -> tuple[Floats, Floats]:
    """Return points and colours that scanners at the stations would measure."""
    generator = np.random.default_rng(seed)
    parts: list[tuple[Floats, Floats]] = []
    for station, count in zip(STATIONS, np.diff(np.linspace(0, rays, len(STATIONS) + 1).astype(int)), strict=True):
        directions = generator.normal(size=(count, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        origins = np.broadcast_to(np.array(station), directions.shape)
        distance, face = world.cast(origins, directions)
        hit = face >= 0
        exact = (origins + np.where(hit, distance, 0)[:, None] * directions)[hit]
        measured = exact + (noise * generator.normal(size=(len(exact), 1))) * directions[hit]
        parts.append((measured, world.shade(exact, face[hit])))
    return np.concatenate([p for p, _ in parts]), np.concatenate([c for _, c in parts])


def look_at(eye: Floats, target: Floats) -> Floats:
    """Return the world-to-camera matrix [4, 4] of a camera that looks from ``eye`` at ``target``, z of the world up."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    viewmat = np.eye(4)
    viewmat[:3, :3] = np.stack([right, np.cross(forward, right), forward])
    viewmat[:3, 3] = -viewmat[:3, :3] @ eye
    return viewmat

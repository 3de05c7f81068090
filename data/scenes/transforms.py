"""transforms.json of nerfstudio and of the Blender scenes."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from evolute.data.scenes.lidar import read_cloud
from evolute.data.scenes.scene import Floats, Scene, View, check_camera

FLIP = np.diag([1.0, -1.0, -1.0, 1.0])
"""OpenGL camera axes (y up, z backward) to OpenCV's."""


def read_transforms(path: str | Path) -> Scene:
    """Read a transforms.json or the folder that holds one; poses are camera to world with OpenGL axes.

    Intrinsics (``fl_x``, ``fl_y``, ``cx``, ``cy``, ``w``, ``h``, or ``camera_angle_x``) may stand at the top or with a
    frame. ``depth_file_path`` is in millimetres if it is an image (nerfstudio) and in the scene's unit if it is .npy,
    unless ``depth_unit_scale_factor`` says otherwise. ``ply_file_path`` names the point cloud.

    Raises:
        ValueError: naming the file and the frame, if something is missing or cannot be.
    """
    file = Path(path)
    file = file / "transforms.json" if file.is_dir() else file
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as JSON ({error})") from error
    frames = content.get("frames") if isinstance(content, dict) else None
    if not isinstance(frames, list) or not frames:
        raise ValueError(f"{file}: has no frames")
    views = [_view(file, content, frame) for frame in frames]
    scene = Scene(sorted(views, key=lambda v: v.path.as_posix()))
    if content.get("ply_file_path"):
        scene.points, scene.colors = read_cloud(file.parent / content["ply_file_path"])
    return scene


def _view(file: Path, content: dict[str, Any], frame: dict[str, Any]) -> View:
    if not isinstance(frame, dict) or "file_path" not in frame or "transform_matrix" not in frame:
        raise ValueError(f"{file}: a frame lacks file_path or transform_matrix")
    name = frame["file_path"]
    where = f"{file}: {name}"
    path = file.parent / name
    if not path.suffix:  # Blender's scenes leave it out
        path = path.with_suffix(".png")
    if not path.is_file():
        raise ValueError(f"{path}: no such image; {file} lists it")
    values = {**content, **frame}
    if values.get("camera_model", "PINHOLE") not in ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV") or any(
        values.get(k) for k in ("k1", "k2", "k3", "k4", "p1", "p2")
    ):
        raise ValueError(f"{where}: has a distorted camera: undistort the images first")
    try:
        width, height = (int(values[k]) if k in values else size for k, size in zip("wh", _size(path), strict=True))
        if "fl_x" in values:
            fx = float(values["fl_x"])
        else:
            fx = 0.5 * width / math.tan(0.5 * float(values["camera_angle_x"]))
        fy = float(values.get("fl_y", fx))
        K = np.array([[fx, 0, values.get("cx", width / 2)], [0, fy, values.get("cy", height / 2)], [0, 0, 1]], float)
        to_world = np.array(frame["transform_matrix"], dtype=np.float64)
        if to_world.shape != (4, 4):
            raise ValueError(f"transform_matrix of shape {to_world.shape}")
    except KeyError as error:
        raise ValueError(f"{where}: no focal length (fl_x or camera_angle_x)") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{where}: {error}") from error
    viewmat = FLIP @ _inverse(to_world) if np.isfinite(to_world).all() else np.full((4, 4), np.nan)
    check_camera(where, K, viewmat, width, height)
    depth, scale = frame.get("depth_file_path"), values.get("depth_unit_scale_factor")
    depth = file.parent / depth if depth else None
    if depth is not None and not depth.is_file():
        raise ValueError(f"{depth}: no such depth; {file} lists it")
    if scale is None:
        scale = 1.0 if depth is None or depth.suffix == ".npy" else 1e-3
    return View(path, viewmat, K, width, height, depth, float(scale))


def _inverse(pose: Floats) -> Floats:
    """Return the inverse of a rigid motion; a rotation that is none is found out later."""
    inverse = np.eye(4)
    inverse[:3, :3], inverse[:3, 3] = pose[:3, :3].T, -pose[:3, :3].T @ pose[:3, 3]
    return inverse


def _size(path: Path) -> tuple[int, int]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.size
    except OSError as error:
        raise ValueError(f"{path}: the image cannot be read ({error})") from error


def write_transforms(scene: Scene, path: str | Path, cloud: str | None = None) -> Path:
    """Write transforms.json of a scene; images and depths are named relative to it.

    Args:
        scene: its files must lie below the folder of ``path``.
        path: the file.
        cloud: name of the point cloud's file, relative to it.
    """
    path = Path(path)
    frames: list[dict[str, Any]] = []
    for view in scene.views:
        frame: dict[str, Any] = {
            "file_path": view.path.relative_to(path.parent).as_posix(),
            "transform_matrix": _inverse(FLIP @ view.viewmat).tolist(),
            "w": view.width, "h": view.height,
            "fl_x": view.K[0, 0], "fl_y": view.K[1, 1], "cx": view.K[0, 2], "cy": view.K[1, 2],
        }  # fmt: skip
        if view.depth_path is not None:
            frame |= {
                "depth_file_path": view.depth_path.relative_to(path.parent).as_posix(),
                "depth_unit_scale_factor": view.depth_scale,
            }
        frames.append(frame)
    content: dict[str, Any] = {"camera_model": "PINHOLE", "frames": frames}
    if cloud is not None:
        content["ply_file_path"] = cloud
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path

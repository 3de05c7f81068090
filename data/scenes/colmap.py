"""COLMAP's sparse models, text and binary."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from evolute.data.scenes.scene import Floats, Scene, View, check_camera, check_images, quaternion_of, rotation_of

# Camera models of COLMAP by id: name, number of parameters. Only those without distortion can be rendered.
MODELS = {
    0: ("SIMPLE_PINHOLE", 3), 1: ("PINHOLE", 4), 2: ("SIMPLE_RADIAL", 4), 3: ("RADIAL", 5), 4: ("OPENCV", 8),
    5: ("OPENCV_FISHEYE", 8), 6: ("FULL_OPENCV", 12), 7: ("FOV", 5), 8: ("SIMPLE_RADIAL_FISHEYE", 4),
    9: ("RADIAL_FISHEYE", 5), 10: ("THIN_PRISM_FISHEYE", 12),
}  # fmt: skip


class _Camera(NamedTuple):
    model: str
    width: int
    height: int
    params: list[float]


class _Image(NamedTuple):
    name: str
    camera: int
    quaternion: list[float]
    translation: list[float]


def read_colmap(folder: str | Path) -> Scene:
    """Read ``sparse/0`` (or ``sparse``, or the folder itself) and ``images`` of a COLMAP project.

    Binary files win over text. Depth is taken from ``depth/<image stem>.npy`` where it exists.

    Raises:
        ValueError: naming the file, if one is missing, broken, or says what cannot be.
    """
    root = Path(folder)
    sparse = next((p for p in (root / "sparse" / "0", root / "sparse", root) if _kind(p)), None)
    if sparse is None:
        raise ValueError(f"{root}: no COLMAP model (cameras, images and points3D, .bin or .txt) in sparse/0 or sparse")
    kind = _kind(sparse)
    try:
        if kind == "bin":
            cameras, images = dict(_cameras_bin(sparse)), list(_images_bin(sparse))
        else:
            cameras, images = dict(_cameras_txt(sparse)), list(_images_txt(sparse))
        points, colors = _points_bin(sparse) if kind == "bin" else _points_txt(sparse)
    except (struct.error, IndexError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{sparse}: the COLMAP model cannot be read ({error or type(error).__name__})") from error
    listing = sparse / f"images.{kind}"
    if not images:
        raise ValueError(f"{listing}: lists no image")
    check_images(root / "images", {image.name for image in images}, listing)
    if not np.isfinite(points).all():
        raise ValueError(f"{sparse / f'points3D.{kind}'}: {int((~np.isfinite(points)).any(1).sum())} points not finite")
    views = [_view(root, image, cameras, listing) for image in sorted(images, key=lambda i: i.name)]
    return Scene(views, points, colors)


def _kind(folder: Path) -> Literal["bin", "txt", ""]:
    for kind in ("bin", "txt"):
        if all((folder / f"{name}.{kind}").is_file() for name in ("cameras", "images", "points3D")):
            return kind
    return ""


def _view(root: Path, image: _Image, cameras: dict[int, _Camera], listing: Path) -> View:
    if image.camera not in cameras:
        raise ValueError(f"{listing}: {image.name} has camera {image.camera}, which the cameras file does not list")
    camera = cameras[image.camera]
    p = camera.params
    if camera.model == "SIMPLE_PINHOLE":
        fx, fy, cx, cy = p[0], p[0], p[1], p[2]
    elif camera.model == "PINHOLE":
        fx, fy, cx, cy = p
    else:
        raise ValueError(
            f"{listing}: {image.name} has a {camera.model} camera: undistort the images first "
            "(colmap image_undistorter)"
        )
    viewmat = np.eye(4)
    q = np.array(image.quaternion)
    if not np.isfinite(q).all() or not np.linalg.norm(q):
        raise ValueError(f"{listing}: {image.name}: the pose is not finite")
    viewmat[:3, :3], viewmat[:3, 3] = rotation_of(q), image.translation
    K = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])
    check_camera(f"{listing}: {image.name}", K, viewmat, camera.width, camera.height)
    depth = (root / "depth" / image.name).with_suffix(".npy")
    return View(
        root / "images" / image.name, viewmat, K, camera.width, camera.height, depth if depth.is_file() else None
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.startswith("#"):
                yield number, line.strip()


def _broken(path: Path, number: int, error: Exception) -> ValueError:
    return ValueError(f"{path}, line {number}: not a COLMAP record ({error})")


def _cameras_txt(sparse: Path) -> Iterator[tuple[int, _Camera]]:
    path = sparse / "cameras.txt"
    for number, line in _lines(path):
        if not line:
            continue
        try:
            key, model, width, height, *params = line.split()
            camera = _Camera(model, int(width), int(height), [float(p) for p in params])
            if len(params) != next((count for name, count in MODELS.values() if name == model), len(params)):
                raise ValueError(f"{model} with {len(params)} parameters")
            yield int(key), camera
        except ValueError as error:
            raise _broken(path, number, error) from error


def _images_txt(sparse: Path) -> Iterator[_Image]:
    path = sparse / "images.txt"
    lines = iter(_lines(path))
    for number, line in lines:
        if not line:
            continue
        try:
            _, *pose, camera, name = line.split(maxsplit=9)
            numbers = [float(p) for p in pose]
            yield _Image(name, int(camera), numbers[:4], numbers[4:])
        except ValueError as error:
            raise _broken(path, number, error) from error
        next(lines, None)  # its 2-D points, an empty line if there are none


def _points_txt(sparse: Path) -> tuple[Floats, Floats]:
    path = sparse / "points3D.txt"
    rows: list[list[float]] = []
    for number, line in _lines(path):
        if line:
            try:
                rows.append([float(value) for value in line.split()[1:7]])
            except ValueError as error:
                raise _broken(path, number, error) from error
            if len(rows[-1]) != 6:
                raise _broken(path, number, ValueError("too few values"))
    table = np.array(rows, dtype=np.float64).reshape(-1, 6)
    return table[:, :3], table[:, 3:] / 255


class _Bytes:
    """A binary file, read from front to back."""

    def __init__(self, path: Path) -> None:
        self.data, self.at = path.read_bytes(), 0

    def take(self, form: str) -> tuple[float, ...]:
        form = "<" + form
        values = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return values

    def text(self) -> str:
        end = self.data.index(b"\0", self.at) if b"\0" in self.data[self.at :] else -1
        if end < 0:
            raise struct.error("a name has no end")
        text, self.at = self.data[self.at : end].decode("utf-8"), end + 1
        return text

    def skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self.data):
            raise struct.error("the file ends too early")


def _cameras_bin(sparse: Path) -> Iterator[tuple[int, _Camera]]:
    file = _Bytes(sparse / "cameras.bin")
    for _ in range(int(file.take("Q")[0])):
        key, model, width, height = (int(v) for v in file.take("iiQQ"))
        if model not in MODELS:
            raise ValueError(f"{sparse / 'cameras.bin'}: camera {key} has the unknown model {model}")
        name, count = MODELS[model]
        yield key, _Camera(name, width, height, list(file.take(f"{count}d")))


def _images_bin(sparse: Path) -> Iterator[_Image]:
    file = _Bytes(sparse / "images.bin")
    for _ in range(int(file.take("Q")[0])):
        _, *pose, camera = file.take("i7di")
        name = file.text()
        file.skip(24 * int(file.take("Q")[0]))
        yield _Image(name, int(camera), pose[:4], pose[4:])


def _points_bin(sparse: Path) -> tuple[Floats, Floats]:
    file = _Bytes(sparse / "points3D.bin")
    count = int(file.take("Q")[0])
    table = np.empty((count, 6))
    for row in range(count):
        values = file.take("Q3d3BdQ")
        table[row] = values[1:7]
        file.skip(8 * int(values[8]))
    return table[:, :3], table[:, 3:] / 255


def write_colmap(scene: Scene, folder: str | Path, kind: Literal["txt", "bin"] = "txt") -> Path:
    """Write ``sparse/0`` of a scene: one PINHOLE camera a view, no 2-D points. Images are not copied."""
    sparse = Path(folder) / "sparse" / "0"
    sparse.mkdir(parents=True, exist_ok=True)
    rgb = np.round(scene.colors * 255).astype(np.uint8)
    poses = [(quaternion_of(v.viewmat[:3, :3]), v.viewmat[:3, 3]) for v in scene.views]
    intrinsics = [(v.K[0, 0], v.K[1, 1], v.K[0, 2], v.K[1, 2]) for v in scene.views]
    if kind == "txt":
        lines = [
            f"{i} PINHOLE {v.width} {v.height} {_text(k)}" for i, (v, k) in enumerate(_pairs(scene, intrinsics), 1)
        ]
        (sparse / "cameras.txt").write_text("\n".join(["# camera, model, width, height, fx fy cx cy", *lines, ""]))
        lines = [f"{i} {_text((*q, *t))} {i} {v.path.name}\n" for i, (v, (q, t)) in enumerate(_pairs(scene, poses), 1)]
        (sparse / "images.txt").write_text("\n".join(["# image, qw qx qy qz tx ty tz, camera, name", *lines, ""]))
        rows = zip(scene.points, rgb, strict=True)
        lines = [f"{i} {_text(p)} {c[0]} {c[1]} {c[2]} 0" for i, (p, c) in enumerate(rows, 1)]
        (sparse / "points3D.txt").write_text("\n".join(["# point, x y z, r g b, error", *lines, ""]))
        return sparse
    cameras = [
        struct.pack("<iiQQ4d", i, 1, v.width, v.height, *k) for i, (v, k) in enumerate(_pairs(scene, intrinsics), 1)
    ]
    images = [
        struct.pack("<i7di", i, *q, *t, i) + v.path.name.encode() + b"\0" + struct.pack("<Q", 0)
        for i, (v, (q, t)) in enumerate(_pairs(scene, poses), 1)
    ]
    points = [
        struct.pack("<Q3d3BdQ", i, *p, *(int(x) for x in c), 0.0, 0)
        for i, (p, c) in enumerate(zip(scene.points, rgb, strict=True), 1)
    ]
    for name, records in (("cameras", cameras), ("images", images), ("points3D", points)):
        (sparse / f"{name}.bin").write_bytes(struct.pack("<Q", len(records)) + b"".join(records))
    return sparse


def _pairs(scene: Scene, other: list) -> Iterator[tuple[View, tuple]]:
    return zip(scene.views, other, strict=True)


def _text(values: object) -> str:
    return " ".join(repr(float(v)) for v in values)  # type: ignore[attr-defined]

"""A scene as every reader returns it."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


@dataclass
class View:
    """One posed image, read from its file when asked for.

    Attributes:
        path: the image.
        viewmat: world to camera [4, 4], OpenCV axes (x right, y down, z forward).
        K: intrinsics [3, 3] in pixels of the image, pixel centres at half-integers.
        width: pixels a row.
        height: rows.
        depth_path: .npy [H, W] (unit of the scene) or 16-bit .png, camera z, 0 where unknown; None without.
        depth_scale: what to multiply a stored depth with.
    """

    path: Path
    viewmat: Floats
    K: Floats
    width: int
    height: int
    depth_path: Path | None = None
    depth_scale: float = 1.0

    def image(self) -> NDArray[np.uint8]:
        """Return the image [H, W, 3]; a transparent one is laid over black.

        Raises:
            ValueError: naming the file, if it cannot be read or is not of the stated size.
        """
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(self.path) as file:
                picture = file.convert("RGBA") if "A" in file.getbands() else file.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"{self.path}: the image cannot be read ({error})") from error
        if picture.mode == "RGBA":
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture).convert("RGB")
        if picture.size != (self.width, self.height):
            raise ValueError(
                f"{self.path}: is {picture.size[0]} x {picture.size[1]} pixels, its camera says "
                f"{self.width} x {self.height}"
            )
        return np.asarray(picture, dtype=np.uint8)

    def depth(self) -> NDArray[np.float32] | None:
        """Return camera z [H, W] in the unit of the scene, 0 where unknown; None without a file.

        Raises:
            ValueError: naming the file, if it cannot be read, or is not of the image's size.
        """
        if self.depth_path is None:
            return None
        try:
            if self.depth_path.suffix == ".npy":
                raw = np.load(self.depth_path, allow_pickle=False)
            else:
                from PIL import Image

                with Image.open(self.depth_path) as file:
                    raw = np.asarray(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.depth_path}: the depth cannot be read ({error})") from error
        if raw.shape != (self.height, self.width):
            raise ValueError(
                f"{self.depth_path}: depth of shape {raw.shape}, but {self.path.name} is "
                f"{self.width} x {self.height} pixels: expected ({self.height}, {self.width})"
            )
        depth = raw.astype(np.float32) * np.float32(self.depth_scale)
        return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))


@dataclass
class Scene:
    """Posed images and a coloured point cloud in one frame.

    Attributes:
        views: sorted by the name of their images.
        points: [P, 3]; none is an empty array.
        colors: [P, 3] in [0, 1].
    """

    views: list[View]
    points: Floats = field(default_factory=lambda: np.zeros((0, 3)))
    colors: Floats = field(default_factory=lambda: np.zeros((0, 3)))


def check_camera(where: str, K: Floats, viewmat: Floats, width: int, height: int) -> None:
    """Check that numbers make a camera.

    Raises:
        ValueError: naming the place and the number.
    """
    if width < 1 or height < 1:
        raise ValueError(f"{where}: an image of {width} x {height} pixels")
    if not np.isfinite(K).all() or K[0, 0] <= 0 or K[1, 1] <= 0:
        raise ValueError(f"{where}: degenerate intrinsics, focal lengths {K[0, 0]:g} and {K[1, 1]:g} must be positive")
    if not np.isfinite(viewmat).all():
        raise ValueError(f"{where}: the pose is not finite")
    if not np.allclose(viewmat[:3, :3] @ viewmat[:3, :3].T, np.eye(3), atol=1e-3):
        raise ValueError(f"{where}: the rotation of the pose is not orthonormal")


def check_images(folder: Path, listed: set[str], source: Path) -> None:
    """Check that the images in a folder and those that a file lists are the same ones.

    Raises:
        ValueError: naming up to three that one side lacks.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; the images that {source} lists should be there")
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in IMAGES}
    for missing, problem in (
        (listed - present, f"is listed in {source} and missing in {folder}"),
        (present - listed, f"lies in {folder} and is not listed in {source}"),
    ):
        if missing:
            some = ", ".join(sorted(missing)[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise ValueError(f"{some} {problem}: images and poses must belong to each other")


def quaternion_of(R: Floats) -> Floats:
    """Return the unit quaternion ``w x y z`` with ``w >= 0`` of a rotation matrix."""
    from scipy.spatial.transform import Rotation

    x, y, z, w = Rotation.from_matrix(R).as_quat()
    q = np.array([w, x, y, z])
    return -q if w < 0 else q


def rotation_of(q: Floats) -> Floats:
    """Return the rotation matrix of a quaternion ``w x y z``."""
    from scipy.spatial.transform import Rotation

    return Rotation.from_quat([q[1], q[2], q[3], q[0]]).as_matrix()

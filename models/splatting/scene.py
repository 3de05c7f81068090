"""What a rasterizer is given: Gaussians and a pinhole camera."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussians:
    """``N`` Gaussians in world coordinates, the plain input of :func:`evolute.models.splatting.render`.

    Attributes:
        means: centres [N, 3], in the scene's unit.
        scales: standard deviations along the own axes [N, 3], linear, in the scene's unit.
        quats: rotations [N, 4], ``w x y z``, of any length but zero.
        opacities: [N] in (0, 1).
        colors: [N, C]; any number of channels, of any meaning: what is blended.

    Raises:
        ValueError: if the shapes do not belong together.
    """

    means: Tensor
    scales: Tensor
    quats: Tensor
    opacities: Tensor
    colors: Tensor

    def __post_init__(self) -> None:
        n = self.means.shape[0]
        for name, value, shape in (
            ("means", self.means, (n, 3)),
            ("scales", self.scales, (n, 3)),
            ("quats", self.quats, (n, 4)),
            ("opacities", self.opacities, (n,)),
            ("colors", self.colors, (n, self.colors.shape[-1] if self.colors.ndim == 2 else 0)),
        ):
            if tuple(value.shape) != shape:
                raise ValueError(f"Gaussians: {name} has shape {tuple(value.shape)}, {shape} was expected")

    def __len__(self) -> int:
        return self.means.shape[0]


@dataclass(frozen=True)
class Camera:
    """A pinhole camera with OpenCV axes: x right, y down, z forward; pixel centres lie at half-integers.

    Attributes:
        viewmat: world to camera [4, 4].
        K: intrinsics [3, 3], in pixels.
        width: pixels a row.
        height: rows.

    Raises:
        ValueError: if shapes or sizes make no camera.
    """

    viewmat: Tensor
    K: Tensor
    width: int
    height: int

    def __post_init__(self) -> None:
        if tuple(self.viewmat.shape) != (4, 4) or tuple(self.K.shape) != (3, 3):
            raise ValueError(
                f"Camera: viewmat {tuple(self.viewmat.shape)} and K {tuple(self.K.shape)} must be (4, 4) and (3, 3)"
            )
        if self.width < 1 or self.height < 1:
            raise ValueError(f"Camera: an image of {self.width} x {self.height} pixels has none")

    def to(self, like: Tensor) -> "Camera":
        """Return the camera with the dtype and on the device of a tensor."""
        return Camera(self.viewmat.to(like), self.K.to(like), self.width, self.height)

    @property
    def position(self) -> Tensor:
        """Centre of projection in world coordinates [3]."""
        return -self.viewmat[:3, :3].T @ self.viewmat[:3, 3]

    def local(self, points: Tensor) -> Tensor:
        """Return world points [N, 3] in camera coordinates."""
        return points @ self.viewmat[:3, :3].T + self.viewmat[:3, 3]

    def rays(self) -> Tensor:
        """Return ``K^-1 [u, v, 1]`` at every pixel centre [H, W, 3]: z is 1."""
        u = torch.arange(self.width, dtype=self.K.dtype, device=self.K.device) + 0.5
        v = torch.arange(self.height, dtype=self.K.dtype, device=self.K.device) + 0.5
        pixels = torch.stack([*torch.meshgrid(u, v, indexing="xy"), torch.ones(self.height, self.width).to(self.K)], -1)
        return pixels @ torch.linalg.inv(self.K).T

"""Scenes for training: one view a batch, in an order that survives a restart."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from evolute.data.resumable import ResumablePlace
from evolute.data.samplers import ResumableLoader, ResumableSampler
from evolute.data.scenes.colmap import read_colmap
from evolute.data.scenes.lidar import project_cloud, read_cloud
from evolute.data.scenes.room import make_room
from evolute.data.scenes.scene import Scene, View
from evolute.data.scenes.transforms import read_transforms

Format = Literal["auto", "colmap", "transforms"]


class SceneDataModule(ResumablePlace):
    """Views of one scene. Every ``test_every``-th image, by name, is held out.

    A batch is one view, with a batch dimension of 1 in front: ``image`` [1, H, W, 3] uint8, ``depth`` [1, H, W] float32
    (camera z for supervision, 0 where unknown), ``true_depth`` [1, H, W] (for evaluation, 0 where unknown), ``viewmat``
    [1, 4, 4], ``K`` [1, 3, 3], ``index`` [1].
    All images are decoded once and held as 8-bit numbers.

    Args:
        source: ``"room"`` (procedural, synthetic, see :func:`evolute.data.scenes.make_room`), or a folder.
        format: what the folder holds; ``"auto"`` takes transforms.json if there is one, else COLMAP.
        cloud: .ply with the LiDAR points; by default what the scene names, or ``lidar.ply``, or COLMAP's points.
        depth_from: what supervises depth: ``"lidar"`` (the cloud projected into each view), ``"files"`` (per-image
            depth), or ``"none"``.
        test_every: hold out every so many images.
        seed: of the order of the views, and of the room's scanner.
        views: images of the room.
        size: width and height of the room's images.
        lidar_rays: of the room's scanner.
        lidar_noise: standard deviation of its ranges, in metres.
        folder: where the room is kept; by default below the temporary folder, under a name that says what it is.

    Attributes:
        scene: the scene (after ``setup``).
        points: [P, 3] float32 and
        colors: [P, 3] float32, of the cloud.

    Raises:
        ValueError: if an argument is out of range, or (in ``setup``) the scene does not serve, naming the file.
    """

    def __init__(
        self,
        source: str = "room",
        format: Format = "auto",
        cloud: str | None = None,
        depth_from: Literal["lidar", "files", "none"] = "lidar",
        test_every: int = 8,
        seed: int = 0,
        views: int = 40,
        size: tuple[int, int] = (96, 96),
        lidar_rays: int = 120_000,
        lidar_noise: float = 0.01,
        folder: str | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("test_every", test_every, 2),
            ("views", views, 2),
            ("size", min(size), 1),
            ("lidar_rays", lidar_rays, 2),
        ):
            if value < least:
                raise ValueError(f"SceneDataModule({name}={value}): must be at least {least}")
        if not lidar_noise >= 0:
            raise ValueError(f"SceneDataModule(lidar_noise={lidar_noise}): must be at least 0")
        for name, value, known in (
            ("format", format, ("auto", "colmap", "transforms")),
            ("depth_from", depth_from, ("lidar", "files", "none")),
        ):
            if value not in known:
                raise ValueError(f"SceneDataModule({name}={value!r}): must be one of {', '.join(map(repr, known))}")
        self.save_hyperparameters()
        self.source, self.format, self.cloud, self.depth_from = source, format, cloud, depth_from
        self.test_every, self.seed = test_every, seed
        self._room = {"views": views, "width": size[0], "height": size[1]}
        self._room |= {"lidar": lidar_rays, "noise": lidar_noise, "seed": seed}
        self._folder = folder
        self.scene: Scene | None = None
        self.points = self.colors = torch.zeros(0, 3)
        self._views: tuple[Views, Views] | None = None

    @override
    def prepare_data(self) -> None:
        if self.source == "room":
            self._make_room()

    @override
    def setup(self, stage: str | None = None) -> None:
        if self._views is not None:
            return
        scene = self._read()
        if len(scene.views) < 2:
            raise ValueError(f"source={self.source!r}: {len(scene.views)} image: training and testing need one each")
        if self.depth_from == "lidar" and not len(scene.points):
            raise ValueError(f"source={self.source!r}: depth_from='lidar' needs a point cloud, and the scene has none")
        if self.depth_from == "files" and not any(view.depth_path for view in scene.views):
            raise ValueError(f"source={self.source!r}: depth_from='files', and no image has a depth file")
        held_out = [i for i in range(len(scene.views)) if i % self.test_every == 0]
        trained = [i for i in range(len(scene.views)) if i % self.test_every != 0]
        self._views = Views(scene, trained, self.depth_from), Views(scene, held_out, self.depth_from)
        self.points = torch.from_numpy(scene.points.astype(np.float32))
        self.colors = torch.from_numpy(scene.colors.astype(np.float32))
        self.scene = scene

    def _read(self) -> Scene:
        root = self._make_room() if self.source == "room" else Path(self.source)
        if not root.exists():
            raise ValueError(f"source={self.source!r}: no such file or folder ('room' is the procedural scene)")
        kind = self.format
        if kind == "auto":
            kind = "transforms" if root.is_file() or (root / "transforms.json").is_file() else "colmap"
        scene = read_transforms(root) if kind == "transforms" else read_colmap(root)
        beside = (root if root.is_dir() else root.parent) / "lidar.ply"
        if self.cloud is not None:
            scene.points, scene.colors = read_cloud(self.cloud)
        elif beside.is_file():
            scene.points, scene.colors = read_cloud(beside)
        return scene

    def _make_room(self) -> Path:
        """Return the room's folder, made if it is not there; whole or absent."""
        name = "room-" + hashlib.sha256(json.dumps(self._room, sort_keys=True).encode()).hexdigest()[:12]
        user = os.getuid() if hasattr(os, "getuid") else 0
        base = Path(self._folder) if self._folder else Path(tempfile.gettempdir()) / f"evolute-rooms-{user}"
        folder = base / name
        if not (folder / "transforms.json").is_file():
            base.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=base) as draft:
                made = make_room(Path(draft) / name, **self._room)  # type: ignore[arg-type]
                try:
                    made.replace(folder)
                except OSError:  # another process was faster
                    if not (folder / "transforms.json").is_file():
                        raise
        return folder

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        views, _ = self._sets()
        loader = ResumableLoader(views, batch_size=1, sampler=ResumableSampler(len(views), self.seed), collate_fn=_one)
        loader.position = self._position
        return loader

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator()  # its own: making an iterator then draws nothing from the global one
        return DataLoader(self._sets()[1], batch_size=1, collate_fn=_one, generator=generator)

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    @override
    def _identity(self) -> dict[str, Any]:
        train, test = self._sets()
        return {"training views": len(train), "test views": len(test), "seed": self.seed, "depth_from": self.depth_from}

    def _sets(self) -> "tuple[Views, Views]":
        if self._views is None:
            raise RuntimeError("SceneDataModule: call setup() first (a Trainer does)")
        return self._views


class Views(Dataset[dict[str, Tensor]]):
    """Decoded views by index."""

    def __init__(self, scene: Scene, indices: list[int], depth: str) -> None:
        self.indices = indices
        self._items = [_item(scene, scene.views[i], depth) | {"index": torch.tensor(i)} for i in indices]

    def __len__(self) -> int:
        return len(self._items)

    @override
    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return self._items[at]


def _item(scene: Scene, view: View, depth: str) -> dict[str, Tensor]:
    exact = view.depth()
    nothing = np.zeros((view.height, view.width), np.float32)
    given = project_cloud(scene.points, view) if depth == "lidar" else exact if depth == "files" else None
    return {
        "image": torch.from_numpy(view.image().copy()),
        "depth": torch.from_numpy(nothing if given is None else given),
        "true_depth": torch.from_numpy(nothing if exact is None else exact),
        "viewmat": torch.from_numpy(view.viewmat).float(),
        "K": torch.from_numpy(view.K).float(),
    }


def _one(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: value[None] for name, value in items[0].items()}

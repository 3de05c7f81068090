"""What a splatting run leaves behind: a scene that viewers open, and a flight through it."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation, Slerp
from typing_extensions import override

from evolute.callbacks.gaussian_callback import gaussian_module


class ExportPLY(Callback):
    """Write the scene when training ends, and every so many steps if asked.

    Args:
        path: relative to ``trainer.default_root_dir``; ``{step}`` in it becomes the optimizer step.
        every_n_steps: also write that often; None for the end alone.

    Raises:
        MisconfigurationException: if the path does not end in .ply, or the interval is below 1.
    """

    def __init__(self, path: str = "scene.ply", every_n_steps: int | None = None) -> None:
        if not path.endswith(".ply"):
            raise MisconfigurationException(f"ExportPLY(path={path!r}): must end in .ply")
        if every_n_steps is not None and every_n_steps < 1:
            raise MisconfigurationException(f"ExportPLY(every_n_steps={every_n_steps}): must be at least 1, or null")
        self.path, self.every_n_steps = path, every_n_steps

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        gaussian_module(pl_module, "ExportPLY")

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every_n_steps and trainer.global_step and trainer.global_step % self.every_n_steps == 0:
            self._write(trainer, pl_module)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module)

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            path = Path(trainer.default_root_dir) / self.path.replace("{step}", f"{trainer.global_step:08d}")
            gaussian_module(pl_module, "ExportPLY").export_ply(str(path))


class RenderVideo(Callback):
    """Fly through the training cameras when training ends, into an animated WebP that browsers play.

    Args:
        path: relative to ``trainer.default_root_dir``.
        frames: of the flight.
        fps: frames a second.
        keyframes: cameras, evenly taken from the views, that the flight passes.

    Raises:
        MisconfigurationException: if a number is below its least, the path does not end in .webp, or (at the start of
            fit) the data module has no scene with views.
    """

    def __init__(self, path: str = "flight.webp", frames: int = 60, fps: int = 15, keyframes: int = 12) -> None:
        for name, value, least in (("frames", frames, 2), ("fps", fps, 1), ("keyframes", keyframes, 2)):
            if value < least:
                raise MisconfigurationException(f"RenderVideo({name}={value}): must be at least {least}")
        if not path.endswith(".webp"):
            raise MisconfigurationException(f"RenderVideo(path={path!r}): must end in .webp")
        self.path, self.frames, self.fps, self.keyframes = path, frames, fps, keyframes

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        gaussian_module(pl_module, "RenderVideo")
        if not getattr(getattr(trainer.datamodule, "scene", None), "views", None):  # pyright: ignore
            raise MisconfigurationException("RenderVideo flies past the views of datamodule.scene, and there are none")

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        from PIL import Image
        from rich.console import Console
        from rich.progress import track

        views = trainer.datamodule.scene.views  # pyright: ignore[reportAttributeAccessIssue]
        stops = views[:: max(1, len(views) // self.keyframes)]
        poses = flight(np.stack([view.viewmat for view in stops]), self.frames)
        shown = trainer.progress_bar_callback is not None
        pictures: list[Image.Image] = []
        device, console = pl_module.device, Console(file=sys.stderr)
        for pose in track(poses, "Rendering the flight", console=console, disable=not shown, transient=True):
            viewmat, K = (torch.from_numpy(m).float().to(device) for m in (pose, views[0].K))
            frame = gaussian_module(pl_module, "RenderVideo").view(viewmat, K, views[0].width, views[0].height)
            pictures.append(Image.fromarray((frame * 255).round().byte().cpu().numpy()))
        path = Path(trainer.default_root_dir) / self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        pictures[0].save(
            part, format="WEBP", save_all=True, append_images=pictures[1:], duration=round(1000 / self.fps), loop=0
        )
        part.replace(path)
        rank_zero_info(f"RenderVideo: {path}")


def flight(viewmats: NDArray[np.float64], frames: int) -> NDArray[np.float64]:
    """Return world-to-camera matrices [frames, 4, 4] along a closed path through cameras [n, 4, 4].

    Positions follow a closed cubic spline, rotations turn evenly from one camera to the next.
    """
    from scipy.interpolate import CubicSpline

    turns = viewmats[:, :3, :3].transpose(0, 2, 1)
    eyes = -(turns @ viewmats[:, :3, 3:])[..., 0]
    stops = np.arange(len(viewmats) + 1)
    times = np.linspace(0, len(viewmats), frames, endpoint=False)
    path = CubicSpline(stops, np.concatenate([eyes, eyes[:1]]), bc_type="periodic")(times)
    facing = Slerp(stops, Rotation.from_matrix(np.concatenate([turns, turns[:1]])))(times).as_matrix()
    poses = np.tile(np.eye(4), (frames, 1, 1))
    poses[:, :3, :3] = facing.transpose(0, 2, 1)
    poses[:, :3, 3] = -(poses[:, :3, :3] @ path[..., None])[..., 0]
    return poses

"""What changes over a splatting run by the step alone: degree of the harmonics, weight of the depth."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from evolute.callbacks.gaussian_callback import gaussian_module


class SHSchedule(Callback):
    """Begin with constant colours and use one more degree of the spherical harmonics every ``every_n_steps``.

    Args:
        every_n_steps: optimizer steps a degree lasts; 1000 for a run of 30,000.

    Raises:
        MisconfigurationException: if it is below 1, or the module trains no Gaussians.
    """

    def __init__(self, every_n_steps: int = 1000) -> None:
        if every_n_steps < 1:
            raise MisconfigurationException(f"SHSchedule(every_n_steps={every_n_steps}): must be at least 1")
        self.every_n_steps = every_n_steps
        self._highest = 0

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        held = gaussian_module(pl_module, "SHSchedule").gaussian_parameters()
        self._highest = round((1 + held["shN"].shape[1]) ** 0.5) - 1 if "shN" in held else 0

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        module = gaussian_module(pl_module, "SHSchedule")
        module.sh_active = min(self._highest, trainer.global_step // self.every_n_steps)


class DepthSchedule(Callback):
    """Turn the depth loss on at step ``start``, over ``ramp`` steps.

    Plane depth explodes while orientations are random; with expected depth nothing has to wait.

    Args:
        start: first optimizer step with depth.
        ramp: steps from none to all of its weight.
        end: step from which it is off again; None for never.

    Raises:
        MisconfigurationException: if a number is negative, or the module trains no Gaussians.
    """

    def __init__(self, start: int = 0, ramp: int = 0, end: int | None = None) -> None:
        for name, value in (("start", start), ("ramp", ramp), ("end", end or 0)):
            if value < 0:
                raise MisconfigurationException(f"DepthSchedule({name}={value}): must be at least 0")
        self.start, self.ramp, self.end = start, ramp, end

    def factor(self, step: int) -> float:
        """Return the share of the depth loss in use at an optimizer step."""
        if step < self.start or (self.end is not None and step >= self.end):
            return 0.0
        return 1.0 if self.ramp == 0 else min(1.0, (step - self.start + 1) / self.ramp)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        gaussian_module(pl_module, "DepthSchedule")

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        gaussian_module(pl_module, "DepthSchedule").depth_factor = self.factor(trainer.global_step)

"""What callbacks that act on a set of Gaussians have in common."""

from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from typing_extensions import override

from evolute.callbacks.access import Rows, backend_for, require
from evolute.callbacks.protocols import GaussianModule

CONSTANT = 0.28209479177387814
"""The constant spherical harmonic: base colour is this times ``sh0``, plus one half."""


def gaussian_module(module: Any, who: str) -> GaussianModule:
    """Return a module that trains Gaussians.

    Raises:
        MisconfigurationException: saying what the module lacks.
    """
    wanted = ("render_info", "sh_active", "depth_factor", "gaussian_parameters", "scene_extent", "export_ply", "view")
    lacks = [name for name in wanted if not hasattr(module, name)]
    if lacks:
        raise MisconfigurationException(
            f"{who} acts on Gaussians, and {type(module).__name__} has no {lacks[0]}: use the splatting recipe, or "
            "give the module what evolute.callbacks.protocols.GaussianModule lists"
        )
    return module


class GaussianCallback(Callback):
    """Base of callbacks that change the number of Gaussians, or rewrite them, between two steps.

    They act in ``on_train_batch_end``, when everybody else has seen the step.
    """

    name: ClassVar[str] = "GaussianCallback"

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{self.name} acts between the steps of automatic optimisation, {type(pl_module).__name__} is manual"
            )
        gaussian_module(pl_module, self.name)
        backend = backend_for(trainer, self.name)
        require(backend, self.name, updates="use one device", optimizer_state="use one device")
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"{self.name} changes the number of Gaussians, and {trainer.world_size} processes would go on reducing "
                "gradients of the shapes they began with, silently apart: use one device"
            )

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._rows = Rows(trainer, self._params(pl_module), self.name)

    def _params(self, pl_module: L.LightningModule) -> dict[str, nn.Parameter]:
        return gaussian_module(pl_module, self.name).gaussian_parameters()

    def stepped(self, trainer: L.Trainer, batch_idx: int) -> bool:
        """Say, in ``on_train_batch_end``, whether the batch ended with an optimizer step."""
        return not trainer.fit_loop.epoch_loop._should_accumulate()

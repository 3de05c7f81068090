"""Opacities lowered now and then, so that Gaussians that nobody needs stay faint and are pruned."""

import math
import time
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from evolute.callbacks.gaussian_callback import GaussianCallback
from evolute.callbacks.record import record


class OpacityReset(GaussianCallback):
    """Clamp every opacity to ``ceiling`` each ``every_n_steps`` and forget its moments (Kerbl et al. 2023, 5.2).

    Records ``opacity/reset``, the share of Gaussians that were above, and ``opacity/time_ms`` at every reset.

    Args:
        every_n_steps: optimizer steps between two resets.
        ceiling: largest opacity after one; twice the pruning threshold by default.
        stop: share of the run after which it no longer happens.
        dry_run: record what would happen and change nothing.

    Raises:
        MisconfigurationException: if an argument is out of range, or the module trains no Gaussians.
    """

    name: ClassVar[str] = "OpacityReset"

    def __init__(
        self, every_n_steps: int = 3000, ceiling: float = 0.01, stop: float = 0.5, dry_run: bool = False
    ) -> None:
        for name, value, least, most in (
            ("every_n_steps", every_n_steps, 1, math.inf), ("ceiling", ceiling, 1e-6, 1 - 1e-6), ("stop", stop, 0, 1),
        ):  # fmt: skip
            if not least <= value <= most:
                raise MisconfigurationException(f"OpacityReset({name}={value}): must lie in [{least:g}, {most:g}]")
        self.every_n_steps, self.ceiling, self.stop, self.dry_run = every_n_steps, ceiling, stop, dry_run

    def should_reset(self, step: int, total: float) -> bool:
        """Say whether opacities are lowered after optimizer step ``step`` (from 0) of ``total``."""
        return (step + 1) % self.every_n_steps == 0 and step + 1 <= self.stop * total

    @override
    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, total = trainer.global_step - 1, float(trainer.estimated_stepping_batches)
        if not self.stepped(trainer, batch_idx) or not self.should_reset(step, total):
            return
        begin = time.perf_counter()
        logits = self._rows.params["opacities"].data
        limit = math.log(self.ceiling / (1 - self.ceiling))
        above = (logits > limit).float().mean()
        if not self.dry_run:
            everyone = torch.arange(len(logits), device=logits.device)
            self._rows.write(everyone, {"opacities": logits.clamp_max(limit)})
        record(trainer, "opacity", {"reset": above, "time_ms": 1e3 * (time.perf_counter() - begin)}, step)

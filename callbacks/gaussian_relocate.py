"""3DGS-MCMC: a fixed number of Gaussians that move to where they are needed, on any device."""

import math
import time
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from evolute.callbacks.gaussian_callback import GaussianCallback
from evolute.callbacks.record import record
from evolute.geometry import relocated

STEEP, EDGE = 100.0, 0.995
"""Of the gate: Gaussians of opacity above 0.005 are hardly moved."""


class GaussianRelocate(GaussianCallback):
    """Relocate dead Gaussians onto living ones, add up to a cap, and shake positions (Kheradmand et al. 2024).

    The baseline at equal budget for :class:`GaussianDensify`, after gsplat's MCMCStrategy, whose relocation needs CUDA.
    Every step adds noise to the positions, ``lr x noise x covariance``, of faint Gaussians only. Use it with
    ``opacity_reg`` and ``scale_reg`` of 0.01 in the recipe.

    Records ``relocate/gaussians``, ``moved``, ``added`` and ``time_ms`` at every relocation.

    Args:
        cap: largest number of Gaussians.
        every_n_steps: optimizer steps between two relocations.
        start: first step that may relocate.
        stop: share of the run after which nothing is relocated any more; noise goes on.
        min_opacity: at or below it a Gaussian is dead.
        growth: largest growth of the number in one relocation, as a share.
        noise: factor of the noise; 0 turns it off.
        seed: of draws and noise.
        dry_run: record what would happen and change nothing.

    Raises:
        MisconfigurationException: if an argument is out of range; at the start of fit, if the module trains no
            Gaussians, holds more than ``cap``, or runs in several processes.
    """

    name: ClassVar[str] = "GaussianRelocate"

    def __init__(
        self,
        cap: int = 4000,
        every_n_steps: int = 100,
        start: int = 100,
        stop: float = 0.83,
        min_opacity: float = 0.005,
        growth: float = 0.05,
        noise: float = 5e5,
        seed: int = 0,
        dry_run: bool = False,
    ) -> None:
        for name, value, least, most in (
            ("cap", cap, 1, math.inf), ("every_n_steps", every_n_steps, 1, math.inf), ("start", start, 0, math.inf),
            ("stop", stop, 0, 1), ("min_opacity", min_opacity, 0, 1), ("growth", growth, 0, math.inf),
            ("noise", noise, 0, math.inf),
        ):  # fmt: skip
            if not least <= value <= most:
                raise MisconfigurationException(f"GaussianRelocate({name}={value}): must lie in [{least:g}, {most:g}]")
        self.cap, self.every_n_steps, self.start, self.stop = cap, every_n_steps, start, stop
        self.min_opacity, self.growth, self.noise = min_opacity, growth, noise
        self.seed, self.dry_run = seed, dry_run
        self._total = 1.0

    def should_relocate(self, step: int) -> bool:
        """Say whether Gaussians are relocated after optimizer step ``step`` (from 0)."""
        done = step + 1
        return done >= self.start and done % self.every_n_steps == 0 and done <= self.stop * self._total

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if len(self._rows) > self.cap:
            raise MisconfigurationException(
                f"GaussianRelocate(cap={self.cap}): the scene begins with {len(self._rows)} Gaussians; raise it"
            )
        self._total = float(trainer.estimated_stepping_batches)

    @override
    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.stepped(trainer, batch_idx):
            return
        step, begin = trainer.global_step - 1, time.perf_counter()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        values: dict[str, float] | None = None
        if self.should_relocate(step):
            values = {"moved": float(self._relocate(generator)), "added": float(self._grow(generator))}
        if self.noise and not self.dry_run:
            self._shake(generator)
        if values is not None:
            values |= {"gaussians": float(len(self._rows)), "time_ms": 1e3 * (time.perf_counter() - begin)}
            record(trainer, "relocate", values, step)

    def _relocate(self, generator: torch.Generator) -> int:
        """Move the dead onto the living, drawn by opacity; return how many."""
        opacity = self._rows.params["opacities"].sigmoid()
        dead, alive = ((opacity <= self.min_opacity) == state for state in (True, False))
        at, living = dead.nonzero()[:, 0], alive.nonzero()[:, 0]
        if not len(at) or not len(living):
            return 0
        hosts = living[_draw(opacity[living], len(at), generator)]
        if not self.dry_run:
            new = self._shared(hosts)
            self._rows.write(hosts, {name: new[name] for name in ("opacities", "scales")})
            self._rows.write(at, {name: p.data[hosts] for name, p in self._rows.params.items()})
        return len(at)

    def _grow(self, generator: torch.Generator) -> int:
        """Add copies of Gaussians drawn by opacity; return how many."""
        count = max(0, min(self.cap, int((1 + self.growth) * len(self._rows))) - len(self._rows))
        if not count:
            return 0
        hosts = _draw(self._rows.params["opacities"].sigmoid(), count, generator)
        if not self.dry_run:
            new = self._shared(hosts)
            self._rows.write(hosts, {name: new[name] for name in ("opacities", "scales")})
            fresh = {name: p.data[hosts] for name, p in self._rows.params.items()}
            self._rows.replace(torch.arange(len(self._rows)), fresh)
        return count

    def _shared(self, hosts: Tensor) -> dict[str, Tensor]:
        """Return the parameters of hosts [M], repeated ones included, once each lies there with its copies."""
        params = self._rows.params
        copies = torch.bincount(hosts, minlength=len(self._rows))[hosts] + 1
        opacity, scales = relocated(
            params["opacities"].data[hosts].sigmoid(), params["scales"].data[hosts].exp(), copies
        )
        return {"opacities": opacity.clamp(self.min_opacity, 1 - 1e-6).logit(), "scales": scales.log()}

    def _shake(self, generator: torch.Generator) -> None:
        params = {name: p.data for name, p in self._rows.params.items()}
        gate = torch.sigmoid(STEEP * ((1 - params["opacities"].sigmoid()) - EDGE))
        drawn = torch.randn(len(self._rows), 3, generator=generator).to(gate) * gate[:, None]
        turn = _matrices(params["quats"]) * params["scales"].exp()[:, None]
        moved = (turn @ (turn.transpose(1, 2) @ drawn[..., None]))[..., 0]
        params["means"].add_(moved, alpha=self._rows.rate("means") * self.noise)


def _draw(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw indices by weight, with replacement, however many there are."""
    edges = weights.double().cpu().cumsum(0)
    drawn = torch.rand(count, generator=generator, dtype=torch.float64) * edges[-1]
    return torch.searchsorted(edges, drawn, right=True).clamp_max(len(weights) - 1).to(weights.device)


def _matrices(quats: Tensor) -> Tensor:
    w, x, y, z = F.normalize(quats, dim=-1).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, -1).reshape(-1, 3, 3)

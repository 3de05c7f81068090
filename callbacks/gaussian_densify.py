"""Split, clone and prune Gaussians where shape and texture ask for it, never above a budget."""

import math
import time
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from evolute.callbacks.access import gradient_of
from evolute.callbacks.gaussian_callback import CONSTANT, GaussianCallback, gaussian_module
from evolute.callbacks.record import record
from evolute.geometry import Neighbourhoods, admit, split_threshold, subset_neighbourhoods

SHRINK = 1.6
"""Children of a split are this much smaller (Kerbl et al. 2023)."""


class GaussianDensify(GaussianCallback):
    """GTLR-GS refinement under a hard cap: the number of Gaussians is at most ``budget`` after every step.

    Candidates are Gaussians whose mean image-space gradient exceeds ``grad_threshold``. Small ones are cloned; large
    ones are split if the surface variation of their neighbourhood also exceeds theta, which rises over the run. The
    candidates that fit into the budget are taken in the order of gradient times mean of shape and texture. When it is
    full, at most ``replaced`` of the Gaussians, those of least opacity times visibility, make room.

    Records ``densify/gaussians``, ``candidates``, ``clones``, ``splits``, ``pruned``, ``freed``, ``theta``,
    ``pass_rate`` (share of the large candidates whose surroundings are curved enough) and ``time_ms`` at every
    refinement.

    Args:
        budget: hard cap.
        every_n_steps: optimizer steps between two refinements.
        start: first step that may refine.
        stop: share of the run after which nothing changes any more.
        grad_threshold: in the unit of gsplat, gradients of half an image.
        grow_scale: largest standard deviation, in extents of the scene, that is cloned; larger ones are split.
        min_opacity: fainter ones are pruned.
        max_scale: larger ones, in extents of the scene, are pruned.
        theta: surface variation that a split needs, at the start and at the end of the run.
        theta_mode: ``"fixed"`` takes ``theta`` as it is; ``"quantile"`` passes a share of the large candidates instead,
            those of largest variation: ``passing`` at the start and at the end. What a fixed value passes depends on
            the neighbours, the noise and the density.
        passing: see ``theta_mode``.
        neighbours: Gaussians in a neighbourhood.
        reference: neighbours are searched among at most so many.
        replaced: largest share that may make room in one refinement.
        seed: of the children's places.
        dry_run: record what would happen and change nothing.

    Raises:
        MisconfigurationException: if an argument is out of range; at the start of fit, if the module trains no
            Gaussians, holds more than ``budget``, or runs in several processes.
    """

    name: ClassVar[str] = "GaussianDensify"

    def __init__(
        self,
        budget: int = 4000,
        every_n_steps: int = 100,
        start: int = 100,
        stop: float = 0.5,
        grad_threshold: float = 2e-4,
        grow_scale: float = 0.01,
        min_opacity: float = 0.005,
        max_scale: float = 0.5,
        theta: tuple[float, float] = (0.1, 0.3),
        theta_mode: Literal["fixed", "quantile"] = "fixed",
        passing: tuple[float, float] = (0.3, 0.05),
        neighbours: int = 16,
        reference: int = 200_000,
        replaced: float = 0.05,
        seed: int = 0,
        dry_run: bool = False,
    ) -> None:
        for name, value, least, most in (
            ("budget", budget, 1, math.inf), ("every_n_steps", every_n_steps, 1, math.inf),
            ("start", start, 0, math.inf), ("stop", stop, 0, 1), ("grad_threshold", grad_threshold, 0, math.inf),
            ("grow_scale", grow_scale, 0, math.inf),
            ("min_opacity", min_opacity, 0, 1), ("max_scale", max_scale, 0, math.inf), ("replaced", replaced, 0, 1),
            ("neighbours", neighbours, 2, math.inf), ("reference", reference, 2, math.inf),
            ("theta", min(theta), 0, 1), ("passing", min(passing), 0, 1), ("passing", max(passing), 0, 1),
        ):  # fmt: skip
            if not least <= value <= most:
                raise MisconfigurationException(f"GaussianDensify({name}={value}): must lie in [{least:g}, {most:g}]")
        if theta_mode not in ("fixed", "quantile"):
            raise MisconfigurationException(f"GaussianDensify(theta_mode={theta_mode!r}): 'fixed' or 'quantile'")
        self.budget, self.every_n_steps, self.start, self.stop = budget, every_n_steps, start, stop
        self.grad_threshold, self.grow_scale = grad_threshold, grow_scale
        self.min_opacity, self.max_scale = min_opacity, max_scale
        self.theta, self.theta_mode, self.passing = theta, theta_mode, passing
        self.neighbours, self.reference, self.replaced = neighbours, reference, replaced
        self.seed, self.dry_run = seed, dry_run
        self._total = 1
        self._sum = self._seen = torch.zeros(0)

    def should_refine(self, step: int) -> bool:
        """Say whether Gaussians change after optimizer step ``step`` (from 0). Override for another schedule."""
        done = step + 1
        return done >= self.start and done % self.every_n_steps == 0 and done <= self.stop * self._total

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if len(self._rows) > self.budget:
            raise MisconfigurationException(
                f"GaussianDensify(budget={self.budget}): the scene begins with {len(self._rows)} Gaussians; raise it, "
                "or begin with fewer"
            )
        total = trainer.estimated_stepping_batches
        if math.isinf(total):
            raise MisconfigurationException("GaussianDensify: theta needs the length of the run: set trainer.max_steps")
        self._total = int(total)
        if len(self._sum) != len(self._rows):
            self._restart()

    def _restart(self) -> None:
        like = self._rows.params["opacities"].detach()
        self._sum, self._seen = torch.zeros_like(like), torch.zeros_like(like)

    @override
    @torch.no_grad()
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the image-space gradients of a view, of the Gaussians it shows."""
        info = gaussian_module(pl_module, self.name).render_info
        gradient = gradient_of(trainer, info["means2d"]) if info else None
        if gradient is None:
            return
        half = gradient.new_tensor([info["width"] / 2, info["height"] / 2])
        shown = (info["radii"][0] > 0).all(-1)
        self._sum += torch.where(shown, (gradient[0] * half).norm(dim=-1), 0.0)
        self._seen += shown

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = gaussian_module(pl_module, self.name)
        step = trainer.global_step - 1
        if not self.stepped(trainer, batch_idx) or not self.should_refine(step):
            return
        begin = time.perf_counter()
        values = self._refine(module.scene_extent(), step)
        record(trainer, "densify", {**values, "time_ms": 1e3 * (time.perf_counter() - begin)}, step)

    @torch.no_grad()
    def _refine(self, extent: float, step: int) -> dict[str, Tensor | float]:
        params = {name: p.detach() for name, p in self._rows.params.items()}
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        width = params["scales"].exp().amax(-1)
        opacity = params["opacities"].sigmoid()
        dropped = (opacity < self.min_opacity) | (width > self.max_scale * extent)
        if bool(dropped.all()):  # a scene of nothing cannot be trained
            dropped = torch.zeros_like(dropped)
        wanted = (self._sum / self._seen.clamp_min(1) > self.grad_threshold) & ~dropped
        candidates = wanted.nonzero()[:, 0]
        near = self._neighbourhoods(params, candidates, generator)
        large = width[candidates] > self.grow_scale * extent
        theta, passes = self._passes(near.variation, large, step)
        rate = float(passes.sum()) / max(1, int(large.sum()))
        chosen = ~large | passes
        order = self._priority(candidates, near)[chosen]
        candidates, large = candidates[chosen], large[chosen]
        room = self.budget - int((~dropped).sum())
        freed = self._free(dropped, candidates, opacity, len(candidates) - room)
        taken = admit(order, torch.ones_like(order, dtype=torch.long), room + len(freed))
        clones, splits = candidates[taken][~large[taken]], candidates[taken][large[taken]]
        gone = dropped.clone()
        gone[freed] = True
        gone[splits] = True
        if not self.dry_run and (bool(gone.any()) or len(clones)):
            fresh = {name: torch.cat([p[clones], p[splits], p[splits]]) for name, p in params.items()}
            _place_children(fresh, len(splits), generator)
            self._rows.replace((~gone).nonzero()[:, 0], fresh)
        self._restart()
        return {
            "gaussians": float(len(self._rows)),
            "candidates": float(wanted.sum()),
            "clones": float(len(clones)),
            "splits": float(len(splits)),
            "pruned": float(dropped.sum()),
            "freed": float(len(freed)),
            "theta": theta,
            "pass_rate": rate,
        }

    def _neighbourhoods(self, params: dict[str, Tensor], at: Tensor, generator: torch.Generator) -> Neighbourhoods:
        colors = (CONSTANT * params["sh0"][:, 0] + 0.5).clamp(0, 1)
        return subset_neighbourhoods(params["means"], at, self.neighbours, colors, self.reference, generator)

    def _priority(self, candidates: Tensor, near: Neighbourhoods) -> Tensor:
        """Return gradient times the mean of shape and texture, each in [0, 1] over the candidates."""
        assert near.texture is not None
        detail = [v / v.max().clamp_min(1e-12) if len(v) else v for v in (near.variation, near.texture)]
        return (self._sum / self._seen.clamp_min(1))[candidates] * (detail[0] + detail[1]) / 2

    def _passes(self, variation: Tensor, large: Tensor, step: int) -> tuple[float, Tensor]:
        """Return theta, and which large candidates have a surface variation above it."""
        theta = split_threshold(step + 1, self._total, *self.theta)
        if self.theta_mode == "quantile":
            share = split_threshold(step + 1, self._total, *self.passing)
            values = variation[large].sort(descending=True).values
            count = math.ceil(share * len(values))
            theta = float(values[count]) if count < len(values) else -1.0
        return theta, large & (variation > theta)

    def _free(self, dropped: Tensor, candidates: Tensor, opacity: Tensor, lacking: int) -> Tensor:
        """Return who makes room: least opacity times visibility, no candidates, at most the allowed share."""
        allowed = min(lacking, int(self.replaced * len(dropped)))
        if allowed <= 0:
            return candidates[:0]
        worth = torch.where(dropped, math.inf, opacity * self._seen)
        worth[candidates] = math.inf
        order = torch.argsort(worth, stable=True)[:allowed]
        return order[worth[order].isfinite()]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"sum": self._sum, "seen": self._seen}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sum, self._seen = state_dict["sum"].clone(), state_dict["seen"].clone()


def _place_children(fresh: dict[str, Tensor], splits: int, generator: torch.Generator) -> None:
    """Draw the places of the last ``2 splits`` rows from the Gaussian they come from, and make them smaller."""
    if not splits:
        return
    last = slice(len(fresh["means"]) - 2 * splits, None)
    scales = fresh["scales"][last].exp()
    drawn = torch.randn(2 * splits, 3, generator=generator).to(scales) * scales
    fresh["means"][last] += _rotate(fresh["quats"][last], drawn)
    fresh["scales"][last] -= math.log(SHRINK)


def _rotate(quats: Tensor, vectors: Tensor) -> Tensor:
    """Rotate vectors [n, 3] by quaternions [n, 4] ``w x y z`` of any length."""
    q = nn.functional.normalize(quats, dim=-1)
    w, axis = q[:, :1], q[:, 1:]
    turned = torch.linalg.cross(axis, vectors)
    return vectors + 2 * (w * turned + torch.linalg.cross(axis, turned))

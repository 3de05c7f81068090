"""Train a scene of 3D Gaussians from posed images and a LiDAR cloud."""

import math
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from evolute.callbacks.record import record_arrays
from evolute.geometry import allocation_probabilities, depth_confidence, draw, neighbourhoods, plane_depth
from evolute.models.splatting import NAMES, Camera, GaussianScene, Rendered, read_ply, render, write_ply
from evolute.models.splatting.rasterizer import Backend
from evolute.recipes.splatting.evaluation import LPIPS, SHOWN, image_scores, picture
from evolute.recipes.splatting.losses import LEAST_ALPHA, depth_residual, photometric

RATES = {"means": 1.6e-4, "scales": 5e-3, "quats": 1e-3, "opacities": 5e-2, "sh0": 2.5e-3, "shN": 1.25e-4}
"""Learning rates of gsplat, for 30,000 steps; that of the means is multiplied with the extent of the cameras."""


class GaussianSplat(L.LightningModule):
    """3D Gaussian splatting with geometry-aware allocation and metric depth, under automatic optimisation.

    One Adam with a group a parameter, named ``means``, ``scales``, ``quats``, ``opacities``, ``sh0`` and ``shN``. A
    batch is one view of :class:`evolute.data.scenes.SceneDataModule`. The scene is made in ``configure_model`` from the
    data module's cloud: at most ``budget`` of its points, drawn by ``allocation``.

    Logs ``train/loss``, ``train/l1_ssim``, ``train/depth_loss`` and ``train/gaussians``; averaged over held-out views,
    ``val/psnr`` (dB, of 8-bit images), ``val/ssim``, ``val/lpips`` where its weights are at hand, ``val/depth_mae`` and
    ``val/depth_rmse`` in the unit of the scene where true depth is known.

    Args:
        budget: largest number of Gaussians to start with; give ``GaussianDensify`` the same one.
        initial: share of ``budget`` to begin with; less than 1 leaves room to grow.
        allocation: ``"geometry_texture"`` (GTLR-GS) or ``"uniform"``.
        shape_weight: of surface variation in the allocation.
        texture_weight: of texture variation.
        base_ratio: share of the points drawn uniformly under ``"geometry_texture"``.
        neighbours: points in a neighbourhood, for allocation and normals.
        normalise: see :func:`evolute.geometry.allocation_probabilities`.
        flat: begin with discs that lie on the surface instead of balls.
        init_opacity: of all Gaussians.
        init_scale: factor of the mean distance to three neighbours.
        ply: a scene to go on from instead, as :func:`evolute.models.splatting.write_ply` writes it.
        sh_degree: of the spherical harmonics.
        rates: learning rates over :data:`RATES`, by name.
        means_decay: the rate of the means falls exponentially to this share of itself.
        dssim: weight of ``1 - SSIM`` against L1.
        depth_weight: weight of the depth loss; 0 turns it off.
        depth: ``"expected"`` (weighted mean of the centres' depths) or ``"plane"`` (unbiased on slanted discs).
        confidence: how the depth loss trusts pixels: by the image's Laplacian over its ``"max"`` or its 99 %
            ``"quantile"``, or ``"none"``, everywhere alike.
        opacity_reg: weight of the mean opacity; MCMC relocation wants 0.01.
        scale_reg: weight of the mean scale, likewise.
        backend: of the rasterizer.
        allocation_seed: of the draw of points.
        on_nonfinite: what a non-finite loss does: ``"skip"`` takes no optimizer step, ``"raise"`` ends the run.
        max_nonfinite: skips in a row after which ``"skip"`` raises as well.

    Attributes:
        sh_active: degree of the harmonics in use; ``SHSchedule`` raises it.
        depth_factor: share of ``depth_weight`` in use; ``DepthSchedule`` raises it.
        render_info: of the last training view, for densification.

    Raises:
        ValueError: if an argument is out of range, or (at ``configure_model``) the budget exceeds the points.
    """

    def __init__(
        self,
        budget: int = 4000,
        initial: float = 1.0,
        allocation: Literal["geometry_texture", "uniform"] = "geometry_texture",
        shape_weight: float = 0.5,
        texture_weight: float = 0.5,
        base_ratio: float = 0.0,
        neighbours: int = 64,
        normalise: Literal["minmax", "quantile"] = "minmax",
        flat: bool = False,
        init_opacity: float = 0.1,
        init_scale: float = 1.0,
        ply: str | None = None,
        sh_degree: int = 3,
        rates: dict[str, float] | None = None,
        means_decay: float = 0.01,
        dssim: float = 0.2,
        depth_weight: float = 1.0,
        depth: Literal["expected", "plane"] = "expected",
        confidence: Literal["max", "quantile", "none"] = "max",
        opacity_reg: float = 0.0,
        scale_reg: float = 0.0,
        backend: Backend = "auto",
        allocation_seed: int = 0,
        on_nonfinite: Literal["skip", "raise"] = "skip",
        max_nonfinite: int = 5,
    ) -> None:
        super().__init__()
        for name, value, least, most in (
            ("budget", budget, 1, math.inf), ("initial", initial, 1e-9, 1), ("base_ratio", base_ratio, 0, 1),
            ("shape_weight", shape_weight, 0, math.inf), ("texture_weight", texture_weight, 0, math.inf),
            ("neighbours", neighbours, 2, math.inf), ("init_opacity", init_opacity, 1e-4, 0.9999),
            ("init_scale", init_scale, 1e-6, math.inf), ("sh_degree", sh_degree, 0, 3),
            ("means_decay", means_decay, 1e-9, 1), ("dssim", dssim, 0, 1), ("depth_weight", depth_weight, 0, math.inf),
            ("opacity_reg", opacity_reg, 0, math.inf), ("scale_reg", scale_reg, 0, math.inf),
            ("max_nonfinite", max_nonfinite, 1, math.inf),
        ):  # fmt: skip
            if not least <= value <= most:
                raise ValueError(f"GaussianSplat({name}={value}): must lie in [{least:g}, {most:g}]")
        for name, value, known in (
            ("allocation", allocation, ("geometry_texture", "uniform")), ("depth", depth, ("expected", "plane")),
            ("normalise", normalise, ("minmax", "quantile")), ("confidence", confidence, ("max", "quantile", "none")),
            ("backend", backend, ("auto", "gsplat", "numba", "torch")),
            ("on_nonfinite", on_nonfinite, ("skip", "raise")),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"GaussianSplat({name}={value!r}): must be one of {', '.join(map(repr, known))}")
        if unknown := set(rates or {}) - set(NAMES):
            raise ValueError(f"GaussianSplat(rates={rates}): {sorted(unknown)[0]!r} is none of {', '.join(NAMES)}")
        self.save_hyperparameters()
        self.settings: Any = self.hparams
        self.scene: GaussianScene | None = None
        self.sh_active = sh_degree
        self.depth_factor = 1.0
        self.render_info: dict[str, Any] = {}
        self._extent = 1.0
        self._nonfinite = self._nonfinite_in_a_row = 0
        self._finite = True
        self._lpips = LPIPS()

    @override
    def configure_model(self) -> None:
        if self.scene is None:
            s = self.settings
            if s.ply is None:
                self.scene = self._allocate()
            else:
                self.scene = read_ply(s.ply)
                self.sh_active = self.scene.sh_degree
        datamodule: Any = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        if getattr(datamodule, "scene", None) is not None:
            poses = torch.stack([torch.from_numpy(view.viewmat) for view in datamodule.scene.views])
            eyes = -(poses[:, :3, :3].transpose(1, 2) @ poses[:, :3, 3:])[..., 0]
            self._extent = 1.1 * max(float((eyes - eyes.mean(0)).norm(dim=1).max()), 1e-6)

    def _allocate(self) -> GaussianScene:
        """Return one Gaussian for each of the points drawn."""
        s = self.settings
        datamodule: Any = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        points, colors = getattr(datamodule, "points", None), getattr(datamodule, "colors", None)
        if points is None or colors is None:
            raise ValueError(
                "GaussianSplat: no data module with points to begin with; use SceneDataModule, or pass ply"
            )
        if s.budget > len(points):
            raise ValueError(f"GaussianSplat(budget={s.budget}): exceeds the {len(points)} points of the cloud")
        count = max(1, round(s.initial * s.budget))
        p, found = torch.full((len(points),), 1 / len(points)), None
        if s.allocation == "geometry_texture":
            found = neighbourhoods(points, s.neighbours, colors)
            p = allocation_probabilities(
                points, colors, s.neighbours, s.shape_weight, s.texture_weight, s.normalise, s.base_ratio, found
            )
        chosen = draw(p, count, torch.Generator().manual_seed(s.allocation_seed))
        if found is not None and found.texture is not None:
            shape, texture = (
                float(v[chosen].mean() / v.mean().clamp_min(1e-12)) for v in (found.variation, found.texture)
            )
            rank_zero_info(
                f"GaussianSplat: {count:,} of {len(points):,} points; against a uniform draw they have {shape:.2f} "
                f"times the surface variation and {texture:.2f} times the texture"
            )
        normals = neighbourhoods(points, min(s.neighbours, 16)).normals[chosen] if s.flat else None
        return GaussianScene.from_points(
            points[chosen], colors[chosen], s.sh_degree, s.init_opacity, s.init_scale, normals
        )  # fmt: skip

    @property
    def _made(self) -> GaussianScene:
        if self.scene is None:
            raise RuntimeError("GaussianSplat: the scene is made in configure_model (a Trainer calls it)")
        return self.scene

    # What callbacks ask for (evolute.callbacks.protocols.GaussianModule)

    def gaussian_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters with a row a Gaussian, by name."""
        return {name: self._made.params[name] for name in NAMES}

    def scene_extent(self) -> float:
        """Return the length that thresholds on size refer to: the extent of the cameras."""
        return self._extent

    def export_ply(self, path: str) -> None:
        """Write the scene for viewers."""
        write_ply(self._made, path)

    def view(self, viewmat: Tensor, K: Tensor, width: int, height: int) -> Tensor:
        """Return the image [H, W, 3] in [0, 1] of any camera, without a graph."""
        with torch.no_grad():
            return self._render(Camera(viewmat, K, width, height)).image[..., :3].clamp(0, 1)

    # Training

    def _render(self, camera: Camera, extra: Tensor | None = None) -> Rendered:
        return render(self._made.gaussians(camera, self.sh_active, extra), camera, self.settings.backend)

    def _depth_channels(self, camera: Camera) -> Tensor:
        """Return what has to be blended for depth, a row a Gaussian."""
        local = camera.local(self._made.params["means"])
        if self.settings.depth == "expected":
            return local[:, 2:]
        normals = self._made.normals(camera)
        return torch.cat([normals, (normals * local).sum(-1, keepdim=True)], -1)

    def _depth(self, seen: Rendered, camera: Camera) -> Tensor:
        """Return depth [H, W] from the blended channels; what is not covered is not finite, or far off."""
        extra = seen.image[..., 3:]
        if self.settings.depth == "plane":
            return plane_depth(extra[..., :3], extra[..., 3], camera.rays())
        return extra[..., 0] / seen.alpha.clamp_min(1e-6)

    def _losses(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Rendered]:
        camera, truth = self._camera(batch), batch["image"][0].to(self._made.params["means"]) / 255
        s, measured = self.settings, batch["depth"][0]
        weight = s.depth_weight * self.depth_factor
        with_depth = weight > 0
        seen = self._render(camera, self._depth_channels(camera) if with_depth else None)
        parts = {"l1_ssim": photometric(seen.image[..., :3], truth, s.dssim)}
        loss = parts["l1_ssim"]
        if with_depth:
            trust = torch.ones_like(measured) if s.confidence == "none" else depth_confidence(truth, s.confidence)
            parts["depth_loss"] = depth_residual(self._depth(seen, camera), seen.alpha, measured, trust)
            loss = loss + weight * parts["depth_loss"]
        if s.opacity_reg:
            loss = loss + s.opacity_reg * self._made.params["opacities"].sigmoid().mean()
        if s.scale_reg:
            loss = loss + s.scale_reg * self._made.params["scales"].exp().mean()
        return {"loss": loss, **parts}, seen

    def _camera(self, batch: dict[str, Tensor]) -> Camera:
        if len(batch["image"]) != 1:
            raise MisconfigurationException(f"GaussianSplat: a batch is one view, got {len(batch['image'])}")
        height, width = batch["image"].shape[1:3]
        return Camera(batch["viewmat"][0], batch["K"][0], width, height).to(self._made.params["means"])

    def loss_on(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of a view, without logging or other effects."""
        return self._losses(batch)[0]["loss"]

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        losses, seen = self._losses(batch)
        if seen.info["means2d"].requires_grad:
            seen.info["means2d"].retain_grad()
        self.render_info = seen.info
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()}, prog_bar=True)
        self.log("train/gaussians", float(len(self._made)))
        self._finite = bool(losses["loss"].detach().isfinite())
        return losses["loss"]

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self._nonfinite_in_a_row = 0 if self._finite else self._nonfinite_in_a_row + 1
        self._nonfinite += not self._finite
        if self._finite:
            return
        self.log("train/nonfinite", float(self._nonfinite))
        if self.settings.on_nonfinite == "raise" or self._nonfinite_in_a_row >= self.settings.max_nonfinite:
            raise RuntimeError(
                f"the loss was not finite {self._nonfinite_in_a_row} step(s) in a row, last at step "
                f"{self.trainer.global_step}: lower the learning rates, or look at the images and depths"
            )
        for parameter in self.parameters():
            parameter.grad = None

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.render_info = {}  # callbacks had their turn; the graph behind it would be kept alive

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        rates = {**RATES, **(self.settings.rates or {})}
        rates["means"] *= self._extent
        groups = [{"params": [p], "lr": rates[name], "name": name} for name, p in self.gaussian_parameters().items()]
        optimizer = torch.optim.Adam(groups, eps=1e-15)
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total):
            raise MisconfigurationException(
                "GaussianSplat: the decay of the means needs a length: set trainer.max_steps"
            )
        decay = self.settings.means_decay
        factors = [(lambda step: decay ** (step / total)) if name == "means" else (lambda step: 1.0) for name in NAMES]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factors), "interval": "step"}}

    # Evaluation

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "val")

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "test")

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int, prefix: str) -> None:
        camera = self._camera(batch)
        seen = self._render(camera, self._depth_channels(camera))
        image, truth = picture(seen.image[..., :3]), batch["image"][0].to(seen.image) / 255
        scores = image_scores(image, truth) | self._lpips(image, truth)
        depth, exact = self._depth(seen, camera), batch["true_depth"][0]
        counts = (exact > 0) & (seen.alpha > LEAST_ALPHA) & depth.isfinite()
        if bool(counts.any()):
            error = (depth - exact)[counts]
            scores |= {"depth_mae": error.abs().mean(), "depth_rmse": error.square().mean().sqrt()}
        self.log_dict({f"{prefix}/{name}": value for name, value in scores.items()}, batch_size=1, prog_bar=True)
        if batch_idx < SHOWN and not self.trainer.sanity_checking:
            shown = torch.where(counts, depth - exact, torch.full_like(depth, torch.nan))
            arrays = {"image": image, "truth": truth, "error": (image - truth).abs().mean(-1), "depth_error": shown}
            step = self.trainer.global_step
            record_arrays(self.trainer, f"views/{int(batch['index'])}", arrays, step)

    # Checkpoints

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["nonfinite"] = {"total": self._nonfinite, "in_a_row": self._nonfinite_in_a_row}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        means = checkpoint["state_dict"].get("scene.params.means")
        if means is None:
            raise ValueError("the checkpoint is not one of GaussianSplat (it has no 'scene.params.means')")
        rest = checkpoint["state_dict"]["scene.params.shN"].shape[1]
        if self.scene is None:
            self.scene = GaussianScene(len(means), math.isqrt(rest + 1) - 1)
        self.scene.resize(len(means))
        counts = checkpoint.get("nonfinite", {})
        self._nonfinite, self._nonfinite_in_a_row = counts.get("total", 0), counts.get("in_a_row", 0)

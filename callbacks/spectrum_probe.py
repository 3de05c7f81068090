"""The whole spectrum of the Hessian, now and then: its bulk, its outliers, what is negative and what is near zero."""

import sys
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from evolute.callbacks.access import (
    Action,
    CutLoss,
    FlatOperator,
    OptimizerStep,
    Stage,
    attach,
    backend_for,
    detach,
    mean_over_ranks,
    named_parameters,
    over_ranks,
    refuse_manual_without_loss,
    refuse_reentrant_checkpointing,
    require,
    shape_of,
    stepping,
)
from evolute.callbacks.pace import Pace
from evolute.callbacks.probe_batch import BatchNorm, ProbeBatch, Repeatable
from evolute.callbacks.record import record, record_arrays
from evolute.geometry import GaussNewton, Hessian, HessianResidual, SpectralDensity, spectral_density
from evolute.geometry.curvature.engines import gradients

Values = dict[str, Tensor | float]


class SpectrumProbe(Callback):
    """Estimate the density of the Hessian's eigenvalues by stochastic Lanczos quadrature.

    A monitor: it changes nothing. On one probe batch, kept for the whole run, and from the same random vectors every
    time, so that what moves is the weights' doing. Scalars, at the weights after a step (names after Sagun et al.,
    arXiv 1706.04454):

    - ``spectrum/lambda_max`` and ``spectrum/lambda_min``: ends of the spectrum, as far as the quadrature sees them;
    - ``spectrum/outliers``: eigenvalues that stand out above the bulk, about the number of classes; ``spectrum/
      bulk_edge``: where the bulk ends. Left out where the spectrum has no bulk near zero;
    - ``spectrum/near_zero_mass`` and ``spectrum/neg_mass``: shares of eigenvalues within a thousandth of the largest of
      zero, and below that.

    With ``split``, the same of the Gauss-Newton part: ``spectrum/ggn_sharpness``, ``spectrum/ggn_outliers``, and of the
    rest R = H - G, ``spectrum/residual_ratio``, the Frobenius norm of R over that of H.

    Arrays go to ``arrays/spectrum/<step>.npz`` in the run folder: ``grid``, ``density`` and ``stderr`` [1024],
    ``nodes`` and ``weights`` [vectors, lanczos_steps] of the quadrature, ``outliers``, ``size`` (parameters); with
    ``split`` also under ``ggn_`` and ``residual_``. The report draws them.

    Price: 2 gradients of the probe batch for the graph and ``vectors * lanczos_steps`` products of about 2, vector work
    included; about three times that with ``split``. Memory: the graph and ``lanczos_steps`` vectors of the size of the
    parameters.

    Args:
        every_n_steps: optimizer steps between two measurements, the first is measured; None for none by steps.
        on_validation_end: measure whenever a validation of the fit ends.
        vectors: random vectors; the standard error in the arrays is over them, and needs two.
        lanczos_steps: products for each.
        split: measure the Gauss-Newton matrix and the rest too. The loss must go through torch's cross-entropy.
        classes: of the problem, K; then the bulk ends at the quantile 1 - 2K/P.
        samples: samples in the probe batch; None for a sixteenth of a batch.
        batch_norm: as in :class:`CurvatureMonitor`.
        budget: largest share of wall-clock to spend; None for no limit.

    Raises:
        MisconfigurationException: if a value is out of range, nothing says when to measure, the module optimises
            manually without ``loss_on``, its loss has no second derivative, or with ``split`` more parts than its
            cross-entropy.
    """

    def __init__(
        self,
        every_n_steps: int | None = 1000,
        on_validation_end: bool = False,
        vectors: int = 2,
        lanczos_steps: int = 40,
        split: bool = False,
        classes: int | None = None,
        samples: int | None = None,
        batch_norm: BatchNorm = "eval",
        budget: float | None = 0.02,
    ) -> None:
        if every_n_steps is None and not on_validation_end:
            raise MisconfigurationException(
                "SpectrumProbe(every_n_steps=None, on_validation_end=False) never measures: set one of them"
            )
        for name, value in (("vectors", vectors), ("lanczos_steps", lanczos_steps), ("classes", classes)):
            if value is not None and value < 1:
                raise MisconfigurationException(f"SpectrumProbe({name}={value}): must be at least 1")
        self.every_n_steps = every_n_steps
        self.validation = on_validation_end
        self.vectors, self.lanczos_steps = vectors, lanczos_steps
        self.split = split
        self.classes = classes
        self._pace = Pace("SpectrumProbe", sys.maxsize if every_n_steps is None else every_n_steps, budget)
        self._batch = ProbeBatch("SpectrumProbe", samples, True, batch_norm)
        self._action = Action(Stage.OBSERVE, self._after_update)
        self._measured = -1

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._backend = backend_for(trainer, "SpectrumProbe")
        require(self._backend, "SpectrumProbe", forward="use another strategy")
        refuse_manual_without_loss(pl_module, "SpectrumProbe")

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        size = sum(shape_of(p).numel() for p in named_parameters(pl_module).values())
        if not size:
            raise MisconfigurationException(f"SpectrumProbe: {type(pl_module).__name__} has no trainable parameter")
        if self.classes is not None and self.classes >= size / 2:
            raise MisconfigurationException(
                f"SpectrumProbe(classes={self.classes}): {type(pl_module).__name__} has {size} parameters, too few for "
                "twice as many outliers"
            )
        self._trainer = trainer
        attach(trainer, self._action)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pace.begin(trainer)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._batch.held:
            return
        self._batch.capture(trainer, batch, batch_idx)
        with self._batch.open(trainer, self._backend) as probe:  # before the first step: nothing trained in vain
            loss = Repeatable(probe.loss)
            value = self._batch.check(pl_module, loss)
            refuse_reentrant_checkpointing(value, pl_module, "SpectrumProbe")
            if self.split:
                self._refuse_other_parts(value, CutLoss(loss, "SpectrumProbe(split=True)"), list(probe.params.values()))

    def _refuse_other_parts(self, loss: Tensor, cut: CutLoss, wrt: list[Tensor]) -> None:
        """Refuse a loss whose gradient does not all come through its logits: H would not be G + R."""
        whole = gradients(loss, wrt)
        z = cut.logits()
        leaf = z.detach().requires_grad_()
        (slope,) = gradients(cut.loss(leaf), [leaf])
        through = gradients(torch.dot(slope, z), wrt)
        off = sum(float((a - b).double().square().sum()) for a, b in zip(whole, through, strict=True))
        if off > 1e-6 * sum(float(a.double().square().sum()) for a in whole):
            raise MisconfigurationException(
                f"SpectrumProbe(split=True): {type(self._trainer.lightning_module).__name__}'s loss has parts beside "
                "its cross-entropy, which belong to neither half: take split=False"
            )

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if stepping(trainer):
            self._pace.open(trainer)

    def _after_update(self, step: OptimizerStep) -> None:
        if self.every_n_steps is not None and self._pace.now:
            self._record(self._pace.step)
        self._pace.close(self._trainer)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if self.validation and fitting and self._pace.affordable(trainer):
            self._record(self._pace.step - 1)

    def _record(self, step: int) -> None:
        """Measure at the weights after ``step``, unless that is done already."""
        if not self._batch.held or step == self._measured or step < 0:
            return
        # Validation runs in inference mode, where nothing can be differentiated.
        with self._pace.timed(), torch.inference_mode(False), torch.enable_grad():
            values, arrays = self._measure()
        self._measured = step
        record(self._trainer, "spectrum", {**values, "time_ms": self._pace.time_ms()}, step)
        if arrays:
            record_arrays(self._trainer, "spectrum", arrays, step)

    def _measure(self) -> tuple[Values, dict[str, Tensor]]:
        with self._batch.open(self._trainer, self._backend) as probe:
            loss = Repeatable(probe.loss)
            try:
                with Hessian(loss, probe.params) as H:
                    whole = self._density(over_ranks(H, self._trainer), mean_over_ranks(H.loss, self._trainer))
                values, arrays = self._values(whole), self._arrays(whole)
                if self.split:
                    cut = CutLoss(loss, "SpectrumProbe(split=True)")
                    with GaussNewton(cut.logits, cut.loss, probe.params) as G:
                        curved = self._density(over_ranks(G, self._trainer), G.loss)
                    with HessianResidual(cut.logits, cut.loss, probe.params) as R:
                        rest = self._density(over_ranks(R, self._trainer), R.loss)
                    of_ggn = self._values(curved)
                    values["ggn_sharpness"] = of_ggn["lambda_max"]
                    if "outliers" in of_ggn:
                        values["ggn_outliers"] = of_ggn["outliers"]
                    values["residual_ratio"] = (rest.moment(2)[0] / whole.moment(2)[0]).sqrt()
                    for head, part in (("ggn_", curved), ("residual_", rest)):
                        arrays.update({head + name: value for name, value in self._arrays(part).items()})
            except FloatingPointError:
                return {"nonfinite": 1.0}, {}
        return values, arrays

    def _density(self, H: FlatOperator, loss: Tensor) -> SpectralDensity:
        """Return the density, always from the same vectors, on every rank.

        Raises:
            FloatingPointError: if the loss or a product is not finite.
        """
        if not bool(loss.isfinite()):
            raise FloatingPointError("the loss is not finite")
        return spectral_density(H, self.vectors, self.lanczos_steps, torch.Generator().manual_seed(0))

    def _values(self, density: SpectralDensity) -> Values:
        values: Values = {"lambda_max": density.largest, "lambda_min": density.smallest}
        values["near_zero_mass"], values["neg_mass"] = density.near_zero_mass()[0], density.negative_mass()[0]
        if (edge := self._bulk_edge(density)) is not None:
            values["bulk_edge"] = edge
            values["outliers"] = float(len(self._outliers(density)))
        return values

    def _arrays(self, density: SpectralDensity) -> dict[str, Tensor]:
        parts = {name: getattr(density, name) for name in ("grid", "density", "stderr", "nodes", "weights")}
        return {**parts, "outliers": self._outliers(density), "size": torch.tensor(density.size)}

    def _bulk_edge(self, density: SpectralDensity) -> Tensor | None:
        """Return where the bulk ends, None where there is none near zero."""
        try:
            return density.bulk_edge(self.classes)
        except ValueError:
            return None

    def _outliers(self, density: SpectralDensity) -> Tensor:
        if self._bulk_edge(density) is None:
            return torch.zeros(0, dtype=torch.float64)
        return density.outliers(None if self.classes is None else density.bulk_edge(self.classes))

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        detach(trainer, self._action)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"pace": self._pace.state_dict(), "batch": self._batch.state_dict(), "measured": self._measured}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pace.load_state_dict(state_dict["pace"])
        self._batch.load_state_dict(state_dict["batch"])
        self._measured = state_dict["measured"]

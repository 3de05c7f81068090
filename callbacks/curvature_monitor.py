"""Sharpness and its relatives while a run trains: how curved the loss is, and how close the steps are to the edge."""

import re
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from evolute.callbacks.access import (
    Action,
    FlatOperator,
    OptimizerStep,
    Probe,
    Stage,
    attach,
    backend_for,
    batch_tensors,
    detach,
    mean_over_ranks,
    named_parameters,
    over_ranks,
    probing,
    refuse_manual_without_loss,
    refuse_reentrant_checkpointing,
    stepping,
    take_samples,
    with_tensors,
)
from evolute.callbacks.edge import edge_of_stability
from evolute.callbacks.pace import Pace
from evolute.callbacks.record import record
from evolute.geometry import Eigenpairs, Hessian, top_eigenpairs, trace_samples


class CurvatureMonitor(Callback):
    """Record the curvature of the training loss at the weights after a step.

    A monitor: it changes nothing. On a probe batch, in eval mode, it builds one graph and takes all products with the
    Hessian H from it:

    - ``curvature/sharpness``: largest eigenvalue of H, by Lanczos to a true relative residual of ``tol``, warm-started
      from the last eigenvector; ``curvature/residual`` is the residual reached;
    - ``curvature/threshold`` and ``curvature/eos_ratio``: where the optimizer's edge of stability lies, and the
      sharpness in its own metric over it: of H itself for SGD, ``curvature/preconditioned_sharpness`` for Adam(W),
      ``curvature/generalized_sharpness`` for optimizers with a norm. Runs with a constant rate climb to 1 and hover
      there; far above 1 for long, the loss explodes. Small probe batches overestimate it;
    - ``curvature/directional``: ``u^T H u`` along the last update, and ``curvature/step_quadratic``: ``p^T H p / (2
      |g^T p|)``, above 1 where the quadratic model says that the step went too far (any optimizer);
    - ``curvature/trace`` and ``curvature/trace_stderr`` by Hutchinson, if ``trace_samples`` is not 0;
    - ``curvature/layer_sharpness/<name>``: largest eigenvalue of each block of H that ``layers`` matches.

    Price, in gradients of the probe batch: about 2 for the graph, then 1 to 2 a product; 4 to 8 products for the
    sharpness, up to ``max_products`` on a fresh network, 2 for the edge, 1 for the direction, 1 a trace sample.

    Args:
        every_n_steps: optimizer steps between two measurements; the first is measured.
        samples: samples in the probe batch; None for a sixteenth of a batch. More cost more and overestimate the
            sharpness less.
        fixed_batch: keep the first probe batch for the whole run, so that the curve shows the weights' doing and not
            the batch's, and warm starts work best; False takes each measured step's own batch.
        tol: relative residual of the eigenvectors. The eigenvalue's own error is of second order in it: with the
            default the sharpness is right to about a thousandth.
        max_products: bound on the products of one Lanczos run; one that ends there is recorded with its residual.
        trace_samples: random vectors for the trace; 0 leaves it out.
        layers: regular expression of parameters whose block is measured too, or None.
        budget: largest share of wall-clock to spend; None for no limit.

    Raises:
        MisconfigurationException: if a value is out of range, ``layers`` matches nothing, the module optimises manually
            without ``loss_on``, or the strategy does not allow second derivatives.
    """

    def __init__(
        self,
        every_n_steps: int = 150,
        samples: int | None = None,
        fixed_batch: bool = True,
        tol: float = 3e-2,
        max_products: int = 12,
        trace_samples: int = 1,
        layers: str | None = None,
        budget: float | None = 0.02,
    ) -> None:
        if samples is not None and samples < 1:
            raise MisconfigurationException(f"CurvatureMonitor(samples={samples}): must be at least 1, or None")
        if not tol > 0:
            raise MisconfigurationException(f"CurvatureMonitor(tol={tol}): must be above 0")
        if max_products < 2:
            raise MisconfigurationException(f"CurvatureMonitor(max_products={max_products}): must be at least 2")
        if trace_samples < 0:
            raise MisconfigurationException(f"CurvatureMonitor(trace_samples={trace_samples}): must be at least 0")
        self.samples = samples
        self.fixed_batch = fixed_batch
        self.tol = tol
        self.max_products = max_products
        self.trace_samples = trace_samples
        self.layers = layers
        self._pace = Pace("CurvatureMonitor", every_n_steps, budget)
        self._action = Action(Stage.OBSERVE, self._after_update, self._before_update)
        self._batch: tuple[Any, int] | None = None
        self._saved: tuple[list[list[Tensor]], int] | None = None
        self._checked = False
        self._moved: dict[str, Tensor] = {}
        self._rates: dict[str, float] = {}
        self._warm: dict[str, Tensor] = {}
        self._engine = ""

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._backend = backend_for(trainer, "CurvatureMonitor")
        refuse_manual_without_loss(pl_module, "CurvatureMonitor")

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        named = named_parameters(pl_module)
        if not named:
            raise MisconfigurationException(f"CurvatureMonitor: {type(pl_module).__name__} has no trainable parameter")
        if self.layers is not None and not any(re.fullmatch(self.layers, name) for name in named):
            raise MisconfigurationException(
                f"CurvatureMonitor(layers={self.layers!r}) matches no trainable parameter of {type(pl_module).__name__}"
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
        if self._pace.now and (self._batch is None or not self.fixed_batch):
            self._batch = (self._captured(batch), batch_idx if self._saved is None else self._saved[1])
            self._saved = None
            if not self._checked:  # before the first step, so that nothing has been trained in vain
                with probing(trainer, pl_module, self._backend, *self._batch) as probe:
                    refuse_reentrant_checkpointing(probe.loss(), pl_module, "CurvatureMonitor")
            self._checked = True

    def _captured(self, batch: Any) -> Any:
        """Return the probe batch: samples of this one, or those of a checkpoint in its structure."""
        if self._saved is None:
            return take_samples(batch, self.samples)
        batches, rank = self._saved[0], self._trainer.global_rank
        return with_tensors(batch, batches[rank if rank < len(batches) else 0])

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if stepping(trainer):
            self._pace.open(trainer)

    def _before_update(self, step: OptimizerStep) -> bool:
        return self._pace.now

    def _after_update(self, step: OptimizerStep) -> None:
        if self._pace.now and self._batch is not None:
            with self._pace.timed():
                self._moved = self._backend.whole(step.params, step.moved())
                self._rates = step.learning_rates()
                values = self._measure(step)
            record(self._trainer, "curvature", {**values, "time_ms": self._pace.time_ms()}, self._pace.step)
            self._moved = {}
        self._pace.close(self._trainer)

    def _measure(self, step: OptimizerStep) -> dict[str, Tensor | float]:
        assert self._batch is not None
        module = self._trainer.lightning_module
        with (
            probing(self._trainer, module, self._backend, *self._batch) as probe,
            Hessian(probe.loss, probe.params) as H,
        ):
            # Over all ranks: one that turned back alone would leave the others waiting at their next product.
            loss = mean_over_ranks(H.loss, self._trainer)
            if not bool(loss.isfinite()):
                return {"nonfinite": 1.0}
            try:
                values = self._quantities(H, probe, step)
            except FloatingPointError:
                return {"nonfinite": 1.0}
            self._say_engine(H.engine)
        return {"loss": loss, **values}

    def _quantities(self, H: Hessian, probe: Probe, step: OptimizerStep) -> dict[str, Tensor | float]:
        """Take every product, and only then renew the warm starts: a product that is not finite leaves them alone."""
        reduced = over_ranks(H, self._trainer)
        warm: dict[str, Tensor] = {}
        sharpest = self._top(reduced, "sharpness", warm)
        values: dict[str, Tensor | float] = {
            "sharpness": sharpest.values[0],
            "residual": sharpest.residuals[0],
        }
        p = H.flatten([self._moved.get(name) for name in probe.params])
        curved = torch.dot(p, reduced @ p)
        values["directional"] = curved / torch.dot(p, p)
        values["step_quadratic"] = curved.abs() / (2.0 * torch.dot(reduced.gradient, p).abs())
        if self.trace_samples:
            generator = torch.Generator().manual_seed(self._pace.step)
            trace = trace_samples(reduced, self.trace_samples, generator)
            values["trace"] = trace.trace
            if self.trace_samples > 1:
                values["trace_stderr"] = trace.stderr
        if len(self._trainer.optimizers) == 1:
            edge = edge_of_stability(
                reduced, probe.params, step, self._rates, self._backend,
                sharpest.values[0], self._warm.get("edge"), products=2 if "edge" in self._warm else 6,
            )  # fmt: skip
            if edge is not None:
                values[edge.name], values["threshold"] = edge.sharpness, edge.threshold
                values["eos_ratio"] = edge.sharpness / edge.threshold
                warm["edge"] = edge.direction
        for name in probe.params if self.layers is not None else ():
            if self.layers is not None and re.fullmatch(self.layers, name):
                block = over_ranks(H.block([name]), self._trainer)
                values[f"layer_sharpness/{name}"] = self._top(block, f"layer/{name}", warm).values[0]
        self._warm.update(warm)
        return values

    def _top(self, H: FlatOperator, key: str, warm: dict[str, Tensor]) -> Eigenpairs:
        """Return the largest eigenpair, started from the last one kept under ``key``, at first from the gradient.

        A start that is exact but no longer the sharpest direction would be taken for it, so some of the gradient, which
        leans towards the top eigenvectors, and some noise, which misses none, are mixed in: they cost no product.
        """
        gradient = H.gradient
        noise = torch.randn(H.shape[0], generator=torch.Generator().manual_seed(self._pace.step)).to(gradient)
        leaning = gradient / gradient.norm().clamp(min=torch.finfo(gradient.dtype).tiny)
        kept = self._warm.get(key)
        start = (leaning if kept is None else kept.to(gradient) + 0.1 * leaning) + 0.1 * noise / noise.norm()
        found = top_eigenpairs(H, tol=self.tol, which="largest", max_products=self.max_products, start=start)
        warm[key] = found.vectors[:, 0]
        return found

    def _say_engine(self, engine: str) -> None:
        if engine != self._engine:
            rank_zero_info(f"CurvatureMonitor: Hessian products by {engine.replace('_', ' ')}")
        self._engine = engine

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        detach(trainer, self._action)

    @override
    def state_dict(self) -> dict[str, Any]:
        # The probe batch and the eigenvectors are state: without them a resumed run would measure something else.
        # Its tensors alone: a checkpoint that loads with weights_only holds no containers of others.
        batch = self._saved
        if self._batch is not None and self.fixed_batch:
            batch = (self._batches_of_all_ranks(), self._batch[1])
        return {"pace": self._pace.state_dict(), "warm": dict(self._warm), "batch": batch}

    def _batches_of_all_ranks(self) -> list[list[Tensor]]:
        """Return the tensors of every rank's own probe batch: a checkpoint is written by one of them."""
        assert self._batch is not None
        mine = batch_tensors(self._batch[0])
        if self._trainer.world_size == 1:
            return [mine]
        batches: list[Any] = [None] * self._trainer.world_size
        torch.distributed.all_gather_object(batches, [t.cpu() for t in mine])
        return batches

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pace.load_state_dict(state_dict["pace"])
        self._warm = dict(state_dict["warm"])
        self._batch, self._saved = None, state_dict["batch"]

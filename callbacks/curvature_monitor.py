"""Sharpness and its relatives while a run trains: how curved the loss is, and how close the steps are to the edge."""

import math
import re
from functools import partial
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
    detach,
    listen,
    mean_over_ranks,
    named_parameters,
    over_ranks,
    refuse_manual_without_loss,
    refuse_reentrant_checkpointing,
    require,
    shape_of,
    stepping,
)
from evolute.callbacks.curvature_presets import FORWARD_ONLY, PRESETS, QUANTITIES, PresetName, Quantity
from evolute.callbacks.edge import edge_of_stability
from evolute.callbacks.pace import Pace
from evolute.callbacks.probe_batch import BatchNorm, ProbeBatch, Repeatable
from evolute.callbacks.record import record
from evolute.callbacks.step_line import StepLine
from evolute.geometry import (
    Eigenpairs,
    Hessian,
    critical_step,
    hutchinson_diagonal,
    model_agreement,
    parameter_blocks,
    smoothness_ratio,
    top_eigenpairs,
    trace_samples,
)
from evolute.geometry.curvature.lanczos import Which

Values = dict[str, Tensor | float]
FORWARDS = 8
"""Losses evaluated in one search for the critical step."""


class CurvatureMonitor(Callback):
    """Record the curvature of the training loss at the weights after a step.

    A monitor: it changes nothing. On a probe batch, in eval mode, it builds one graph and takes all products with the
    Hessian H from it. A ``preset`` chooses the quantities; ``quantities`` names them one by one. In brackets the price,
    in gradients of the probe batch: g, a product being 1 to 2 of them, a forward pass a third of one. What needs a
    product needs the graph too, 2 g once a measurement.

    - ``sharpness``: ``curvature/sharpness``, largest eigenvalue of H, by Lanczos to a true relative residual of
      ``tol``, warm-started; ``curvature/residual``, the residual reached; with more ``eigenpairs`` the others as
      ``curvature/lambda/<k>``; ``curvature/grad_overlap``, share of the squared gradient in their span [4 to 8
      products, up to ``max_products`` on a fresh network];
    - ``edge``: where the optimizer's edge of stability lies, ``curvature/threshold``, and the sharpness in its own
      metric over it, ``curvature/eos_ratio``: of H itself for SGD, ``curvature/preconditioned_sharpness`` for Adam(W),
      ``curvature/generalized_sharpness`` for steps of fixed size in a norm. Runs with a constant rate climb to 1 and
      hover there; far above 1 for long, the loss explodes. Small probe batches overestimate it. Muon's momentum has no
      settled threshold: its ratio is ``curvature/generalized_ratio`` instead, and claims nothing [2 products];
    - ``directional``: ``curvature/directional``, ``u^T H u`` along the last update, and ``curvature/step_quadratic``,
      ``p^T H p / (2 |g^T p|)``, above 1 where the quadratic model says that the step went too far [1 product];
    - ``trace``: ``curvature/trace``, ``curvature/trace_stderr`` and ``curvature/frobenius`` by Hutchinson
      [``trace_samples`` products];
    - ``lambda_min``: ``curvature/lambda_min``, the smallest eigenvalue [4 to ``max_products`` products];
    - ``grad_rayleigh``: ``curvature/grad_rayleigh``, ``g^T H g / ||g||^2`` [1 product];
    - ``blocks``: ``curvature/block_sharpness/<name>`` and ``curvature/block_trace/<name>`` of each diagonal block of H
      that ``blocks`` makes [3 to ``max_products`` products of the block's own size each, and ``trace_samples`` whole
      ones for all traces];
    - ``model_agreement``: ``curvature/model_agreement``, change of the loss over the step by what the quadratic model
      says; 1 where it holds [2 forward passes and 1 product, shared with ``directional``];
    - ``smoothness``: ``curvature/gns_ratio``, step over the gradient-normalised smoothness radius along it, and that
      radius, ``curvature/gns_radius``; above 1 Newton's model fails on this step [1 g and 1 product, shared with
      ``directional``];
    - ``critical``: ``curvature/critical_sharpness``, ``2 / eta_c`` where ``eta_c`` is the learning rate at which the
      update just taken would have begun to raise the loss (arXiv 2601.16979), ``curvature/critical_ratio``, the rate
      over ``eta_c``, above 1 where the step did raise it, and ``curvature/critical_error``, the relative error. Left
      out where the loss rises however short the step, or does not within reach [5 to 9 forward passes, no graph].

    Presets: ``cheap`` is ``critical``, forward passes only: for models too large for a kept graph, without a second
    derivative, or behind fused attention (about 3 g); ``standard`` is ``sharpness, edge, directional, trace`` (15 to 25
    g); ``full`` is everything, with 5 eigenpairs, 8 trace samples and tighter bounds (hundreds of g: ``budget``
    stretches its interval). Arguments given win over the preset.

    Args:
        every_n_steps: optimizer steps between two measurements; the first is measured.
        preset: defaults for ``quantities``, ``eigenpairs``, ``max_products``, ``trace_samples`` and ``blocks``.
        quantities: what to measure; None for the preset's.
        samples: samples in the probe batch; None for a sixteenth of a batch. More cost more and overestimate the
            sharpness less.
        fixed_batch: keep the first probe batch for the whole run, so that the curve shows the weights' doing and not
            the batch's, and warm starts work best; False takes each measured step's own batch.
        batch_norm: ``"eval"`` measures with running statistics, ``"train"`` with those of the probe batch, which is the
            loss that is trained as far as the probe batch resembles the batch.
        tol: relative residual of the eigenvectors. The eigenvalue's own error is of second order in it: with the
            default the sharpness is right to about a thousandth.
        eigenpairs: how many of the largest eigenvalues.
        max_products: bound on the products of one Lanczos run; one that ends there is recorded with its residual.
        trace_samples: random vectors for the trace; 0 leaves it out.
        blocks: adds ``"blocks"`` to the quantities. ``"layer"``: one block a module with parameters of its own; the
            name of a module class, like ``"TransformerEncoderLayer"``: one a module of that class; else a regular
            expression over whole parameter names, whose groups name the blocks, as in ``r"layers\\.(\\d+)\\..*"``.
        budget: largest share of wall-clock to spend; None for no limit.

    Raises:
        MisconfigurationException: if a value is out of range, ``blocks`` matches nothing, there are fewer parameters
            than ``eigenpairs``, the module optimises manually without ``loss_on``, or what is asked for needs second
            derivatives and the strategy or the module cannot give them; ``preset="cheap"`` needs none.
    """

    def __init__(
        self,
        every_n_steps: int = 150,
        preset: PresetName = "standard",
        quantities: list[Quantity] | None = None,
        samples: int | None = None,
        fixed_batch: bool = True,
        batch_norm: BatchNorm = "eval",
        tol: float = 3e-2,
        eigenpairs: int | None = None,
        max_products: int | None = None,
        trace_samples: int | None = None,
        blocks: str | None = None,
        budget: float | None = 0.02,
    ) -> None:
        if preset not in PRESETS:
            raise MisconfigurationException(f"CurvatureMonitor(preset={preset!r}): one of {', '.join(PRESETS)}")
        chosen = PRESETS[preset]
        self.quantities = set(chosen.quantities if quantities is None else quantities)
        if not self.quantities <= set(QUANTITIES) or not self.quantities:
            known = ", ".join(QUANTITIES)
            raise MisconfigurationException(f"CurvatureMonitor(quantities={quantities!r}): at least one of {known}")
        self.eigenpairs = chosen.eigenpairs if eigenpairs is None else eigenpairs
        self.max_products = chosen.max_products if max_products is None else max_products
        self.trace_samples = chosen.trace_samples if trace_samples is None else trace_samples
        self.blocks = chosen.blocks if blocks is None else blocks
        if not tol > 0:
            raise MisconfigurationException(f"CurvatureMonitor(tol={tol}): must be above 0")
        if self.eigenpairs < 1:
            raise MisconfigurationException(f"CurvatureMonitor(eigenpairs={eigenpairs}): must be at least 1")
        if self.max_products < max(2, self.eigenpairs):
            least = max(2, self.eigenpairs)
            raise MisconfigurationException(f"CurvatureMonitor(max_products={max_products}): must be at least {least}")
        if self.trace_samples < 0:
            raise MisconfigurationException(f"CurvatureMonitor(trace_samples={trace_samples}): must be at least 0")
        if trace_samples is not None:
            (self.quantities.add if trace_samples else self.quantities.discard)("trace")
        if blocks is not None:
            self.quantities.add("blocks")
        self.tol = tol
        self._edge_products = chosen.edge_products
        self._exact = not self.quantities <= FORWARD_ONLY  # whether any quantity needs products
        self._pace = Pace("CurvatureMonitor", every_n_steps, budget)
        self._batch = ProbeBatch("CurvatureMonitor", samples, fixed_batch, batch_norm)
        self._action = Action(Stage.OBSERVE, self._after_update, self._before_update)
        self._checked = False
        self._blocks: dict[str, list[str]] = {}
        self._warm: dict[str, Tensor] = {}
        self._multiple = 1.0  # of the update, where the search for the critical step begins
        self._engine = ""

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._backend = backend_for(trainer, "CurvatureMonitor")
        require(self._backend, "CurvatureMonitor", forward="use another strategy", updates="use another strategy")
        refuse_manual_without_loss(pl_module, "CurvatureMonitor")

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        named = named_parameters(pl_module)
        if not named:
            raise MisconfigurationException(f"CurvatureMonitor: {type(pl_module).__name__} has no trainable parameter")
        size = sum(shape_of(p).numel() for p in named.values())
        if self._exact and self.eigenpairs > size:
            raise MisconfigurationException(
                f"CurvatureMonitor(eigenpairs={self.eigenpairs}): {type(pl_module).__name__} has {size} parameters, so "
                "its Hessian has no more eigenvalues than that"
            )
        self._names = list(named)
        if "blocks" in self.quantities:
            self._blocks = _blocks_of(pl_module, self.blocks)
        self._trainer = trainer
        attach(trainer, self._action)
        listen(trainer, self._warm.clear)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pace.begin(trainer)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._pace.now:
            return
        self._batch.capture(trainer, batch, batch_idx)
        if not self._checked:  # before the first step, so that nothing has been trained in vain
            with self._batch.open(trainer, self._backend) as probe:
                loss = self._batch.check(pl_module, Repeatable(probe.loss))
                if self._exact:
                    refuse_reentrant_checkpointing(
                        loss, pl_module, "CurvatureMonitor", 'or take preset="cheap", which needs forward passes only'
                    )
        self._checked = True

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if stepping(trainer):
            self._pace.open(trainer)

    def _before_update(self, step: OptimizerStep) -> bool:
        return self._pace.now

    def _after_update(self, step: OptimizerStep) -> None:
        if self._pace.now and self._batch.held:
            with self._pace.timed():
                values = self._measure(step)
            record(self._trainer, "curvature", {**values, "time_ms": self._pace.time_ms()}, self._pace.step)
        self._pace.close(self._trainer)

    def _measure(self, step: OptimizerStep) -> Values:
        with self._batch.open(self._trainer, self._backend) as probe:
            loss = Repeatable(probe.loss)
            moved = self._backend.whole(step.params, step.moved())
            before = partial(self._backend.whole, step.params, step.before)
            line = StepLine(loss, probe.params, before, moved, self._trainer)
            values: Values = {}
            try:
                if self._exact:
                    values = self._from_products(loss, probe, step, line)
                else:
                    values["loss"] = line.loss(1.0)
                if self.quantities & {"critical", "model_agreement"}:
                    values["loss_change"] = line.loss(1.0) - line.loss(0.0)
            except FloatingPointError:
                return {"nonfinite": 1.0}
            if not math.isfinite(float(values["loss"])):
                return {"nonfinite": 1.0}
            if "critical" in self.quantities:
                values.update(self._critical(line, step.learning_rates()))
        return values

    def _critical(self, line: StepLine, rates: dict[str, float]) -> Values:
        found = critical_step(line.loss, self._multiple, FORWARDS)
        if math.isinf(found.high) and found.low:
            self._multiple = found.low  # go on from there the next time
        if not found.found:
            return {}
        self._multiple = found.step
        values: Values = {"critical_ratio": 1.0 / found.step, "critical_error": found.error}
        if (rate := max(rates.values(), default=0.0)) > 0:
            values["critical_sharpness"] = 2.0 / (rate * found.step)
        return values

    def _from_products(self, loss: Repeatable, probe: Probe, step: OptimizerStep, line: StepLine) -> Values:
        """Build the graph, take every product, and only then renew the warm starts.

        Raises:
            FloatingPointError: if the loss or a product is not finite; the warm starts are then left alone.
        """
        with Hessian(loss, probe.params) as H:
            # Over all ranks: one that turned back alone would leave the others waiting at their next product.
            value = mean_over_ranks(H.loss, self._trainer)
            if not bool(value.isfinite()):
                raise FloatingPointError("the loss is not finite")
            warm: dict[str, Tensor] = {}
            reduced = over_ranks(H, self._trainer)
            values: Values = {"loss": value, **self._spectrum(reduced, warm, probe, step)}
            values.update(self._along_step(reduced, line))
            values.update(self._averages(reduced))
            for name, members in self._blocks.items():
                block = over_ranks(H.block(members), self._trainer)
                values[f"block_sharpness/{name}"] = self._search(block, f"block/{name}", warm).values[0]
            self._warm.update(warm)
            self._say_engine(H.engine)
        return values

    def _spectrum(self, H: FlatOperator, warm: dict[str, Tensor], probe: Probe, step: OptimizerStep) -> Values:
        """Return the ends of the spectrum, and the edge of stability."""
        values: Values = {}
        if self.quantities & {"sharpness", "edge"}:
            top = self._search(H, "sharpness", warm, self.eigenpairs)
            values = {"sharpness": top.values[0], "residual": top.residuals.max()}
            values.update(
                {f"lambda/{k}": top.values[k - 1] for k in range(1, self.eigenpairs + 1) if self.eigenpairs > 1}
            )
            gradient = H.gradient.to(top.vectors)
            values["grad_overlap"] = (top.vectors.T @ gradient).square().sum() / gradient.square().sum()
        if "lambda_min" in self.quantities:
            values["lambda_min"] = self._search(H, "lambda_min", warm, which="smallest").values[0]
        if "edge" not in self.quantities or len(self._trainer.optimizers) > 1:
            return values
        warmed, cold = self._edge_products
        edge = edge_of_stability(
            H, probe.params, step, step.learning_rates(), self._backend,
            torch.as_tensor(values["sharpness"]), self._warm.get("edge"), warmed if "edge" in self._warm else cold,
        )  # fmt: skip
        if edge is not None:
            values[edge.name], warm["edge"] = edge.sharpness, edge.direction
            ratio = edge.sharpness / edge.threshold
            if edge.settled:
                values["threshold"], values["eos_ratio"] = edge.threshold, ratio
            else:
                values["generalized_ratio"] = ratio
        return values

    def _along_step(self, H: FlatOperator, line: StepLine) -> Values:
        """Return what one product with the update tells, and one with the gradient."""
        values: Values = {}
        gradient = H.gradient
        if "grad_rayleigh" in self.quantities:
            values["grad_rayleigh"] = torch.dot(gradient, H @ gradient) / torch.dot(gradient, gradient)
        if not self.quantities & {"directional", "model_agreement", "smoothness"}:
            return values
        p = H.flatten(line.update())
        product = H @ p
        slope, curved = torch.dot(gradient, p), torch.dot(p, product)
        if "directional" in self.quantities:
            values["directional"] = curved / torch.dot(p, p)
            values["step_quadratic"] = curved.abs() / (2.0 * slope.abs())
        if "model_agreement" in self.quantities:
            change = torch.tensor(line.loss(1.0) - line.loss(0.0), dtype=torch.float64)
            values["model_agreement"] = model_agreement(change, slope.cpu(), curved.cpu())
        if "smoothness" in self.quantities:
            origin = mean_over_ranks(H.flatten(line.gradients(0.0)), self._trainer)
            values["gns_ratio"] = smoothness_ratio(gradient, origin, product)
            values["gns_radius"] = torch.linalg.vector_norm(p) / values["gns_ratio"]
        return values

    def _averages(self, H: FlatOperator) -> Values:
        """Return the traces: of all of H, and of its blocks."""
        values: Values = {}
        if "trace" in self.quantities and self.trace_samples:
            trace = trace_samples(H, self.trace_samples, self._generator())
            values = {"trace": trace.trace, "frobenius": trace.frobenius}
            if self.trace_samples > 1:
                values["trace_stderr"] = trace.stderr
        if self._blocks and self.trace_samples:
            diagonal = hutchinson_diagonal(H, self.trace_samples, self._generator()).values
            sums = dict(zip(self._names, (part.sum() for part in H.unflatten(diagonal)), strict=True))
            for name, members in self._blocks.items():
                values[f"block_trace/{name}"] = torch.stack([sums[m] for m in members]).sum()
        return values

    def _search(
        self, H: FlatOperator, key: str, warm: dict[str, Tensor], k: int = 1, which: Which = "largest"
    ) -> Eigenpairs:
        """Return extreme eigenpairs, started from those kept under ``key``, at first from the gradient.

        A start that is exact but no longer the most extreme direction would be taken for it, so some of the gradient,
        which leans towards the top eigenvectors, and some noise, which misses none, are mixed in: they cost no product.
        """
        gradient = H.gradient
        source = self._generator()
        noise = torch.randn(H.shape[0], generator=source).to(gradient)
        leaning = gradient / gradient.norm().clamp(min=torch.finfo(gradient.dtype).tiny)
        kept = self._warm.get(key)
        mixed = 0.1 * noise / noise.norm()
        start = leaning + mixed if kept is None else kept.to(gradient) + (0.1 * leaning + mixed).unsqueeze(-1)
        # The search goes on with the same generator: one of its own could draw this noise again.
        found = top_eigenpairs(H, k, self.tol, which, self.max_products, start, source)
        warm[key] = found.vectors
        return found

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self._pace.step)

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
        return {
            "pace": self._pace.state_dict(),
            "warm": dict(self._warm),
            "multiple": self._multiple,
            "batch": self._batch.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pace.load_state_dict(state_dict["pace"])
        self._warm.clear()
        self._warm.update(state_dict["warm"])
        self._multiple = state_dict["multiple"]
        self._batch.load_state_dict(state_dict["batch"])


def _blocks_of(module: L.LightningModule, by: str) -> dict[str, list[str]]:
    """Return the names of the parameters of each block, as :func:`named_parameters` has them."""
    kinds = {type(m).__name__: type(m) for m in module.modules() if m is not module}
    try:
        blocks = parameter_blocks(module, None if by == "layer" else kinds.get(by, by))
    except (ValueError, re.error) as error:
        raise MisconfigurationException(f"CurvatureMonitor(blocks={by!r}): {error}") from error
    return {
        name.replace("_orig_mod.", ""): [member.replace("_orig_mod.", "") for member in members]
        for name, members in blocks.items()
    }

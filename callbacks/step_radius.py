"""How far each step goes, against how far the loss can be trusted along it; and a limit on that, if asked for."""

import math
import sys
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from evolute.callbacks.access import (
    Action,
    Head,
    OptimizerStep,
    Stage,
    attach,
    backend_for,
    detach,
    gather_values,
    probing,
    refuse_manual_without_loss,
    require,
    stepping,
    take_samples,
)
from evolute.callbacks.pace import Pace
from evolute.callbacks.record import record
from evolute.geometry import (
    binary_spread,
    directional_logits,
    ghost_ratio,
    logit_spread,
    recomputed_spread,
    secant_spread,
)


class StepRadius(Callback):
    """Compare each step with the distance at which the loss stops being analytic along it ("ghosts of softmax").

    For a loss that is linear in the logits plus a log-sum-exp (cross-entropy, binary cross-entropy), the Taylor series
    along an update p converges at least out to ``rho = pi / max spread``, where the spread is that of the logits'
    change per unit of p over the classes, at its largest over the loss terms (arXiv 2603.13552). The ratio ``r = ||p||
    / rho``, free of units, is then the largest change of a logit difference in this step, over pi. ``r < 1`` is
    sufficient for the step to be reliable, never necessary; healthy runs sit well below 1, and single steps above
    about 10 do damage.

    Records ``step/norm``, ``step/ghost_ratio``, ``step/ghost_radius`` (at the largest spread) and both at the 99th
    percentile of the loss terms. Two forward passes of ``samples`` samples a measurement.

    With two classes (or a sigmoid) the radius is exact, ``sqrt(delta^2 + pi^2)`` over the slope of the logit gap delta;
    else it is a lower bound. Logits of ``head_from`` classes or more are not kept from before the step: what entered
    the last linear layer is, and they are made again a few classes at a time.

    ``mode="monitor"`` changes nothing. The other two are interventions, after every step: ``"clip"`` shortens the
    update to ``target`` where it exceeds it, ``theta <- theta_old + s (theta_new - theta_old)``; ``"set"`` makes every
    update as long as ``target`` says, so that the radius takes the place of the learning rate and the optimizer gives
    the direction alone (a gradient that vanishes then gives long steps: end such a run by its loss, or lower
    ``target``). The ratio is evaluated again after it (at most two rounds, for logits are curved). Moments are not
    rolled back; weight decay is scaled alike. They hold one copy of the parameters during each step.

    Args:
        every_n_steps: optimizer steps between two measurements; the first is measured. Interventions take every step.
        mode: ``"monitor"``, ``"clip"`` or ``"set"``.
        target: largest ratio that clipping lets through, or the ratio of every step; the paper's best is 1, 0.5 is its
            safe choice.
        estimator: ``"secant"`` takes the logits before and after the step; ``"jvp"`` their derivative along it (the
            theory's own quantity, for small steps the same; needs forward-mode derivatives of the module).
        samples: samples of the batch to measure on; None for a sixteenth of it when monitoring, for all when
            intervening (a term that is not looked at cannot hold a step back).
        budget: largest share of wall-clock to spend when monitoring; None for no limit.
        dry_run: when intervening, record the scale that would be applied and apply none.
        head_from: number of classes from which on logits are made again instead of kept.

    Raises:
        MisconfigurationException: if a value is out of range, the module optimises manually without ``loss_on``, no
            cross-entropy is found in its loss, or the strategy hides updates.
    """

    def __init__(
        self,
        every_n_steps: int = 25,
        mode: Literal["monitor", "clip", "set"] = "monitor",
        target: float = 1.0,
        estimator: Literal["secant", "jvp"] = "secant",
        samples: int | None = None,
        budget: float | None = 0.01,
        dry_run: bool = False,
        head_from: int = 8192,
    ) -> None:
        if mode not in ("monitor", "clip", "set"):
            raise MisconfigurationException(f"StepRadius(mode={mode!r}): 'monitor', 'clip' or 'set'")
        if head_from < 2:
            raise MisconfigurationException(f"StepRadius(head_from={head_from}): must be at least 2")
        if estimator not in ("secant", "jvp"):
            raise MisconfigurationException(f"StepRadius(estimator={estimator!r}): 'secant' or 'jvp'")
        if not target > 0:
            raise MisconfigurationException(f"StepRadius(target={target}): must be above 0")
        if samples is not None and samples < 1:
            raise MisconfigurationException(f"StepRadius(samples={samples}): must be at least 1, or None")
        acts = mode != "monitor"
        if acts and estimator == "jvp":
            raise MisconfigurationException(
                f'StepRadius(mode="{mode}") evaluates the scaled step, so it needs estimator="secant"'
            )
        self.mode = mode
        self.target = target
        self.estimator = estimator
        self.samples = sys.maxsize if samples is None and acts else samples
        self.dry_run = dry_run
        self.head_from = head_from
        # An intervention's cadence depends on the step alone: it looks at every step, without a budget.
        self._pace = Pace("StepRadius", 1 if acts else every_n_steps, None if acts else budget)
        stage = Stage.LIMIT if acts else Stage.OBSERVE
        self._action = Action(stage, self._after_update, self._before_update)
        self._batch: tuple[Any, int] | None = None
        self._logits: Tensor | None = None
        self._head: Head | None = None
        self._checked = False

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._backend = backend_for(trainer, "StepRadius")
        require(self._backend, "StepRadius", updates="use another strategy", forward="use another strategy")
        refuse_manual_without_loss(pl_module, "StepRadius")
        if self.mode != "monitor" and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f'StepRadius(mode="{self.mode}") scales the steps of automatic optimisation, and '
                f"{type(pl_module).__name__} optimises manually"
            )

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trainer, self._module = trainer, pl_module
        attach(trainer, self._action)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pace.begin(trainer)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Of an accumulated step the last micro-batch counts. Copied now: the step may change its batch in place.
        if self._pace.now:
            self._batch = (take_samples(batch, self.samples), batch_idx)
            if not self._checked:  # before the first step, so that nothing has been trained in vain
                self._refuse_unknown_logits()
            self._checked = True

    def _refuse_unknown_logits(self) -> None:
        """Evaluate the logits once, and their derivative if that is what will be taken."""
        self._many_classes = self._evaluate().shape[-1] >= self.head_from
        if self.estimator != "jvp":
            return
        assert self._batch is not None
        with probing(self._trainer, self._module, self._backend, *self._batch) as probe:
            point = {name: p.detach() for name, p in probe.params.items()}
            try:
                directional_logits(probe.logits, point, {name: torch.zeros_like(p) for name, p in point.items()})
            except RuntimeError as error:  # a NotImplementedError is one
                raise MisconfigurationException(
                    f'StepRadius(estimator="jvp"): {type(self._module).__name__} has no forward-mode derivative '
                    f'({str(error).splitlines()[0]}): use estimator="secant"'
                ) from error

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if stepping(trainer):
            self._pace.open(trainer)

    def _before_update(self, step: OptimizerStep) -> bool:
        if not self._pace.now or self._batch is None:
            return False
        if self.estimator == "secant":
            with self._pace.timed():
                self._look_before()
        return True

    def _look_before(self) -> None:
        """Keep the logits before the step, or what they are made of."""
        self._head = self._find_head() if self._many_classes else None
        self._logits = self._evaluate() if self._head is None else None

    @torch.no_grad()
    def _find_head(self) -> Head | None:
        assert self._batch is not None
        with probing(self._trainer, self._module, self._backend, *self._batch) as probe, torch.no_grad():
            return probe.head(self.head_from)

    @torch.no_grad()
    def _evaluate(self) -> Tensor:
        """Return the logits [n, K] of the measured batch at the weights as they are."""
        assert self._batch is not None
        with probing(self._trainer, self._module, self._backend, *self._batch) as probe, torch.no_grad():
            return probe.logits()

    def _after_update(self, step: OptimizerStep) -> None:
        if self._pace.now and step.before:
            self._measure(step)
        self._pace.close(self._trainer)

    def _measure(self, step: OptimizerStep) -> None:
        with self._pace.timed():
            norm = torch.linalg.vector_norm(self._backend.norms(step.moved()))
            spread = self._spread(step, norm)
            values = self._ratios(spread, norm)
            if self.mode != "monitor":
                values["clip_scale" if self.mode == "clip" else "set_scale"] = self._limit(step, values["ghost_ratio"])
        self._logits = self._head = self._batch = None
        record(self._trainer, "step", {**values, "time_ms": self._pace.time_ms()}, self._pace.step)

    def _spread(self, step: OptimizerStep, norm: Tensor) -> Tensor:
        """Return the spread [n] of each loss term's logit change over this whole step."""
        if self.estimator == "secant":
            return self._secant(step)
        assert self._batch is not None
        with probing(self._trainer, self._module, self._backend, *self._batch) as probe:
            origin = self._backend.whole(step.params, step.before)
            moved = self._backend.whole(step.params, step.moved())
            point = {n: origin[n].to(p.dtype) if n in origin else p.detach() for n, p in probe.params.items()}
            direction = {n: moved[n].to(p) if n in moved else torch.zeros_like(p) for n, p in point.items()}
            return logit_spread(directional_logits(probe.logits, point, direction))

    def _secant(self, step: OptimizerStep) -> Tensor:
        """Return the spread [n] between the logits before the step and at the weights as they are."""
        after = self._evaluate()
        if self._head is not None:
            weight, bias = self._head_before(step, self._head)
            return recomputed_spread(self._head.hidden, weight, after, bias)
        assert self._logits is not None
        return (binary_spread if after.shape[-1] == 2 else secant_spread)(self._logits, after)

    def _head_before(self, step: OptimizerStep, head: Head) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of the head as they were before the step."""
        moved = [name for name in (head.weight_name, head.bias_name) if name in step.before]
        before = self._backend.whole(step.params, {name: step.before[name] for name in moved})
        weight = before.get(head.weight_name or "", head.weight)
        return weight, before.get(head.bias_name or "", head.bias) if head.bias is not None else None

    def _ratios(self, spread: Tensor, norm: Tensor) -> dict[str, Tensor | float]:
        spread = gather_values(spread, self._trainer)
        worst = ghost_ratio(spread)  # 0 if no term counts: a batch may be all padding
        # The 99th percentile by count; torch.quantile refuses long inputs.
        usual = spread.kthvalue(math.ceil(0.99 * len(spread))).values / torch.pi if len(spread) else worst.clone()
        return {
            "norm": norm,
            "ghost_ratio": worst,
            "ghost_radius": norm / worst,
            "ghost_ratio_p99": usual,
            "ghost_radius_p99": norm / usual,
        }

    def _limit(self, step: OptimizerStep, ratio: Tensor | float) -> float:
        """Scale the update: to a ratio of at most ``target`` when clipping, of about ``target`` when setting it.

        Returns:
            The factor; 1 where nothing had to be done, or nothing is known because the ratio is 0 or not finite.
        """
        scale, reached = 1.0, float(ratio)
        # Logits are curved: if the first cut leaves a little too much, the second one cuts with a margin.
        for aim in (1.0, 0.95 if self.mode == "clip" else 1.0):
            if not 0.0 < reached < math.inf or (self.mode == "clip" and reached <= self.target):
                break
            scale *= aim * self.target / reached
            if self.dry_run:
                break
            step.rescale(scale)
            reached = float(self._ratios(self._secant(step), torch.zeros(()))["ghost_ratio"])
        return scale

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        detach(trainer, self._action)
        self._batch = self._logits = self._head = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"pace": self._pace.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pace.load_state_dict(state_dict["pace"])

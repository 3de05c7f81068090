"""Slow down the layers whose gradient is mostly noise, step by step, over any optimizer."""

import re
from collections.abc import Mapping
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from evolute.callbacks.access import (
    Action,
    GradientPairs,
    OptimizerStep,
    PlainBackend,
    Stage,
    attach,
    backend_for,
    detach,
    joined,
    listen,
    named_parameters,
    recover,
    require,
    shape_of,
    shared_out,
    stepping,
)
from evolute.callbacks.pace import Pace
from evolute.callbacks.record import record
from evolute.geometry import Norm, batched_dual_norms, noise_ema, noise_ratios
from evolute.optim import parameter_norms

AT_ONCE = 2**26
"""Entries of layers whose dual norms are found at once: batches of them take a few times 256 MB in float32."""


class NoiseAdaptiveLR(Callback):
    """Scale each layer's learning rate by how noisy its gradient is (LANTON, arXiv 2510.14009).

    Every layer (one parameter tensor) keeps a running mean H of the squared distance between two gradient estimates,
    measured in the dual of the norm that bounds its update: nuclear for hidden matrices, l1 for embeddings and heads,
    l2 for vectors. Within each of these groups the least noisy layer takes the optimizer's full step and the others
    ``(a_l / a_max)^power`` of it, ``a_l = alpha / sqrt(alpha^2 + H_l)``. Schedulers, checkpoints and
    ``LearningRateMonitor`` see the unscaled rate. The mean rate falls, so the base rate usually wants to rise: compare
    runs each at its own best rate.

    An intervention: with ``power=0`` it reproduces the base run bit for bit, with ``dry_run=True`` it measures and
    records only. Memory: one copy of the gradient between two steps of which the second is measured. Several ranks
    share the work on the layers.

    Example::

        Trainer(callbacks=[NoiseAdaptiveLR(every_n_steps=5)])

    Args:
        alpha: noise level above which a layer is slowed, in the unit of ``sqrt(H)``. ``"auto"``, ours, takes the median
            of each group, so that the scale of the loss does not matter; a number is the paper's form.
        power: exponent of the ratio; 0.5 in the paper as reported, 0 for no effect.
        decay: of the running mean H, per optimizer step.
        every_n_steps: optimizer steps between two measurements; the decay is adjusted and ratios hold in between.
        estimator: ``"consecutive"`` compares the gradients of two steps in a row (the paper's practical option);
            ``"split"`` the two halves of an accumulated step, free of drift (ours).
        layers: regular expression; trainable parameters whose whole name matches are adapted.
        norms: norm of parameters by name pattern, ``{"head.*": "sign"}``, over the automatic choice.
        dual: ``"scaled"`` measures in the dual of the RMS->RMS norm, so that layers of different shape compare;
            ``"plain"`` in the nuclear, l1 and l2 norms themselves.
        rows: ``"all"``, or ``"seen"``: noise of the rows alone that both gradients have something for, where gradients
            are sparse by rows, as those of Gaussians and item vectors; not under a strategy that shards.
        dry_run: measure and record, change nothing.

    Raises:
        MisconfigurationException: if a value is out of range, no parameter matches, the module optimises manually, or
            the strategy or the accumulation does not allow what was asked for.
    """

    def __init__(
        self,
        alpha: float | Literal["auto"] = "auto",
        power: float = 0.5,
        decay: float = 0.9,
        every_n_steps: int = 1,
        estimator: Literal["consecutive", "split"] = "consecutive",
        layers: str = ".*",
        norms: dict[str, Literal["spectral", "sign", "rms"]] | None = None,
        dual: Literal["scaled", "plain"] = "scaled",
        rows: Literal["all", "seen"] = "all",
        dry_run: bool = False,
    ) -> None:
        if isinstance(alpha, str) and alpha != "auto":
            raise MisconfigurationException(f"NoiseAdaptiveLR(alpha={alpha!r}): a number above 0, or 'auto'")
        if not isinstance(alpha, str) and not alpha > 0:
            raise MisconfigurationException(f"NoiseAdaptiveLR(alpha={alpha}): must be above 0, or 'auto'")
        if not power >= 0:
            raise MisconfigurationException(f"NoiseAdaptiveLR(power={power}): must be at least 0")
        if not 0.0 <= decay < 1.0:
            raise MisconfigurationException(f"NoiseAdaptiveLR(decay={decay}): must be in [0, 1)")
        if estimator not in ("consecutive", "split"):
            raise MisconfigurationException(f"NoiseAdaptiveLR(estimator={estimator!r}): 'consecutive' or 'split'")
        if dual not in ("scaled", "plain"):
            raise MisconfigurationException(f"NoiseAdaptiveLR(dual={dual!r}): 'scaled' or 'plain'")
        if rows not in ("all", "seen"):
            raise MisconfigurationException(f"NoiseAdaptiveLR(rows={rows!r}): 'all' or 'seen'")
        self.alpha: float | Literal["auto"] = alpha
        self.rows = rows
        self.power = power
        self.decay = decay
        self.every_n_steps = every_n_steps
        self.layers = layers
        self.norms = norms
        self.dual = dual
        self.dry_run = dry_run
        self._pace = Pace("NoiseAdaptiveLR", every_n_steps)
        self._pairs = GradientPairs(estimator, self.should_measure)
        self._actions = (Action(Stage.SCALE, self._scale), Action(Stage.OBSERVE, self._record))
        self._params: dict[str, Tensor] = {}
        self._norm_of: dict[str, Norm] = {}
        self._steps_seen = 0
        self._noise: dict[str, float] = {}
        self._ratios: dict[str, float] = {}
        self._measured = False

    def should_measure(self, step: int) -> bool:
        """Say whether the noise is measured at optimizer step ``step`` (from 0). Override for another schedule."""
        return step > 0 and step % self.every_n_steps == 0

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"NoiseAdaptiveLR scales the steps of automatic optimisation, and {type(pl_module).__name__} "
                "optimises manually"
            )
        self._backend = backend_for(trainer, "NoiseAdaptiveLR")
        require(self._backend, "NoiseAdaptiveLR", gradients="use another strategy", scaling="use another strategy")
        self._pairs.refuse(trainer, self._backend, "NoiseAdaptiveLR")
        if self.rows == "seen" and not isinstance(self._backend, PlainBackend):
            raise MisconfigurationException(
                f"NoiseAdaptiveLR(rows='seen') needs whole rows, and {type(trainer.strategy).__name__} gives each "
                "process pieces: use rows='all'"
            )

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        wanted = re.compile(self.layers)
        groups = [group for optimizer in trainer.optimizers for group in self._backend.groups(optimizer)]
        held = {id(p) for _, params in groups for p in params}
        named = named_parameters(pl_module)
        self._params = {n: p for n, p in named.items() if wanted.fullmatch(n) and id(p) in held}
        if not self._params:
            raise MisconfigurationException(
                f"NoiseAdaptiveLR(layers={self.layers!r}) matches none of the {len(named)} parameters that "
                f"{type(pl_module).__name__} trains: there is nothing to adapt"
            )
        try:
            norms: dict[str, Norm] = parameter_norms(pl_module, self.norms)
        except ValueError as error:
            raise MisconfigurationException(f"NoiseAdaptiveLR(norms=...): {error}") from error
        norm_of = {name.replace("_orig_mod.", ""): norm for name, norm in norms.items()}
        for group, params in groups:  # an optimizer that has a norm for a group knows best
            ids = {id(p) for p in params} if self.norms is None and "norm" in group else set()
            norm_of.update({n: cast(Norm, group["norm"]) for n, p in self._params.items() if id(p) in ids})
        self._norm_of = {name: cast(Norm, norm_of[name]) for name in self._params}
        # Only layers with a sample: one that never gets a gradient is not the least noisy.
        self._noise = {name: value for name, value in self._noise.items() if name in self._params}
        self._trainer = trainer
        self._pairs.open(self._backend, self._params)
        listen(trainer, self._pairs.forget)
        for action in self._actions:
            attach(trainer, action)

    @override
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with self._pace.timed():
            self._pairs.after_backward(trainer, self._steps_seen)

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if not stepping(trainer):
            return
        self._measured = False
        with self._pace.timed():
            gradients = self._backend.gradients(self._params, optimizer)
            pair = self._pairs.pair(trainer, gradients, self._steps_seen)
            if pair is not None and self.rows == "seen":
                pair.seen_only()
            if pair is None or not pair.first or self._update(trainer, pair.difference()):
                self._pairs.keep(gradients, self._steps_seen)
        self._steps_seen += 1

    def _update(self, trainer: L.Trainer, differences: Mapping[str, Tensor]) -> bool:
        """Fold one noise sample into H and renew the ratios; say whether it was finite: else nothing changes."""
        names = list(differences)
        sample = self._dual_norms(differences).square().cpu()
        if not bool(sample.isfinite().all()):
            record(trainer, "noise", {"nonfinite": 1.0}, step=self._steps_seen)
            return False
        before = torch.tensor([self._noise.get(n, 0.0) for n in names], dtype=torch.float64)
        self._noise.update(zip(names, noise_ema(before, sample, self.decay, self.every_n_steps).tolist(), strict=True))
        for norm in dict.fromkeys(self._norm_of[n] for n in names):
            group = [n for n in self._noise if self._norm_of[n] == norm]
            noise = torch.tensor([self._noise[n] for n in group], dtype=torch.float64)
            self._ratios.update(zip(group, noise_ratios(noise, self.alpha, self.power).tolist(), strict=True))
        self._measured = True
        return True

    def _dual_norms(self, differences: Mapping[str, Tensor]) -> Tensor:
        """Return the dual norms [layers], in float64 and the same bits on every rank: each rank finds its share."""
        names, trainer = list(differences), self._trainer
        owner = shared_out({n: self._price(n) for n in names}, trainer.world_size)
        mine = self._backend.shared(self._params, differences, owner)
        values = torch.zeros(len(names), dtype=torch.float64, device=differences[names[0]].device)
        for some in _chunks(mine):
            norms: list[Norm] = [self._norm_of[n] for n in some]
            found = batched_dual_norms(list(some.values()), norms, scaled=self.dual == "scaled")
            values[[names.index(n) for n in some]] = found.to(values)
        return joined(values, trainer)

    def _price(self, name: str) -> float:
        """Return what a dual norm costs, in proportion: products for a nuclear one, else a look at each entry."""
        shape = shape_of(self._params[name])
        return float(shape.numel() * (min(shape[0], shape[1:].numel()) if self._norm_of[name] == "spectral" else 1))

    def _scale(self, step: OptimizerStep) -> Mapping[str, float] | None:
        if self.dry_run:
            return None
        return {name: self._ratios.get(name, 1.0) for name in step.params if name in self._params}

    def _record(self, step: OptimizerStep) -> None:
        """Record what was measured in this step, and the learning rates it used."""
        if not self._measured:
            return
        self._measured = False
        rates = {name: rate for name, rate in step.learning_rates().items() if name in self._params}
        noise = {name: value**0.5 for name, value in self._noise.items()}
        at = self._steps_seen - 1
        record(self._trainer, "noise", {"time_ms": self._pace.time_ms(), **noise}, at)
        record(self._trainer, "lr_ratio", self._ratios, at)
        record(self._trainer, "layer_lr", rates, at)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        recover(trainer)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for action in self._actions:
            detach(trainer, action)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "steps_seen": self._steps_seen,
            "noise": dict(self._noise),
            "ratios": dict(self._ratios),
            "pairs": self._pairs.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps_seen = state_dict["steps_seen"]
        self._noise = dict(state_dict["noise"])
        self._ratios = dict(state_dict["ratios"])
        self._pairs.load_state_dict(state_dict["pairs"])


def _chunks(layers: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Split layers into lots of bounded size."""
    lots: list[dict[str, Tensor]] = []
    size = 0
    for name, layer in layers.items():
        if not lots or size + layer.numel() > AT_ONCE:
            lots.append({})
            size = 0
        lots[-1][name] = layer
        size += layer.numel()
    return lots

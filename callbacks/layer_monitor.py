"""Per layer: gradient norm, weight norm, update ratio, signal to noise; for the run: the gradient noise scale."""

import re
from collections.abc import Mapping
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from evolute.callbacks.access import (
    Action,
    GradientPair,
    GradientPairs,
    LocalSquares,
    OptimizerStep,
    Stage,
    attach,
    backend_for,
    batch_size,
    detach,
    listen,
    mean_over_ranks,
    named_parameters,
    require,
    stepping,
    underway,
)
from evolute.callbacks.pace import Pace
from evolute.callbacks.record import record
from evolute.geometry import gradient_noise_scale, pair_signal


class LayerMonitor(Callback):
    """Record how large each layer's gradient, weights and update are, and how much of the gradient is signal.

    A monitor: it changes nothing. What it records, every ``every_n_steps`` optimizer steps, for each watched layer (one
    parameter tensor):

    - ``layer/grad_norm/<name>``: l2 norm of the reduced, unscaled gradient, before clipping;
    - ``layer/weight_norm/<name>``: l2 norm of the weights before the step;
    - ``layer/update_ratio/<name>``: size of the step over that of the weights; healthy Adam runs sit near 1e-3;
    - ``layer/snr/<name>``: squared signal over squared noise of the step's gradient; below 1 the step is mostly noise;

    and for all of them together ``layer/grad_norm``, ``layer/noise_scale`` (the simple gradient noise scale of
    McCandlish et al., arXiv 1812.06162, appendix A, in samples: well below it a batch of twice the size saves almost
    half of the steps, well above it almost none, so it estimates the critical batch size). Signal and noise come from
    two gradient estimates that the run computes anyway; both are averaged over ``memory`` measurements, for one pair
    says little. A ratio without noise, and a noise scale whose mean signal is not above zero, are left out.

    Args:
        every_n_steps: optimizer steps between two measurements; the first step is measured.
        layers: regular expression; trainable parameters whose whole name matches are watched.
        noise: where signal and noise come from. ``"split"``: the halves of an accumulated step (exact, needs
            ``accumulate_grad_batches >= 2``); ``"ranks"``: each rank's own gradient against their mean (exact, needs
            DDP over 2 processes or more, holds no gradient); ``"consecutive"``: two steps in a row, where the drift of
            the gradient counts as noise; ``"auto"``: the first of these that can be had. With halves or steps one copy
            of the gradient is held from half-way, or from the step before, to the measurement.
        memory: measurements that the running means of signal and noise reach back.
        budget: largest share of wall-clock to spend; None for no limit.

    Raises:
        MisconfigurationException: if a value is out of range, no trainable parameter matches, or the strategy hides
            gradients.
    """

    def __init__(
        self,
        every_n_steps: int = 25,
        layers: str = ".*",
        noise: Literal["auto", "split", "ranks", "consecutive"] = "auto",
        memory: int = 10,
        budget: float | None = 0.01,
    ) -> None:
        if noise not in ("auto", "split", "ranks", "consecutive"):
            raise MisconfigurationException(f"LayerMonitor(noise={noise!r}): 'auto', 'split', 'ranks' or 'consecutive'")
        if memory < 1:
            raise MisconfigurationException(f"LayerMonitor(memory={memory}): must be at least 1")
        self.layers = layers
        self.noise = noise
        self.memory = memory
        self._pace = Pace("LayerMonitor", every_n_steps, budget)
        self._pairs = GradientPairs("split" if noise == "split" else "consecutive", self._pace.wanted)
        self._local = LocalSquares()
        self._by_ranks = False
        self._action = Action(Stage.OBSERVE, self._after_update, self._before_update)
        self._params: dict[str, Tensor] = {}
        self._samples = 0
        self._signal: dict[str, float] = {}
        self._variance: dict[str, float] = {}
        self._values: dict[str, Tensor | float] = {}

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._backend = backend_for(trainer, "LayerMonitor")
        if self.noise == "ranks" and trainer.world_size < 2:
            raise MisconfigurationException(
                'LayerMonitor(noise="ranks") compares the gradients of several processes, and there is one: use '
                'noise="auto"'
            )
        can = self._backend.capabilities
        if self.noise == "ranks":
            require(self._backend, 'LayerMonitor(noise="ranks")', local_gradients='use noise="auto"')
        accumulates = pl_module.automatic_optimization and trainer.accumulate_grad_batches >= 2
        if self.noise == "auto" and accumulates and can.halves:
            self._pairs.source = "split"
        by_default = self.noise == "auto" and self._pairs.source != "split" and can.local_gradients
        self._by_ranks = self.noise == "ranks" or (by_default and trainer.world_size > 1)
        if not self._by_ranks:
            self._pairs.refuse(trainer, self._backend, "LayerMonitor")

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        wanted = re.compile(self.layers)
        self._params = {n: p for n, p in named_parameters(pl_module).items() if wanted.fullmatch(n)}
        if not self._params:
            raise MisconfigurationException(
                f"LayerMonitor(layers={self.layers!r}) matches no trainable parameter of {type(pl_module).__name__}"
            )
        self._trainer = trainer
        self._pairs.open(self._backend, self._params)
        listen(trainer, self._pairs.forget)
        attach(trainer, self._action)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pace.begin(trainer)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._pace.now:
            self._samples = (batch_size(batch) or 1) * trainer.accumulate_grad_batches * trainer.world_size
            if self._by_ranks:
                self._local.open(self._params)

    @override
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._by_ranks or underway(trainer):
            return
        with self._pace.timed():
            self._pairs.after_backward(trainer, self._pace.step)

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if not stepping(trainer):
            return
        self._pace.open(trainer)
        if not self._pace.now and not self._pace.soon:
            return
        with self._pace.timed():
            owned = {id(p) for _, members in self._backend.groups(optimizer) for p in members}
            params = {n: p for n, p in self._params.items() if id(p) in owned}
            gradients = self._backend.gradients(params, optimizer)
            pair = None if self._by_ranks else self._pairs.pair(trainer, gradients, self._pace.step)
            if self._pace.now:
                self._measure_gradients(gradients, pair)
            if not self._by_ranks and "nonfinite" not in self._values:
                self._pairs.keep(gradients, self._pace.step)

    def _measure_gradients(self, gradients: Mapping[str, Tensor], pair: GradientPair | None) -> None:
        norms = self._backend.norms(gradients)
        self._values = {f"grad_norm/{n}": norm for n, norm in zip(gradients, norms, strict=True)}
        if gradients:
            self._values["grad_norm"] = torch.linalg.vector_norm(norms)
        if pair is not None and pair.first:
            self._fold_pair(pair)
        if self._by_ranks and gradients:
            self._fold_ranks(list(gradients), norms)

    def _fold_pair(self, pair: GradientPair) -> None:
        parts = torch.stack(pair_signal(list(pair.first.values()), list(pair.second.values())))
        signal, distance = self._backend.sums(parts)
        self._fold(list(pair.first), signal, pair.noise_share * distance)

    def _fold_ranks(self, names: list[str], norms: Tensor) -> None:
        """Fold what the ranks' own gradients say; ``norms`` are those of their mean."""
        local = self._local.close()
        squares = torch.stack([local.get(n, torch.zeros_like(norms[0])) for n in names])
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            squares = squares / scaler.get_scale() ** 2
        small = mean_over_ranks(squares, self._trainer)
        found = gradient_noise_scale(small, norms.square(), self._samples / self._trainer.world_size, self._samples)
        self._fold(names, found.grad_sq, found.trace / self._samples)

    def _fold(self, names: list[str], signal: Tensor, noise: Tensor) -> None:
        """Fold squared signal and squared noise of the step's gradient, a value a layer, into the running means.

        Values that are not finite change nothing.
        """
        both = torch.stack([signal, noise]).double().cpu()
        if not bool(both.isfinite().all()):
            self._values["nonfinite"] = 1.0
            return
        keep = 1.0 - 1.0 / self.memory
        for name, s, v in zip(names, *both.tolist(), strict=True):
            self._signal[name] = keep * self._signal.get(name, 0.0) + (1.0 - keep) * s
            self._variance[name] = keep * self._variance.get(name, 0.0) + (1.0 - keep) * v
            if self._variance[name] > 0:
                self._values[f"snr/{name}"] = max(self._signal[name], 0.0) / self._variance[name]
        total, spread = sum(self._signal.values()), sum(self._variance.values())
        if total > 0:  # otherwise the noise drowns the signal: the scale is larger than these samples can tell
            self._values["noise_scale"] = self._samples * spread / total

    def _before_update(self, step: OptimizerStep) -> bool:
        return self._pace.now

    def _after_update(self, step: OptimizerStep) -> None:
        if self._pace.now:
            self._measure_update(step)
        self._pace.close(self._trainer)

    def _measure_update(self, step: OptimizerStep) -> None:
        with self._pace.timed():
            names = [n for n in step.params if n in self._params]
            moved = step.moved()
            sizes = self._backend.norms({n: step.before[n] for n in names})
            moved = self._backend.norms({n: moved[n] for n in names})
            ratios = torch.where(moved == 0, moved, moved / sizes)
            self._values.update({f"weight_norm/{n}": size for n, size in zip(names, sizes, strict=True)})
            self._values.update({f"update_ratio/{n}": ratio for n, ratio in zip(names, ratios, strict=True)})
        values, self._values = self._values, {}
        record(self._trainer, "layer", {**values, "time_ms": self._pace.time_ms()}, self._pace.step)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        detach(trainer, self._action)
        self._local.close()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "signal": dict(self._signal),
            "variance": dict(self._variance),
            "samples": self._samples,
            "pace": self._pace.state_dict(),
            "pairs": self._pairs.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._signal = dict(state_dict["signal"])
        self._variance = dict(state_dict["variance"])
        self._samples = state_dict["samples"]
        self._pace.load_state_dict(state_dict["pace"])
        self._pairs.load_state_dict(state_dict["pairs"])

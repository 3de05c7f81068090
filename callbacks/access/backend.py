"""What can be reached under each strategy: one protocol, one backend a strategy, capability flags."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from evolute.callbacks.access.split import SplitGroups

Parts = dict[str, Tensor]
"""What this rank holds of some tensors, by parameter name: all of each in one process and under DDP, a flat piece of
each (empty, if another rank has it) where the strategy shards."""


@dataclass(frozen=True)
class Capabilities:
    """What a backend can give. Every refusal of a callback follows from one of these flags."""

    gradients: bool = True
    """Reduced, unscaled gradients before the step."""
    halves: bool = True
    """The gradient that has accumulated half-way through a step."""
    local_gradients: bool = True
    """This rank's own gradient of a micro-batch, before any reduction."""
    updates: bool = True
    """Weights before and after the step, so that an update can be read and changed."""
    scaling: bool = True
    """A learning rate of its own for each parameter, for one step."""
    optimizer_state: bool = True
    """Moments and the like, by parameter."""
    forward: bool = True
    """Forward passes of the live module outside the training step."""
    double_backward: bool = True
    """Second derivatives through the live module; without it, probes differentiate a copy of the weights."""


class Restorable(Protocol):
    """A change for the time of one step."""

    def restore(self) -> None:
        """Undo it."""
        ...


class Backend(Protocol):
    """Gradients, weights, updates and optimizer state by parameter name, under one family of strategies.

    All methods are collective where the strategy shards: call them on every rank, in the same order.
    """

    capabilities: Capabilities

    def groups(self, optimizer: Optimizer) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """Return the parameter groups of an optimizer, each with the module's own parameters in it."""
        ...

    def stepping(self) -> bool:
        """Say, in ``on_before_optimizer_step``, whether the optimizer steps now or goes on accumulating."""
        ...

    def watch(
        self, optimizer: Optimizer, enter: Callable[[], None], leave: Callable[[bool], None]
    ) -> Restorable | None:
        """Call ``enter`` before and ``leave`` after every update; None if torch's own step hooks do that.

        ``leave`` is told whether the update took place (a loss scaler may skip it).
        """
        ...

    def gradients(self, params: Mapping[str, Tensor], optimizer: Optimizer) -> Parts:
        """Return the gradients that exist, reduced and unscaled, in ``on_before_optimizer_step``."""
        ...

    def accumulated(self, params: Mapping[str, Tensor]) -> Parts:
        """Return copies of what has accumulated so far, in ``on_after_backward``: the mean over ranks, unscaled."""
        ...

    def weights(self, params: Mapping[str, Tensor]) -> Parts:
        """Return what the optimizer updates, not copied: the parameters, or this rank's pieces of float32 masters."""
        ...

    def publish(self, optimizer: Optimizer) -> None:
        """Make the live module follow :meth:`weights` after they were written to."""
        ...

    def scale(self, optimizer: Optimizer, params: Mapping[str, Tensor], ratios: Mapping[str, float]) -> Restorable:
        """Multiply the learning rates of the next update by ``ratios``, until ``restore``."""
        ...

    def norms(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the l2 norms of the whole tensors, stacked [len(parts)], in float32 or wider."""
        ...

    def sums(self, value: Tensor) -> Tensor:
        """Return sums over whole tensors from sums over what this rank holds."""
        ...

    def whole(self, params: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors, in the shapes of the parameters, from what the ranks hold of them."""
        ...

    def shared(
        self, params: Mapping[str, Tensor], parts: Mapping[str, Tensor], owner: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """Return whole tensors, of those alone that ``owner`` gives to this rank; no rank holds them all."""
        ...

    def part(self, params: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> Parts:
        """Return what this rank holds of whole tensors: the inverse of :meth:`whole`."""
        ...

    def unsharded(self, module: nn.Module) -> AbstractContextManager[dict[str, Tensor] | None]:
        """Open the module for a probe: whole weights to evaluate it at, by their full names, or None for its own.

        Where weights are given the strategy's hooks on the module are off, and the weights are tensors apart from its
        parameters.
        """
        ...

    def optimizer_state(self, optimizer: Optimizer, param: Tensor) -> Mapping[str, Any]:
        """Return the optimizer's state of one parameter, whole; empty before its first step."""
        ...


class PlainBackend:
    """One process, or DDP: every rank holds whole parameters, gradients and optimizer state."""

    capabilities = Capabilities()

    def __init__(self, trainer: L.Trainer) -> None:
        self._strategy = trainer.strategy
        self._ranks, self._rank = trainer.world_size, trainer.global_rank
        self._scaler: torch.amp.GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)

    def groups(self, optimizer: Optimizer) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """Return the groups as they are."""
        return [(group, group["params"]) for group in optimizer.param_groups]

    def stepping(self) -> bool:
        """Return True: Lightning accumulates without asking the optimizer to step."""
        return True

    def watch(self, optimizer: Optimizer, enter: Callable[[], None], leave: Callable[[bool], None]) -> None:
        """Do nothing: torch calls hooks around the step."""

    def gradients(self, params: Mapping[str, Tensor], optimizer: Optimizer) -> Parts:
        """Return ``p.grad`` by name, detached, not copied if it is not scaled: valid until the optimizer steps."""
        # Fused optimizers divide by the loss scale themselves, inside the step; for the others Lightning has done it.
        return self._gradients(params, scaled=getattr(optimizer, "_step_supports_amp_scaling", False))

    def accumulated(self, params: Mapping[str, Tensor]) -> Parts:
        """Return the mean over ranks: DDP reduces only at the last micro-batch, until then each rank has its own."""
        so_far = self._gradients(params, scaled=True)
        copies = {name: g.clone() for name, g in so_far.items()}
        return copies if self._ranks == 1 else {n: self._mean(g) for n, g in copies.items()}

    def _gradients(self, params: Mapping[str, Tensor], scaled: bool) -> Parts:
        found = {name: p.grad.detach() for name, p in params.items() if p.grad is not None}
        if self._scaler is not None and scaled and found:
            divided = torch._foreach_div(list(found.values()), self._scaler.get_scale())
            found = dict(zip(found, divided, strict=True))
        return found

    def _mean(self, value: Tensor) -> Tensor:
        reduced = self._strategy.reduce(value, reduce_op="mean")
        assert isinstance(reduced, Tensor)
        return reduced

    def weights(self, params: Mapping[str, Tensor]) -> Parts:
        """Return the parameters, detached."""
        return {name: p.detach() for name, p in params.items()}

    def publish(self, optimizer: Optimizer) -> None:
        """Do nothing: the weights are the module's own."""

    def scale(self, optimizer: Optimizer, params: Mapping[str, Tensor], ratios: Mapping[str, float]) -> Restorable:
        """Split the parameter groups."""
        return SplitGroups(optimizer, params, ratios)

    def norms(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the norms: one kernel launch for many small layers."""
        return norms_of(list(parts.values()))

    def sums(self, value: Tensor) -> Tensor:
        """Return the value: it is over whole tensors."""
        return value

    def whole(self, params: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parts: they are whole."""
        return dict(parts)

    def shared(
        self, params: Mapping[str, Tensor], parts: Mapping[str, Tensor], owner: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """Return this rank's among them: they are whole."""
        return {name: part for name, part in parts.items() if owner[name] == self._rank}

    def part(self, params: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> Parts:
        """Return the tensors, on their parameters' devices (a checkpoint brings them back on the CPU)."""
        return {name: t.to(params[name].device) for name, t in whole.items() if name in params}

    def unsharded(self, module: nn.Module) -> AbstractContextManager[dict[str, Tensor] | None]:
        """Give None: the module's own weights can be differentiated."""
        return nullcontext()

    def optimizer_state(self, optimizer: Optimizer, param: Tensor) -> Mapping[str, Any]:
        """Return the entry of ``optimizer.state``."""
        return optimizer.state.get(param, {})


def norms_of(tensors: list[Tensor]) -> Tensor:
    """Return the l2 norms, stacked, accumulated in float32 or wider."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32) if tensors else torch.float32
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=wide)) if tensors else torch.zeros(0)


def base_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the torch optimizer that a sharding wrapper steps, or the optimizer itself."""
    return optimizer if isinstance(optimizer, Optimizer) else optimizer.optimizer


def shape_of(p: Tensor) -> torch.Size:
    """Return the shape of a whole parameter: under ZeRO stage 3 its own is that of nothing."""
    return getattr(p, "ds_shape", p.shape)


def backend_for(trainer: L.Trainer, who: str) -> Backend:
    """Return the backend of the trainer's strategy.

    Raises:
        MisconfigurationException: if no backend knows the strategy.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DeepSpeedStrategy):  # a subclass of DDPStrategy that shares little with it
        from evolute.callbacks.access.zero import ZeroBackend

        return ZeroBackend(trainer, who)
    if isinstance(strategy, ModelParallelStrategy):
        from evolute.callbacks.access.fsdp import FSDPBackend

        return FSDPBackend(trainer, who)
    if type(strategy) is SingleDeviceStrategy or isinstance(strategy, DDPStrategy):
        return PlainBackend(trainer)
    raise MisconfigurationException(
        f"{who} does not support {type(strategy).__name__}: it reads gradients and updates in one process, under "
        "DDP, DeepSpeed ZeRO and FSDP2 (ModelParallelStrategy with fully_shard). Use "
        'Trainer(strategy="auto") on one device, "ddp" or "deepspeed_stage_2", or remove the callback'
    )


def require(backend: Backend, who: str, **needs: str) -> None:
    """Refuse on behalf of ``who`` if the backend lacks a capability; ``needs`` maps the flag to what to do instead.

    Raises:
        MisconfigurationException: naming what is missing and what to change.
    """
    known = {f.name for f in fields(Capabilities)}
    for flag, instead in needs.items():
        if flag not in known:
            raise ValueError(f"unknown capability {flag!r}; known: {', '.join(sorted(known))}")
        if not getattr(backend.capabilities, flag):
            raise MisconfigurationException(
                f"{who} needs {flag.replace('_', ' ')}, which this strategy cannot give: {instead}"
            )


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name, tied ones once, under their first name.

    A name loses the ``_orig_mod.`` that ``torch.compile`` puts around a submodule, so that it stays the same with and
    without compilation.
    """
    return {name.replace("_orig_mod.", ""): p for name, p in module.named_parameters() if p.requires_grad}

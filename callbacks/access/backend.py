"""What can be reached under each strategy: one protocol, one backend a strategy, capability flags."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Capabilities:
    """What a backend can give. Every refusal of a callback follows from one of these flags."""

    gradients: bool = True
    """Whole, reduced, unscaled gradients before the step."""
    local_gradients: bool = True
    """This rank's own gradient of a micro-batch, before any reduction."""
    updates: bool = True
    """Parameters before and after the step, so that an update can be read and changed."""
    scaling: bool = True
    """A learning rate of its own for each parameter, for one step."""
    optimizer_state: bool = True
    """Moments and the like, by parameter."""
    forward: bool = True
    """Forward passes of the live module outside the training step."""
    double_backward: bool = True
    """Second derivatives through the live module."""


class Backend(Protocol):
    """Gradients and optimizer state by parameter name, under one family of strategies."""

    capabilities: Capabilities

    def gradients(self, params: Mapping[str, Tensor], optimizer: Optimizer | None = None) -> dict[str, Tensor]:
        """Return the gradients that exist, by name, unscaled, as they are at the time.

        With ``optimizer``, in ``on_before_optimizer_step``, they are whole and reduced; without, inside backward, they
        are what has accumulated so far, reduced or not.
        """
        ...

    def optimizer_state(self, optimizer: Optimizer, param: Tensor) -> Mapping[str, Any]:
        """Return the optimizer's state of one parameter; empty before its first step."""
        ...


class PlainBackend:
    """One process, or DDP: every rank holds whole parameters, gradients and optimizer state."""

    capabilities = Capabilities()

    def __init__(self, scaler: torch.amp.GradScaler | None = None) -> None:
        self._scaler = scaler

    def gradients(self, params: Mapping[str, Tensor], optimizer: Optimizer | None = None) -> dict[str, Tensor]:
        """Return ``p.grad`` by name, detached, not copied if it is not scaled: valid until the optimizer steps."""
        found = {name: p.grad.detach() for name, p in params.items() if p.grad is not None}
        # Fused optimizers divide by the loss scale themselves, inside the step; for the others Lightning has done it.
        scaled = optimizer is None or getattr(optimizer, "_step_supports_amp_scaling", False)
        if self._scaler is not None and scaled and found:
            divided = torch._foreach_div(list(found.values()), self._scaler.get_scale())
            found = dict(zip(found, divided, strict=True))
        return found

    def optimizer_state(self, optimizer: Optimizer, param: Tensor) -> Mapping[str, Any]:
        """Return the entry of ``optimizer.state``."""
        return optimizer.state.get(param, {})


def backend_for(trainer: L.Trainer, who: str) -> Backend:
    """Return the backend of the trainer's strategy.

    Raises:
        MisconfigurationException: if no backend knows the strategy.
    """
    strategy = trainer.strategy
    if type(strategy) is SingleDeviceStrategy or isinstance(strategy, DDPStrategy):
        return PlainBackend(getattr(trainer.precision_plugin, "scaler", None))
    raise MisconfigurationException(
        f"{who} does not support {type(strategy).__name__}: it reads gradients and updates in one process or under "
        'DDP. Use Trainer(strategy="auto") on one device or strategy="ddp", or remove the callback'
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

"""Rows of parameters added, dropped and rewritten, with the optimizer's state kept consistent."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

_listeners: "WeakKeyDictionary[L.Trainer, list[Callable[[], None]]]" = WeakKeyDictionary()


def listen(trainer: L.Trainer, forget: Callable[[], None]) -> None:
    """Call ``forget`` whenever rows of parameters are added, dropped or moved: what is held by row is void then."""
    _listeners.setdefault(trainer, []).append(forget)


def gradient_of(trainer: L.Trainer, value: Tensor) -> Tensor | None:
    """Return the gradient of an intermediate result that the module retains, in ``on_after_backward``, unscaled.

    None if none has reached it, or one that is not finite throughout.
    """
    gradient = value.grad
    if gradient is None or not bool(gradient.isfinite().all()):
        return None
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return gradient if scaler is None else gradient / scaler.get_scale()


class Rows:
    """Parameters that have a row each for the same things, and the optimizers that step them.

    The parameters stay the same objects, their data are replaced: groups, schedulers, hooks and other callbacks go on
    holding what they hold. Act between two steps, when the graph of the last one is gone; gradients are dropped.

    Args:
        trainer: of the run.
        params: by name; all with as many rows.
        who: the callback's name, for messages.

    Raises:
        MisconfigurationException: if an optimizer updates one of them by a kernel captured for its shape.
    """

    def __init__(self, trainer: L.Trainer, params: Mapping[str, nn.Parameter], who: str) -> None:
        self._trainer, self.params, self._who = trainer, params, who
        for optimizer in trainer.optimizers:
            if any(group.get("capturable") for group in optimizer.param_groups):
                raise MisconfigurationException(f"{who}: capturable=True captures shapes, and rows change; turn it off")

    def __len__(self) -> int:
        return len(next(iter(self.params.values())))

    def replace(self, kept: Tensor, fresh: Mapping[str, Tensor]) -> None:
        """Keep the rows ``kept`` [K] (indices), in that order, and put new ones behind them.

        Kept rows keep their optimizer state bit by bit; that of new rows is zero. State without rows (a step count)
        stays.

        Args:
            kept: indices of rows.
            fresh: new rows [M, ...] by name, for every parameter.
        """
        for name, p in self.params.items():
            rows = len(p)
            new = fresh[name].to(p)
            for state in self._states(p):
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.ndim and len(value) == rows:
                        state[key] = torch.cat([value[kept], value.new_zeros(len(new), *value.shape[1:])])
            p.data = torch.cat([p.data[kept], new])
            p.grad = None
        self.announce()

    def announce(self) -> None:
        """Tell those who listen that rows are no longer what they were."""
        for forget in _listeners.get(self._trainer, []):
            forget()

    def write(self, at: Tensor, values: Mapping[str, Tensor]) -> None:
        """Overwrite the rows ``at`` [M] of some parameters, and zero their optimizer state."""
        for name, new in values.items():
            p = self.params[name]
            p.data[at] = new.to(p)
            self.forget(name, at)
        self.announce()

    def forget(self, name: str, at: Tensor) -> None:
        """Zero the optimizer state of the rows ``at`` of one parameter."""
        p = self.params[name]
        for state in self._states(p):
            for value in state.values():
                if isinstance(value, Tensor) and value.ndim and len(value) == len(p):
                    value[at] = 0

    def optimizer_of(self, name: str) -> Optimizer:
        """Return the optimizer that steps a parameter.

        Raises:
            MisconfigurationException: if there is none.
        """
        p = self.params[name]
        for optimizer in self._trainer.optimizers:
            if any(q is p for group in optimizer.param_groups for q in group["params"]):
                return optimizer
        raise MisconfigurationException(f"{self._who}: no optimizer steps {name!r}")

    def rate(self, name: str) -> float:
        """Return the learning rate of a parameter's group as it is now."""
        p = self.params[name]
        groups = self.optimizer_of(name).param_groups
        return next(float(g["lr"]) for g in groups if any(q is p for q in g["params"]))

    def _states(self, p: nn.Parameter) -> list[dict[str, Any]]:
        return [optimizer.state[p] for optimizer in self._trainer.optimizers if p in optimizer.state]


class GroupView:
    """One parameter of an optimizer, as libraries see it that keep one optimizer a parameter.

    They replace the parameter and its state here; :meth:`commit` brings what they did back into the parameter itself.

    Args:
        rows: the parameters and their optimizers.
        name: which parameter.
        copied: look at copies instead, which may be changed in place and are never brought back.
    """

    def __init__(self, rows: Rows, name: str, copied: bool = False) -> None:
        self._rows, self._copied = rows, copied
        real, self._real = rows.params[name], rows.optimizer_of(name)
        own = next(g for g in self._real.param_groups if any(p is real for p in g["params"]))
        state = self._real.state.get(real, {})
        if copied:
            state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
        self._param = nn.Parameter(real.detach().clone()) if copied else real
        self.param_groups: list[dict[str, Any]] = [{**own, "params": [self._param]}]
        self.state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)  # empty before the first step
        if state:
            self.state[self._param] = dict(state)

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is here now."""
        return self.param_groups[0]["params"][0]

    def commit(self) -> None:
        """Make the real parameter and the real state what they are here."""
        now = self.parameter
        assert not self._copied
        if now is not self._param:
            self._param.data = now.data
            self._param.grad = None
            self._rows.announce()
        if self.state.get(now):
            self._real.state[self._param] = self.state[now]

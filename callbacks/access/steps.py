"""Optimizer steps, opened: who acts inside one, in which order, and on what."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from evolute.callbacks.access.backend import Backend, Parts, Restorable, backend_for, named_parameters


class Stage(IntEnum):
    """When an action runs. ``SCALE`` decides before the update, the others act after it, in this order."""

    SCALE = 0
    LIMIT = 1
    TRANSFORM = 2
    OBSERVE = 3


@dataclass(eq=False)
class OptimizerStep:
    """One step of one optimizer, as an action sees it.

    Attributes:
        optimizer: the optimizer that steps.
        index: its position in ``trainer.optimizers``.
        params: the module's parameters it owns, by name.
        backend: gives what this rank holds of them.
        before: copies of what this rank holds of them, made before the update; empty unless an action asked for it.
        ratios: factor of each parameter's learning rate in this step; a missing name means 1.
    """

    optimizer: Optimizer
    index: int
    params: dict[str, Tensor]
    backend: Backend
    before: Parts = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    _after: Parts = field(default_factory=dict)

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rate that this step uses for each parameter."""
        name_of = {id(p): name for name, p in self.params.items()}
        return {
            name_of[id(p)]: float(group["lr"]) * self.ratios.get(name_of[id(p)], 1.0)
            for group, params in self.backend.groups(self.optimizer)
            for p in params
            if id(p) in name_of
        }

    def moved(self) -> Parts:
        """Return the update, after minus before, as far as this rank holds it."""
        return {name: now - self.before[name] for name, now in self.backend.weights(self.params).items()}

    def rescale(self, scale: float) -> None:
        """Make the update ``scale`` times what the optimizer made it, however often this is called."""
        weights = self.backend.weights(self.params)
        if not self._after:
            self._after = {name: w.clone() for name, w in weights.items()}
        with torch.no_grad():
            for name, w in weights.items():
                w.copy_(torch.lerp(self.before[name], self._after[name], scale))
        self.backend.publish(self.optimizer)


@dataclass(eq=False)
class Action:
    """What one callback does inside an optimizer step.

    Attributes:
        stage: when ``act`` runs.
        act: called with the step; a ``SCALE`` action returns learning-rate ratios by parameter name.
        prepare: called after backward and clipping, before the update; returns whether it wants ``step.before``.
    """

    stage: Stage
    act: Callable[[OptimizerStep], Mapping[str, float] | None]
    prepare: Callable[[OptimizerStep], bool] | None = None


class StepDoor:
    """One pre-hook and one post-hook on every optimizer of a trainer, shared by all callbacks.

    Torch calls a step pre-hook before the closure, that is before backward, so the pre-hook wraps the closure: what it
    adds runs once the gradients are whole and clipped, just before the update. Without a closure (a gradient scaler, a
    manual step) the gradients are already there and it runs at once. A backend whose optimizer calls no hooks watches
    its steps itself.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self._backend = backend_for(trainer, "a callback that acts on steps")
        self._actions: list[Action] = []
        self._handles: list[Any] = []
        self._watched: list[Restorable] = []
        self._open: OptimizerStep | None = None
        self._scaled: Restorable | None = None
        self._levels = 0  # steps of one optimizer inside each other: a subclass calls its parent's, hooks and all
        named = named_parameters(trainer.lightning_module)
        self._names = {id(p): name for name, p in named.items()}
        for index, optimizer in enumerate(trainer.optimizers):
            enter = partial(self._enter, optimizer, index)
            watched = self._backend.watch(optimizer, enter, self._leave)
            if watched is not None:
                self._watched.append(watched)
                continue
            self._handles.append(optimizer.register_step_pre_hook(self._make_pre_hook(index)))
            self._handles.append(optimizer.register_step_post_hook(self._post_hook))

    @property
    def underway(self) -> bool:
        """Whether an update has begun and not ended: what the closure runs now, it runs again."""
        return self._open is not None

    def stepping(self) -> bool:
        """Say, before an optimizer step that Lightning announces, whether one is really about to begin."""
        return self._open is None and self._backend.stepping()

    def attach(self, action: Action) -> None:
        """Let an action take part in every step from now on."""
        self._actions.append(action)
        self._actions.sort(key=lambda a: a.stage)

    def detach(self, action: Action) -> bool:
        """Take an action out; say whether none is left. The last one out removes the hooks."""
        self._actions = [a for a in self._actions if a is not action]
        if not self._actions:
            self.recover()
            for handle in self._handles:
                handle.remove()
            for watched in self._watched:
                watched.restore()
            self._handles, self._watched = [], []
        return not self._actions

    def recover(self) -> None:
        """Put the parameter groups back if a step raised between the split and the post-hook."""
        if self._scaled is not None:
            self._scaled.restore()
        self._scaled = self._open = None

    def _enter(self, optimizer: Optimizer, index: int) -> None:
        self.recover()
        self._before_update(OptimizerStep(optimizer, index, self._owned(optimizer), self._backend))

    def _leave(self, updated: bool) -> None:
        step = self._open
        self.recover()
        if updated and step is not None:
            self._after_update(step)

    def _make_pre_hook(self, index: int) -> Callable[[Optimizer, Any, Any], tuple[Any, Any] | None]:
        def pre_hook(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
            closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
            if closure is None and self._open is not None and self._open.optimizer is optimizer:
                self._levels += 1
                return None
            self.recover()
            step = OptimizerStep(optimizer, index, self._owned(optimizer), self._backend)
            if closure is None:
                self._before_update(step)
                return None

            def wrapped() -> Any:
                if self._open is not None:
                    self._refuse_second_call(optimizer)
                    return closure()
                result = closure()
                if self._open is None:
                    self._before_update(step)
                else:  # the hook of the step around this one has done it
                    self._levels += 1
                return result

            if "closure" in kwargs:
                return args, {**kwargs, "closure": wrapped}
            return (args[0], wrapped, *args[2:]), kwargs

        return pre_hook

    def _owned(self, optimizer: Optimizer) -> dict[str, Tensor]:
        groups = self._backend.groups(optimizer)
        return {self._names[id(p)]: p for _, params in groups for p in params if id(p) in self._names}

    def _refuse_second_call(self, optimizer: Optimizer) -> None:
        if any(action.stage < Stage.OBSERVE for action in self._actions):
            self.recover()
            raise MisconfigurationException(_calls_twice(optimizer))

    def _before_update(self, step: OptimizerStep) -> None:
        self._open, self._levels = step, 1
        wants_before = [action.prepare(step) for action in self._actions if action.prepare is not None]
        if any(wants_before):
            step.before = {name: w.clone() for name, w in self._backend.weights(step.params).items()}
        scaled = False
        for action in self._actions:
            if action.stage is Stage.SCALE:
                ratios = action.act(step)
                scaled = scaled or ratios is not None
                for name, ratio in (ratios or {}).items():
                    step.ratios[name] = step.ratios.get(name, 1.0) * ratio
        if scaled:
            self._scaled = self._backend.scale(step.optimizer, step.params, step.ratios)

    def _post_hook(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._levels -= 1
        if self._levels > 0:
            return
        step = self._open
        self.recover()
        if step is not None:  # else the closure was never called: nothing was measured, nothing to act on
            self._after_update(step)

    def _after_update(self, step: OptimizerStep) -> None:
        for action in self._actions:
            if action.stage is not Stage.SCALE:
                action.act(step)


def _calls_twice(optimizer: Optimizer) -> str:
    return (
        f"{type(optimizer).__name__} evaluates its closure more than once a step; a callback that changes "
        "steps needs an optimizer that evaluates it once (SGD, Adam, Muon, ...)"
    )


_doors: "WeakKeyDictionary[L.Trainer, StepDoor]" = WeakKeyDictionary()


def attach(trainer: L.Trainer, action: Action) -> None:
    """Let ``action`` take part in every optimizer step of ``trainer``; call it in ``on_fit_start``.

    Raises:
        MisconfigurationException: if the action changes steps and an optimizer is LBFGS. Others that evaluate their
            closure twice are found out, and refused, in their first step.
    """
    searching = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, LBFGS)]
    if searching and action.stage < Stage.OBSERVE:
        raise MisconfigurationException(_calls_twice(searching[0]))
    if trainer not in _doors:
        _doors[trainer] = StepDoor(trainer)
    _doors[trainer].attach(action)


def detach(trainer: L.Trainer, action: Action) -> None:
    """Undo :func:`attach`; call it in ``teardown``. Detaching what was never attached does nothing."""
    if trainer in _doors and _doors[trainer].detach(action):
        del _doors[trainer]


def underway(trainer: L.Trainer) -> bool:
    """Say whether the update of a step has begun: a hook that fires then belongs to a repeated closure."""
    return trainer in _doors and _doors[trainer].underway


def stepping(trainer: L.Trainer) -> bool:
    """Say, in ``on_before_optimizer_step``, whether an update is about to begin.

    It is not in a repeated closure, and not where the strategy accumulates gradients itself and is not done yet.
    """
    return trainer not in _doors or _doors[trainer].stepping()


def recover(trainer: L.Trainer) -> None:
    """Put parameter groups back after a step that raised; call it in ``on_exception``."""
    if trainer in _doors:
        _doors[trainer].recover()

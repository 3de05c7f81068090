"""Optimizer steps, opened: who acts inside one, in which order, and on what."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any
from weakref import WeakKeyDictionary

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from evolute.callbacks.access.backend import named_parameters


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
        optimizer: the torch optimizer that steps.
        index: its position in ``trainer.optimizers``.
        params: the parameters it owns, by name.
        before: copies of them as they were before the update; empty unless an action asked for them.
        ratios: factor of each parameter's learning rate in this step; a missing name means 1.
    """

    optimizer: Optimizer
    index: int
    params: dict[str, Tensor]
    before: dict[str, Tensor] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rate that this step uses for each parameter."""
        name_of = {id(p): name for name, p in self.params.items()}
        return {
            name_of[id(p)]: float(group["lr"]) * self.ratios.get(name_of[id(p)], 1.0)
            for group in self.optimizer.param_groups
            for p in group["params"]
            if id(p) in name_of
        }


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
    manual step) the gradients are already there and it runs at once.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self._actions: list[Action] = []
        self._handles: list[Any] = []
        self._open: OptimizerStep | None = None
        self._split: _SplitGroups | None = None
        self._levels = 0  # steps of one optimizer inside each other: a subclass calls its parent's, hooks and all
        named = named_parameters(trainer.lightning_module)
        self._names = {id(p): name for name, p in named.items()}
        for index, optimizer in enumerate(trainer.optimizers):
            self._handles.append(optimizer.register_step_pre_hook(self._make_pre_hook(index)))
            self._handles.append(optimizer.register_step_post_hook(self._post_hook))

    @property
    def underway(self) -> bool:
        """Whether an update has begun and not ended: what the closure runs now, it runs again."""
        return self._open is not None

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
            self._handles = []
        return not self._actions

    def recover(self) -> None:
        """Put the parameter groups back if a step raised between the split and the post-hook."""
        if self._split is not None:
            self._split.restore()
        self._split = self._open = None

    def _make_pre_hook(self, index: int) -> Callable[[Optimizer, Any, Any], tuple[Any, Any] | None]:
        def pre_hook(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
            closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
            if closure is None and self._open is not None and self._open.optimizer is optimizer:
                self._levels += 1
                return None
            self.recover()
            step = OptimizerStep(optimizer, index, self._owned(optimizer))
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
        groups = optimizer.param_groups
        return {self._names[id(p)]: p for group in groups for p in group["params"] if id(p) in self._names}

    def _refuse_second_call(self, optimizer: Optimizer) -> None:
        if any(action.stage < Stage.OBSERVE for action in self._actions):
            self.recover()
            raise MisconfigurationException(_calls_twice(optimizer))

    def _before_update(self, step: OptimizerStep) -> None:
        self._open, self._levels = step, 1
        wants_before = [action.prepare(step) for action in self._actions if action.prepare is not None]
        if any(wants_before):
            step.before = {name: p.detach().clone() for name, p in step.params.items()}
        scaled = False
        for action in self._actions:
            if action.stage is Stage.SCALE:
                ratios = action.act(step)
                scaled = scaled or ratios is not None
                for name, ratio in (ratios or {}).items():
                    step.ratios[name] = step.ratios.get(name, 1.0) * ratio
        if scaled:
            self._split = _SplitGroups(step)

    def _post_hook(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._levels -= 1
        if self._levels > 0:
            return
        step = self._open
        if self._split is not None:
            self._split.restore()
        self._split = self._open = None
        if step is None:  # the closure was never called: nothing was measured, nothing to act on
            return
        for action in self._actions:
            if action.stage is not Stage.SCALE:
                action.act(step)


class _SplitGroups:
    """The optimizer's parameter groups, split into one group a scaled parameter until :meth:`restore`.

    The list object and the original group objects stay the same ones, so schedulers and checkpoints never see it.
    """

    OWN_KEYS = ("params", "param_names", "lr")

    def __init__(self, step: OptimizerStep) -> None:
        self._list = step.optimizer.param_groups
        self._originals = list(self._list)
        self._pieces: list[list[dict[str, Any]]] = []
        ratio_of = {id(p): step.ratios[name] for name, p in step.params.items() if name in step.ratios}
        for group in self._originals:
            rest = [i for i, p in enumerate(group["params"]) if id(p) not in ratio_of]
            pieces = [_piece(group, [i], ratio_of[id(p)]) for i, p in enumerate(group["params"]) if id(p) in ratio_of]
            if rest or not pieces:
                pieces.append(_piece(group, rest, None))
            for piece in pieces[1:]:  # a counter kept as a tensor must go up once a step, not once a piece
                piece.update({k: v.clone() for k, v in piece.items() if isinstance(v, Tensor) and k != "lr"})
            self._pieces.append(pieces)
        self._list[:] = [piece for pieces in self._pieces for piece in pieces]

    def restore(self) -> None:
        """Put the original groups back, with what the optimizer itself wrote into a group (a counter, say)."""
        self._list[:] = self._originals
        for group, pieces in zip(self._originals, self._pieces, strict=True):
            for key, value in pieces[0].items():
                if key not in self.OWN_KEYS and (key not in group or group[key] is not value):
                    group[key] = value


def _piece(group: dict[str, Any], members: list[int], ratio: float | None) -> dict[str, Any]:
    piece = {**group, "params": [group["params"][i] for i in members]}
    if "param_names" in group:
        piece["param_names"] = [group["param_names"][i] for i in members]
    if ratio is not None:
        piece["lr"] = group["lr"] * ratio
    return piece


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


def recover(trainer: L.Trainer) -> None:
    """Put parameter groups back after a step that raised; call it in ``on_exception``."""
    if trainer in _doors:
        _doors[trainer].recover()

"""Run a module without leaving a trace of having run it."""

import random
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

# What nn.Module, LightningModule and the hooks machinery keep in __dict__: structure, not state that a step changes.
_STRUCTURE = {
    "_parameters",
    "_buffers",
    "_modules",
    "_trainer",
    "_fabric",
    "_example_input_array",
    "_non_persistent_buffers_set",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
}


# Values whose contents may change in place; a module has many other attributes, and they are restored by reference.
_WITH_CONTENTS = (Tensor, dict, list, deque, tuple, set, torch.Generator, random.Random, np.random.Generator)


@contextmanager
def untouched(module: nn.Module) -> Generator[None]:
    """Restore, on the way out, everything about ``module`` and the random generators that a forward pass may change.

    That is: buffers (batch-norm statistics), train/eval flags, plain attributes of every submodule, with the contents
    of lists, dicts, sets, tensors and random generators among them (torchmetrics states, a list that the step appends
    to), ``.grad``, and the global Python, NumPy, torch and CUDA random states. Identity is kept too: the same list
    object, the same tensor, at any depth. Parameters are not copied: nothing here may change them. Files, sockets and
    the insides of foreign objects cannot be restored; a module with such effects defines ``loss_on``.
    """
    attributes = [(m.__dict__, _snapshots(m.__dict__)) for m in module.modules()]
    buffers = [(m._buffers, _snapshots(m._buffers)) for m in module.modules()]
    grads = [(p, p.grad) for p in module.parameters()]
    python, numpy = random.getstate(), np.random.get_state()
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            for owner, restores in [*attributes, *buffers]:
                for name in set(owner) - set(restores) - _STRUCTURE:
                    del owner[name]
                owner.update({name: restore() if restore else value for name, (value, restore) in restores.items()})
            for p, grad in grads:
                p.grad = grad
            random.setstate(python)
            np.random.set_state(numpy)


def _snapshots(owner: dict[str, Any]) -> dict[str, tuple[Any, Callable[[], Any] | None]]:
    """Return for every attribute its value and, where that has contents that may change, how to put them back."""
    return {
        name: (value, _snapshot(value) if isinstance(value, _WITH_CONTENTS) and _holds(value) else None)
        for name, value in owner.items()
        if name not in _STRUCTURE
    }


def _holds(value: Any) -> bool:
    return not isinstance(value, tuple) or any(isinstance(v, _WITH_CONTENTS) for v in value)


def _snapshot(value: Any) -> Callable[[], Any]:
    """Return a function that gives ``value`` back, the same object, with the contents it has now."""
    if isinstance(value, Tensor) and not value.requires_grad:
        contents = value.detach().clone()

        def tensor() -> Any:
            if value.shape != contents.shape or not torch.equal(value, contents):
                with torch.no_grad():
                    value.resize_(contents.shape).copy_(contents)
            return value

        return tensor
    if isinstance(value, dict) and type(value).__module__ in ("builtins", "collections"):
        items = {k: _snapshot(v) for k, v in value.items()}

        def mapping() -> Any:
            value.clear()
            value.update({k: restore() for k, restore in items.items()})
            return value

        return mapping
    if isinstance(value, list | deque):
        elements = [_snapshot(v) for v in value]

        def sequence() -> Any:
            value.clear()
            value.extend(restore() for restore in elements)
            return value

        return sequence
    if type(value) is tuple:
        members = [_snapshot(v) for v in value]

        def fixed() -> Any:
            for restore in members:
                restore()
            return value

        return fixed
    if isinstance(value, set):
        held = set(value)

        def unordered() -> Any:
            value.clear()
            value.update(held)
            return value

        return unordered
    if isinstance(value, torch.Generator | random.Random | np.random.Generator):
        return _generator(value)
    return lambda: value


def _generator(value: torch.Generator | random.Random | np.random.Generator) -> Callable[[], Any]:
    if isinstance(value, torch.Generator):
        bits = value.get_state()
        return lambda: value.set_state(bits)
    if isinstance(value, random.Random):
        python = value.getstate()

        def rewound() -> Any:
            value.setstate(python)
            return value

        return rewound
    numpy = value.bit_generator.state

    def restored() -> Any:
        value.bit_generator.state = numpy
        return value

    return restored


@contextmanager
def muted(module: L.LightningModule) -> Generator[None]:
    """Make ``self.log`` and ``self.log_dict`` of a module do nothing."""

    def silent(*args: Any, **kwargs: Any) -> None:
        return None

    module.__dict__["log"] = module.__dict__["log_dict"] = silent
    try:
        yield
    finally:
        module.__dict__.pop("log", None)
        module.__dict__.pop("log_dict", None)


@contextmanager
def without_hooks_of(package: str, module: nn.Module) -> Generator[None]:
    """Take a package's forward and backward hooks off a module and its children.

    DeepSpeed's would gather, free and record parameters that a probe has replaced by its own.
    """
    tables = [
        table
        for m in module.modules()
        for key in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
        if (table := m.__dict__.get(key))
    ]
    kept = [dict(table) for table in tables]
    for table in tables:
        for key in [k for k, hook in table.items() if str(getattr(hook, "__module__", "")).startswith(package)]:
            del table[key]
    try:
        yield
    finally:
        for table, all_hooks in zip(tables, kept, strict=True):
            table.clear()
            table.update(all_hooks)

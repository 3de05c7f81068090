"""Modules of a network by name, and the matrix that a module of item vectors holds."""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.nn.utils import parametrize

ITEMS = r".*item_?(emb|embs|embedding|embeddings|table)"
"""Names that tables of items go by in recommenders."""
QUERIES = r"(.*\.)?(encoder|sequence_encoder)"
"""Names of what makes the vectors that meet them."""


def modules_named(module: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost modules whose whole name matches, without what ``torch.compile`` puts around names."""
    wanted = re.compile(pattern)
    taken: list[str] = []
    for full, child in module.named_modules():
        name = full.replace("_orig_mod.", "").removesuffix("._orig_mod")
        inside = any(name.startswith(outer + ".") for outer in taken)
        if name and not inside and wanted.fullmatch(name) and not hasattr(child, "_orig_mod"):
            taken.append(name)
            yield name, child


def tables_named(module: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield those among them that hold item vectors in a matrix ``weight``, or make them from ids (``padding_idx``)."""
    for name, child in modules_named(module, pattern):
        if matrix_of(child) is not None or isinstance(getattr(child, "padding_idx", None), int):
            yield name, child


def matrix_of(module: nn.Module) -> nn.Parameter | None:
    """Return the stored matrix ``weight`` of a module, behind a parametrization if there is one."""
    if parametrize.is_parametrized(module, "weight"):
        held: Any = module.parametrizations
        return held.weight.original
    weight = module._parameters.get("weight")
    return weight if weight is not None and len(getattr(weight, "ds_shape", weight.shape)) == 2 else None


def parametrizations(module: nn.Module) -> list[nn.Module]:
    """Return what makes the ``weight`` of a module from what is stored, in order; nothing for a plain one."""
    held: Any = getattr(module, "parametrizations", {})
    return list(held["weight"]) if "weight" in held else []


def sharing(module: nn.Module, weight: nn.Parameter) -> list[nn.Module]:
    """Return the modules whose matrix ``weight`` is this one: a tied head beside its table."""
    return [child for child in module.modules() if matrix_of(child) is weight]


def make_plain(module: nn.Module, child: nn.Module) -> None:
    """Turn a parametrized ``weight`` into a plain parameter of its present value, in all modules that share it."""
    stored = matrix_of(child)
    if stored is None or not parametrize.is_parametrized(child, "weight"):
        return
    users = [child, *(m for m in sharing(module, stored) if m is not child)]
    with torch.no_grad():
        value: Any = child.weight
        value = value.detach().clone()
    for user in users:
        parametrize.remove_parametrizations(user, "weight", leave_parametrized=False)
    stored.data = value  # the parameter that optimizers know
    for user in users:
        user.weight = stored


def when_built(module: L.LightningModule, target: str, act: Callable[[], None]) -> None:
    """Act now, or right after ``configure_model`` if that is what makes the tables whose names match."""
    late = type(module).configure_model is not L.LightningModule.configure_model
    if not late or any(True for _ in tables_named(module, target)):
        act()
        return
    own = module.configure_model

    @functools.wraps(own)
    def configure_then_act() -> None:
        module.__dict__.pop("configure_model", None)
        own()
        act()

    module.__dict__["configure_model"] = configure_then_act

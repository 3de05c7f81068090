"""Modules of a network by name, and the matrix that a module of item vectors holds."""

import re
from collections.abc import Iterator
from typing import Any

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

"""Names of the parameters that make up the diagonal blocks of an operator."""

import re
from collections.abc import Iterable

from torch import nn


def parameter_blocks(module: nn.Module, by: str | type[nn.Module] | None = None) -> dict[str, list[str]]:
    r"""Return the trainable parameters of ``module`` in named blocks, for ``operator.block(names)``.

    Example::

        for name, names in parameter_blocks(model, nn.TransformerEncoderLayer).items():
            sharpness[name] = top_eigenpairs(H.block(names)).values[0]

    Args:
        module: the network whose ``named_parameters`` the operator was built with.
        by: what makes a block.

            - None: a layer, that is a module with parameters of its own, under the module's name.
            - a class: a module of that class with all it contains, under the module's name; modules of the class inside
              another one do not count again.
            - a regular expression: the parameters whose whole name matches and gives the same groups, under the groups
              joined by a dot: ``r"blocks\.(\d+)\..*"`` makes one block an index. Without groups all that match make one
              block, under the expression.

    Returns:
        Parameter names by block, disjoint, in the order of the module. A tied parameter belongs to the first block
        that holds it, under the first of its names.

    Raises:
        ValueError: if there is no such block.
    """
    blocks = _by_name(module, by) if isinstance(by, str) else _by_module(module, by)
    if not blocks:
        raise ValueError(f"by={by!r} matches no trainable parameter of {type(module).__name__}")
    return blocks


def _by_name(module: nn.Module, pattern: str) -> dict[str, list[str]]:
    wanted = re.compile(pattern)
    blocks: dict[str, list[str]] = {}
    for name, p in module.named_parameters():
        if p.requires_grad and (match := wanted.fullmatch(name)):
            key = ".".join(group for group in match.groups() if group is not None) if wanted.groups else pattern
            blocks.setdefault(key, []).append(name)
    return blocks


def _by_module(module: nn.Module, kind: type[nn.Module] | None) -> dict[str, list[str]]:
    left = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    blocks: dict[str, list[str]] = {}
    for where, part in module.named_modules() if kind is None else _outermost(module, kind):
        found = [left.pop(id(p)) for p in part.parameters(recurse=kind is not None) if id(p) in left]
        if found:
            blocks[where] = found
    return blocks


def _outermost(module: nn.Module, kind: type[nn.Module], prefix: str = "") -> Iterable[tuple[str, nn.Module]]:
    if isinstance(module, kind):
        yield prefix, module
        return
    for name, child in module.named_children():
        yield from _outermost(child, kind, f"{prefix}.{name}" if prefix else name)

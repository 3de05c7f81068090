"""Which parameter lives in which norm: one rule for every optimizer and callback that treats layers by kind."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from evolute.geometry.norms.lmo import NORMS, Norm

_HEAD_NAMES = re.compile(r"(lm_|embed_)?(head|out|output|logits|classifier|score)")


def parameter_norms(module: nn.Module, overrides: Mapping[str, str] | None = None) -> dict[str, Norm]:
    """Say for every trainable parameter in which norm its step is bounded.

    The first rule that fits decides:

    1. ``overrides``: the first pattern that matches the whole name (any of its names, if the parameter is shared);
    2. fewer than two dimensions (biases, gains, scalars): ``rms``;
    3. a name with ``lora_`` in it: ``spectral``; each factor is a matrix between hidden spaces, whatever it adapts;
    4. the weight of an ``nn.Embedding`` or ``nn.EmbeddingBag``, shared with a head or not: ``sign``;
    5. the weight of a head: ``sign``. Heads are what ``get_output_embeddings()`` returns, on ``module`` or on any
       child that has it (Hugging Face); if nothing does, every ``nn.Linear`` whose last name is one of head, lm_head,
       embed_out, out, output, logits, classifier, score;
    6. two dimensions, or a filter of a convolution (a matrix [out, in * k * k]): ``spectral``;
    7. anything else (a class token, a stack of matrices, a grid): ``rms``, since no single matrix describes it.

    Matrices are taken to be stored [out, in]. Layers that store [in, out], such as GPT-2's ``Conv1D``, are sorted
    alike, but the factor ``sqrt(out/in)`` of a scaled norm then comes out inverted for them.

    Args:
        module: any module; call this after ``configure_model``. Frozen parameters are left out, shared ones are
            counted once, under their first name.
        overrides: regular expression to norm (``"spectral"``, ``"sign"``, ``"rms"``).

    Returns:
        Name to norm, in the order of ``module.named_parameters()``.

    Raises:
        ValueError: if a pattern matches no trainable parameter or is no regular expression, a norm is unknown, or
            ``spectral`` is asked of a parameter with fewer than two dimensions.
    """
    patterns = [(_compiled(pattern), norm) for pattern, norm in (overrides or {}).items()]
    for pattern, norm in patterns:
        if norm not in NORMS:
            raise ValueError(f"override {pattern.pattern!r}: norm={norm!r} must be one of {', '.join(NORMS)}")
    aliases: dict[int, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(p), []).append(name)
    sign, filters = _embeddings_and_heads(module), _filters(module)
    matched: set[str] = set()
    norms: dict[str, Norm] = {}
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        hits = [(x.pattern, norm) for x, norm in patterns if any(x.fullmatch(alias) for alias in aliases[id(p)])]
        matched.update(pattern for pattern, _ in hits)
        chosen = hits[0][1] if hits else _norm_of(name, p, id(p) in sign, id(p) in filters)
        if chosen == "spectral" and len(_shape(p)) < 2:
            raise ValueError(f"override asks for norm='spectral' on {name!r} of shape {tuple(_shape(p))}: use 'rms'")
        norms[name] = chosen  # pyright: ignore[reportArgumentType]
    for pattern, _ in patterns:
        if pattern.pattern not in matched:
            raise ValueError(f"override {pattern.pattern!r} matches the whole name of no trainable parameter")
    return norms


def parameter_groups(module: nn.Module, overrides: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Return the trainable parameters of ``module`` as named optimizer groups, one a norm.

    The groups go to any torch optimizer, which moves the names to the group's ``"param_names"``.

    Args:
        module: see :func:`parameter_norms`, which holds the rules.
        overrides: regular expression over whole names to norm.

    Returns:
        At most three dicts ``{"params": [(name, parameter), ...], "norm": norm}``: spectral, sign, rms; none empty.

    Raises:
        ValueError: as :func:`parameter_norms`, or if nothing is trainable.
    """
    norms = parameter_norms(module, overrides)
    if not norms:
        raise ValueError(f"{type(module).__name__} has no trainable parameter")
    named = dict(module.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [(name, named[name]) for name, n in norms.items() if n == norm], "norm": norm} for norm in NORMS
    ]
    return [group for group in groups if group["params"]]


def refuse_shards(params: Iterable[Tensor], who: str) -> None:
    """Refuse parameters of which a process holds a shard only (FSDP2): no step in a matrix norm can be read off one.

    Raises:
        ValueError: naming what to use instead.
    """
    for p in params:
        if hasattr(p, "placements"):  # a DTensor; importing its class is slow
            raise ValueError(
                f"{who} steps whole matrices, and a parameter of shape {tuple(p.shape)} is sharded over processes: use "
                'torch.optim.AdamW, or Trainer(strategy="ddp")'
            )


def refuse_pieces(params: Iterable[Tensor], who: str) -> None:
    """Refuse, in a step, flat tensors that took the place of matrices: DeepSpeed ZeRO steps pieces of many parameters.

    Raises:
        RuntimeError: naming what to use instead.
    """
    for p in params:
        if p.ndim < 2:
            raise RuntimeError(
                f"{who} steps whole matrices, and finds a flat tensor of {p.numel()} elements in place of one, as "
                'DeepSpeed ZeRO puts it: use torch.optim.AdamW, or Trainer(strategy="ddp")'
            )


def _norm_of(name: str, p: Tensor, is_sign: bool, is_filter: bool) -> Norm:
    dimensions = len(_shape(p))
    if dimensions < 2:
        return "rms"
    if "lora_" in name and dimensions == 2:
        return "spectral"
    if is_sign:
        return "sign"
    return "spectral" if dimensions == 2 or is_filter else "rms"


def _shape(p: Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter, also of one that DeepSpeed's stage 3 has left empty."""
    return tuple(getattr(p, "ds_shape", p.shape))


def _embeddings_and_heads(module: nn.Module) -> set[int]:
    """Ids of the weights that meet tokens or classes, at either end."""
    weights = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    heads: set[int] = set()
    for child in module.modules():
        getter = getattr(child, "get_output_embeddings", None)
        head = getter() if callable(getter) else None
        weight = getattr(head, "weight", None)
        if isinstance(weight, Tensor):
            heads.add(id(weight))
    if not heads:
        named = module.named_modules()
        heads = {
            id(m.weight) for name, m in named if isinstance(m, nn.Linear) and _HEAD_NAMES.fullmatch(name.split(".")[-1])
        }
    return weights | heads


def _filters(module: nn.Module) -> set[int]:
    filters: Iterable[nn.Module] = (m for m in module.modules() if isinstance(m, _ConvNd))
    return {id(m.weight) for m in filters}


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"override {pattern!r} is no regular expression: {error}") from error

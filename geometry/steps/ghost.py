"""Ghost radius: how far along a direction the Taylor series of a softmax loss can be trusted.

Along a direction the loss is ``-z_y + log F`` with ``F(t) = sum_k w_k exp(a_k t)``, ``a`` the change of the logits per
unit step. The series ends at the nearest complex zero of ``F``, and none lies closer than ``pi / (max a - min a)`` (P.
Sao, "Ghosts of Softmax", arXiv 2603.13552, sec. 3 for linearised logits). A step below the radius is reliable for one
step; a step above it need not fail. The bound holds for losses linear in the logits plus a log-sum-exp: cross-entropy,
label smoothing and, each logit by itself, binary cross-entropy. The paper's refinement by the gap of the two top
classes is no lower bound for three classes or more, so it is offered for binary heads alone, where it is exact.

A row is one loss term (one token of a language model); a mask leaves rows out, such as padding or ``ignore_index``.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def logit_spread(change: Tensor) -> Tensor:
    """Return ``max_k - min_k`` of logit changes [..., K], as [...] in float32 or wider."""
    wide = change.to(_wide(change))
    return wide.amax(dim=-1) - wide.amin(dim=-1)


def ghost_ratio(spread: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return ``r = max spread / pi`` for the spreads of one whole step; below 1 the step is reliable.

    Args:
        spread: of any shape, one entry a loss term: ``logit_spread`` of the change over the step, ``secant_spread`` or
            ``head_spread``.
        mask: bool, same shape; True for the terms that count.

    Returns:
        Unitless scalar; 0 if no term counts.

    Raises:
        ValueError: if the shapes differ.
    """
    if mask is not None:
        if mask.shape != spread.shape:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, the spreads have {tuple(spread.shape)}")
        spread = spread[mask]
    return spread.max() / math.pi if spread.numel() else spread.new_zeros(())


def ghost_radius(directional_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return ``pi / max_rows (max_k a - min_k a)``, a lower bound on the convergence radius along the direction.

    Args:
        directional_logits: ``a`` [n, K] (or [..., K]), logit change per unit of step length.
        mask: bool [n]; True for the rows that count.

    Returns:
        Scalar, in units of the step length; ``inf`` if the logits do not move or no row counts.
    """
    return ghost_ratio(logit_spread(directional_logits), mask).reciprocal()


def binary_ghost_radius(delta: Tensor, slope: Tensor) -> Tensor:
    """Return ``sqrt(delta^2 + pi^2) / |slope|``, the exact radius for two classes or a sigmoid, entry by entry.

    Args:
        delta: logit gap ``z_1 - z_0`` (for a sigmoid, the logit).
        slope: its change per unit of step length.
    """
    return torch.sqrt(delta.square() + math.pi**2) / slope.abs()


def directional_logits(
    function: Callable[[dict[str, Tensor]], Tensor], params: Mapping[str, Tensor], direction: Mapping[str, Tensor]
) -> Tensor:
    """Return the derivative of the logits along a direction, by forward mode under the MATH attention kernel.

    Args:
        function: maps parameters to logits, for example ``lambda p: functional_call(model, p, (x,))``.
        params: where to take it.
        direction: one tensor a parameter; scale all by one factor to unit length if the radius is wanted in lengths.

    Raises:
        ValueError: if the names differ.
    """
    if params.keys() != direction.keys():
        odd = sorted(params.keys() ^ direction.keys())
        raise ValueError(f"params and direction name different tensors: {', '.join(odd[:3])}")
    point = {name: p.detach() for name, p in params.items()}
    tangent = {name: direction[name].detach().to(p.dtype) for name, p in point.items()}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(function, (point,), (tangent,))[1]


def secant_spread(before: Tensor, after: Tensor, chunk: int = 4096) -> Tensor:
    """Return ``max_k - min_k`` of ``after - before`` without forming the difference in float32.

    Over the step length it equals the JVP's spread to first order; the rest is the bend of the logits along the step.

    Args:
        before: logits [..., K] before the step.
        after: logits after it, on the same inputs in the same mode, same shape.
        chunk: classes at a time.

    Returns:
        [...], in float32 or wider.

    Raises:
        ValueError: if the shapes differ or ``chunk < 1``.
    """
    if before.shape != after.shape:
        raise ValueError(f"logits have shape {tuple(before.shape)} before the step, {tuple(after.shape)} after it")
    wide = _wide(before, after)

    def change(part: slice) -> Tensor:
        return after[..., part].to(wide) - before[..., part].to(wide)

    return _running_spread(change, before.shape[-1], chunk)


def head_spread(
    hidden_before: Tensor,
    weight_before: Tensor,
    hidden_after: Tensor,
    weight_after: Tensor,
    bias_before: Tensor | None = None,
    bias_after: Tensor | None = None,
    chunk: int = 4096,
) -> Tensor:
    """Return the spread of the logits' change from the inputs of a linear head, a few classes at a time.

    Neither logits nor their difference are held whole. The change is ``dh W_after^T + h_before dW^T + db``, which is
    exact and, unlike the difference of two products, does not cancel.

    Args:
        hidden_before: [..., d], what enters the head before the step.
        weight_before: [K, d].
        hidden_after: [..., d], after it.
        weight_after: [K, d].
        bias_before: [K] or None.
        bias_after: [K] or None.
        chunk: classes at a time.

    Returns:
        [...], in float32 or wider.

    Raises:
        ValueError: if shapes do not fit, only one bias is given, or ``chunk < 1``.
    """
    if hidden_before.shape != hidden_after.shape or weight_before.shape != weight_after.shape:
        raise ValueError(
            f"shapes differ across the step: hidden {tuple(hidden_before.shape)} and {tuple(hidden_after.shape)}, "
            f"weight {tuple(weight_before.shape)} and {tuple(weight_after.shape)}"
        )
    if (bias_before is None) != (bias_after is None):
        raise ValueError("a bias was given for one side of the step only: pass both or neither")
    wide = _wide(hidden_before, weight_before)
    hidden = hidden_before.to(wide)
    moved = hidden_after.to(wide) - hidden

    def change(part: slice) -> Tensor:
        weight = weight_after[part].to(wide)
        dz = moved @ weight.T + hidden @ (weight - weight_before[part].to(wide)).T
        if bias_before is not None and bias_after is not None:
            dz += bias_after[part].to(wide) - bias_before[part].to(wide)
        return dz

    return _running_spread(change, weight_before.shape[0], chunk)


def recomputed_spread(
    hidden_before: Tensor,
    weight_before: Tensor,
    after: Tensor,
    bias_before: Tensor | None = None,
    chunk: int = 4096,
) -> Tensor:
    """Return the secant spread where the logits before the step were not kept, only what entered the head then.

    One more product of the head, a few classes at a time, instead of a second tensor of logits. Like
    :func:`secant_spread` it is a difference of two products: it resolves changes down to the rounding of the logits.

    Args:
        hidden_before: [..., d], what entered the head before the step.
        weight_before: [K, d].
        after: logits [..., K] after the step.
        bias_before: [K] or None.
        chunk: classes at a time.

    Returns:
        [...], in float32 or wider.

    Raises:
        ValueError: if the shapes do not fit or ``chunk < 1``.
    """
    if after.shape != (*hidden_before.shape[:-1], weight_before.shape[0]):
        raise ValueError(
            f"logits have shape {tuple(after.shape)}, a head of {tuple(weight_before.shape)} gives another for inputs "
            f"of {tuple(hidden_before.shape)}"
        )
    wide = _wide(hidden_before, weight_before, after)
    hidden = hidden_before.to(wide)

    def change(part: slice) -> Tensor:
        before = hidden @ weight_before[part].to(wide).T
        if bias_before is not None:
            before += bias_before[part].to(wide)
        return after[..., part].to(wide) - before

    return _running_spread(change, after.shape[-1], chunk)


def binary_spread(before: Tensor, after: Tensor) -> Tensor:
    """Return the spread that puts the exact radius of two classes at ratio 1, for secants [..., 2].

    The exact radius is ``sqrt(delta^2 + pi^2) / |slope|`` (:func:`binary_ghost_radius`), so the ratio of a whole step
    is ``|change of delta| / sqrt(delta^2 + pi^2)``; this is pi times that, to be used as any other spread.

    Args:
        before: logits [..., 2] before the step, or a zero and the logit of a sigmoid.
        after: logits after it, same shape.
    """
    wide = _wide(before, after)
    delta = before[..., 1].to(wide) - before[..., 0].to(wide)
    change = after[..., 1].to(wide) - after[..., 0].to(wide) - delta
    return math.pi * change.abs() / torch.sqrt(delta.square() + math.pi**2)


def _running_spread(change: Callable[[slice], Tensor], classes: int, chunk: int) -> Tensor:
    if chunk < 1 or classes < 1:
        raise ValueError(f"chunk={chunk}, classes={classes}: both must be at least 1")
    first = change(slice(0, chunk))
    high, low = first.amax(dim=-1), first.amin(dim=-1)
    for start in range(chunk, classes, chunk):
        part = change(slice(start, start + chunk))
        high, low = torch.maximum(high, part.amax(dim=-1)), torch.minimum(low, part.amin(dim=-1))
    return high - low


def _wide(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype

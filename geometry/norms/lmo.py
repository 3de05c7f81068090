"""Linear minimisation oracles and dual norms of the three norms that layers live in.

An optimizer that bounds its step in a norm moves along the oracle; noise in a gradient is measured in the dual norm.

=========  ================================  ==========================================  ==========================
norm       of a tensor O                     oracle, ``M = U S V^T``                      dual norm of M
=========  ================================  ==========================================  ==========================
spectral   largest singular value            ``-U V^T``                                  nuclear, sum of S
sign       largest absolute entry            ``-sign(M)``                                sum of absolute entries
rms        ``|O|_2 / sqrt(d)``, d entries    ``-sqrt(d) M / |M|_2``                      ``sqrt(d) |M|_2``
=========  ================================  ==========================================  ==========================

``scaled=True`` takes the norm that does not grow with the width of a layer [out, in]: RMS to RMS for ``spectral``
(the oracle is ``sqrt(out/in)`` times the above), RMS to max for ``sign`` (``1/in`` times); ``rms`` has it built in.
The dual norm takes the same factor. Sources: LANTON, arXiv 2510.14009, section 3 (as reported); Scion, arXiv
2502.07529, for the scales.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from evolute.geometry.norms.orthogonalize import newton_schulz, polar_express

Norm = Literal["spectral", "sign", "rms"]
Method = Literal["svd", "newton_schulz", "polar_express"]
NORMS: tuple[Norm, ...] = ("spectral", "sign", "rms")
METHODS: tuple[Method, ...] = ("svd", "newton_schulz", "polar_express")


def lmo(M: Tensor, norm: Norm, method: Method = "svd", scaled: bool = False) -> Tensor:
    """Return the minimiser of ``<M, O>`` over the unit ball of ``norm``; zero where ``M`` is zero.

    Args:
        M: for ``spectral`` [..., m, n], leading dimensions a batch; else any shape, taken as one tensor.
        norm: ``"spectral"``, ``"sign"`` or ``"rms"``; see the table of this module.
        method: how the polar factor is formed (``spectral`` only): exactly by ``"svd"``, or approximately, and much
            faster, by ``"newton_schulz"`` or ``"polar_express"``, whose value ``<M, O>`` may miss the optimum.
        scaled: take the width-independent norm of the table instead of the plain one.

    Returns:
        Same shape and dtype as ``M``.

    Raises:
        ValueError: if ``norm`` or ``method`` is unknown, or ``norm`` is ``spectral`` and ``M`` has no two dimensions.
    """
    _check(M.shape, norm, method)
    if norm == "spectral":
        out = -_polar(M, method)
    elif norm == "sign":
        out = -M.sign()
    else:
        wide = M.to(torch.promote_types(M.dtype, torch.float32))
        length = torch.linalg.vector_norm(wide).clamp(min=torch.finfo(wide.dtype).tiny ** 0.5)
        out = (wide * (-math.sqrt(M.numel()) / length)).to(M.dtype)
    return out * norm_scale(M.shape, norm) if scaled else out


def dual_norm(M: Tensor, norm: Norm, method: Method = "svd", scaled: bool = False) -> Tensor:
    """Return ``max <M, O>`` over the unit ball of ``norm``: the norm in which gradients are measured.

    Args:
        M: for ``spectral`` [..., m, n], leading dimensions a batch; else any shape, taken as one tensor.
        norm: ``"spectral"``, ``"sign"`` or ``"rms"``; see the table of this module.
        method: how the nuclear norm is found; see :func:`nuclear_norm`.
        scaled: take the dual of the width-independent norm.

    Returns:
        [...] for ``spectral``, else a scalar; float32 or wider.

    Raises:
        ValueError: as :func:`lmo`.
    """
    _check(M.shape, norm, method)
    wide = M.to(torch.promote_types(M.dtype, torch.float32))
    if norm == "spectral":
        value = nuclear_norm(wide, method)
    elif norm == "sign":
        value = wide.abs().sum()
    else:
        value = torch.linalg.vector_norm(wide) * math.sqrt(M.numel())
    return value * norm_scale(M.shape, norm) if scaled else value


def nuclear_norm(M: Tensor, method: Method = "svd") -> Tensor:
    """Return the sum of the singular values of each matrix.

    The fast methods evaluate ``<M, X>`` at their approximate polar factor ``X``. Measured on matrices of side 64 to
    256 with Gaussian, low-rank and power-law spectra: ``newton_schulz`` finds 0.84 to 0.89 of the truth (a nearly
    constant factor, which cancels in ratios of layers), ``polar_express`` 0.97 to 1.08.

    Args:
        M: [..., m, n], floating point.
        method: ``"svd"`` (exact), ``"newton_schulz"`` or ``"polar_express"``.

    Returns:
        [...] in float32 or wider.

    Raises:
        ValueError: if ``method`` is unknown or ``M`` has fewer than two dimensions.
    """
    _check(M.shape, "spectral", method)
    wide = M.to(torch.promote_types(M.dtype, torch.float32))
    if method == "svd":
        return torch.linalg.svdvals(wide).sum(-1)
    return (wide * _polar(wide, method)).sum((-2, -1))


def norm_scale(shape: Sequence[int], norm: Norm) -> float:
    """Return the factor that turns the plain oracle and dual norm of a layer into the scaled ones.

    ``sqrt(out/in)`` for ``spectral`` (RMS to RMS), ``1/in`` for ``sign`` on a matrix (RMS to max), 1 otherwise.

    Args:
        shape: of the parameter, ``(..., out, in)``.
        norm: ``"spectral"``, ``"sign"`` or ``"rms"``.
    """
    if norm == "spectral":
        return math.sqrt(shape[-2] / shape[-1])
    if norm == "sign" and len(shape) > 1:
        return 1.0 / shape[-1]
    return 1.0


def batched_lmo(tensors: Sequence[Tensor], norms: Sequence[Norm], method: Method = "newton_schulz") -> list[Tensor]:
    """Return the plain (unscaled) oracle of every tensor, with one batched product chain per matrix shape.

    A shape and its transpose share a batch. Filters of more than two dimensions are flattened to [out, rest].

    Args:
        tensors: layers of any shapes, devices and dtypes.
        norms: one norm for each.
        method: see :func:`lmo`.

    Returns:
        New tensors with the shapes and dtypes of the given ones, in their order (some are views of one batch).

    Raises:
        ValueError: as :func:`lmo`, or if the two lists differ in length.
    """
    out: list[Tensor | None] = [None] * len(tensors)
    for stack, members in _stacked(tensors, norms, method):
        for i, direction in zip(members, lmo(stack, "spectral", method).unbind(), strict=True):
            out[i] = (direction.mT if _is_tall(tensors[i]) else direction).reshape(tensors[i].shape)
    return [lmo(t, norm) if o is None else o for t, norm, o in zip(tensors, norms, out, strict=True)]


def batched_dual_norms(
    tensors: Sequence[Tensor], norms: Sequence[Norm], method: Method = "polar_express", scaled: bool = True
) -> Tensor:
    """Return the dual norm of every tensor, with one batched product chain per matrix shape and no host sync.

    A shape and its transpose share a batch. Filters of more than two dimensions are flattened to [out, rest].

    Args:
        tensors: layers of any shapes and dtypes.
        norms: one norm for each.
        method: see :func:`nuclear_norm`.
        scaled: measure in the dual of the width-independent norm, so layers of different shape compare.

    Returns:
        [len(tensors)] in float32 (float64 if any input is), on the device of the first tensor.

    Raises:
        ValueError: as :func:`lmo`, or if the two lists differ in length, or are empty.
    """
    if not tensors:
        raise ValueError("batched_dual_norms needs at least one tensor, got none")
    values: list[Tensor | None] = [None] * len(tensors)
    for stack, members in _stacked(tensors, norms, method):
        for i, value in zip(members, nuclear_norm(stack, method).unbind(), strict=True):
            values[i] = value * norm_scale(_as_matrix(tensors[i]).shape, "spectral") if scaled else value
    all_values = [
        dual_norm(t, norm, scaled=scaled) if v is None else v for t, norm, v in zip(tensors, norms, values, strict=True)
    ]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return torch.stack([v.to(tensors[0].device, dtype) for v in all_values])


def _stacked(tensors: Sequence[Tensor], norms: Sequence[Norm], method: Method) -> list[tuple[Tensor, list[int]]]:
    """Stack the spectral tensors by shape: (batch [B, short, long], positions) for each shape, device and dtype."""
    if len(tensors) != len(norms):
        raise ValueError(f"{len(tensors)} tensors but {len(norms)} norms")
    groups: dict[tuple[torch.Size, torch.device, torch.dtype], list[int]] = {}
    wide: dict[int, Tensor] = {}
    for i, (t, norm) in enumerate(zip(tensors, norms, strict=True)):
        _check(t.shape, norm, method)
        if norm == "spectral":
            matrix = _as_matrix(t)
            wide[i] = matrix.mT if _is_tall(t) else matrix
            groups.setdefault((wide[i].shape, t.device, t.dtype), []).append(i)
    return [(torch.stack([wide[i] for i in members]), members) for members in groups.values()]


def _as_matrix(t: Tensor) -> Tensor:
    return t if t.ndim == 2 else t.flatten(1)


def _is_tall(t: Tensor) -> bool:
    rows, columns = _as_matrix(t).shape
    return rows > columns


def _polar(M: Tensor, method: Method) -> Tensor:
    if method == "newton_schulz":
        return newton_schulz(M)
    if method == "polar_express":
        return polar_express(M)
    wide = M.to(torch.promote_types(M.dtype, torch.float32))
    u, sigma, vh = torch.linalg.svd(wide, full_matrices=False)
    # A vanishing singular value has no direction of its own: leave it out, so that zero maps to zero.
    floor = sigma[..., :1] * (torch.finfo(sigma.dtype).eps * max(M.shape[-2:]))
    kept = (sigma > floor).to(sigma.dtype)
    return ((u * kept[..., None, :]) @ vh).to(M.dtype)


def _check(shape: Sequence[int], norm: str, method: str) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r}: must be one of {', '.join(NORMS)}")
    if method not in METHODS:
        raise ValueError(f"method={method!r}: must be one of {', '.join(METHODS)}")
    if norm == "spectral" and len(shape) < 2:
        raise ValueError(f"norm='spectral' needs a matrix, got shape {tuple(shape)}; use 'rms' for a vector")

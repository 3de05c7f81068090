"""The orthogonal polar factor by matrix products alone, batched, in the precision that is fast where it runs.

Every step maps the singular values of ``X`` through an odd quintic, ``X <- a X + (b G + c G^2) X`` with ``G = X X^T``
on the short side, so five steps cost fifteen matrix products and no decomposition.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]

# Tuned for slope at zero, not for convergence: singular values end between about 0.7 and 1.2.
# Source: K. Jordan et al., "Muon", kellerjordan.github.io/posts/muon (also torch.optim.Muon).
MUON_QUINTIC: Coefficients = (3.4445, -4.7750, 2.0315)

# Minimax-optimal composition for bfloat16. Source: Amsel et al., "The Polar Express", arXiv 2505.16932, coefficients
# as in the released code, which also divides the input by POLAR_EXPRESS_SAFETY times its Frobenius norm.
POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
POLAR_EXPRESS_SAFETY = 1.02


@lru_cache(maxsize=1)
def _cpu_multiplies_bfloat16() -> bool:
    # AVX2 and plain AVX-512 emulate bfloat16 products, many times slower than float32 ones.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(probe() for name in probes if (probe := getattr(torch.cpu, name, None)) is not None)


def fast_dtype(M: Tensor) -> torch.dtype:
    """Return the precision in which products of ``M`` are fast on its device.

    The rule: float64 stays float64; on CUDA bfloat16 from compute capability 8.0 on, float32 before; on a CPU bfloat16
    if it has native bfloat16 products (AVX512-BF16 or AMX), else float32; float32 on every other device.

    Args:
        M: any floating-point tensor; only its dtype and device are read.
    """
    if M.dtype == torch.float64:
        return torch.float64
    if M.device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(M.device)[0] >= 8 else torch.float32
    if M.device.type == "cpu" and _cpu_multiplies_bfloat16():
        return torch.bfloat16
    return torch.float32


def newton_schulz(
    M: Tensor, steps: int = 5, coefficients: Coefficients = MUON_QUINTIC, dtype: torch.dtype | None = None
) -> Tensor:
    """Return roughly ``U V^T`` of ``M = U S V^T`` by Muon's Newton-Schulz quintic.

    The singular values of the result lie between about 0.7 and 1.2 rather than at 1. Zero stays zero; a matrix whose
    Frobenius norm is below ``sqrt(tiny)`` of its precision (1e-19 in float32) counts as vanishing and is not blown up.

    Args:
        M: [..., m, n], floating point; leading dimensions are a batch.
        steps: number of iterations, at least 1.
        coefficients: ``(a, b, c)`` of the quintic ``a x + b x^3 + c x^5``.
        dtype: precision of the products; None takes :func:`fast_dtype`.

    Returns:
        [..., m, n] in the dtype of ``M``.

    Raises:
        ValueError: if ``M`` is no matrix, not of a real floating-point type, or ``steps`` is below 1.
    """
    _check(M, steps)
    return _iterate(M, [coefficients] * steps, 1.0, dtype)


def polar_express(M: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``U V^T`` of ``M = U S V^T`` by Polar Express (arXiv 2505.16932), closer to it than :func:`newton_schulz`.

    After five steps singular values down to about 1e-3 of the Frobenius norm end within a few percent of 1. From the
    sixth step on the last polynomial is repeated. Zero stays zero.

    Args:
        M: [..., m, n], floating point; leading dimensions are a batch.
        steps: number of iterations, at least 1.
        dtype: precision of the products; None takes :func:`fast_dtype`.

    Returns:
        [..., m, n] in the dtype of ``M``.

    Raises:
        ValueError: as :func:`newton_schulz`.
    """
    _check(M, steps)
    schedule = [POLAR_EXPRESS[min(k, len(POLAR_EXPRESS) - 1)] for k in range(steps)]
    return _iterate(M, schedule, POLAR_EXPRESS_SAFETY, dtype)


def _check(M: Tensor, steps: int) -> None:
    if M.ndim < 2 or not M.is_floating_point():
        raise ValueError(f"need a real floating-point [..., m, n] tensor, got {M.dtype} of shape {tuple(M.shape)}")
    if steps < 1:
        raise ValueError(f"steps={steps}: must be at least 1")


def _iterate(M: Tensor, schedule: Sequence[Coefficients], safety: float, dtype: torch.dtype | None) -> Tensor:
    if M.numel() == 0:
        return M.clone()
    tall = M.shape[-2] > M.shape[-1]
    x = (M.mT if tall else M).reshape(-1, min(M.shape[-2:]), max(M.shape[-2:]))
    # Normalise before narrowing: float16 gradients would overflow in the norm.
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # Row by row: one float32 sum over a few million squares would be wrong in its fifth digit.
    norm = torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=-1, keepdim=True), dim=-2, keepdim=True) * safety
    x = (x / norm.clamp(min=torch.finfo(x.dtype).tiny ** 0.5)).to(dtype or fast_dtype(M))
    for a, b, c in schedule:
        gram = torch.bmm(x, x.mT)
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    x = x.to(M.dtype)
    return (x.mT if tall else x).reshape(M.shape)

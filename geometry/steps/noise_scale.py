"""Gradient noise scale: the batch size beyond which more samples a step buy little."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class NoiseScale(NamedTuple):
    """Unbiased estimates, unbounded below: average ``grad_sq`` and ``trace`` over steps before dividing them.

    Attributes:
        grad_sq: squared norm of the true gradient.
        trace: trace of the covariance of one sample's gradient.
        noise_scale: ``trace / grad_sq``, in samples; about the critical batch size.
    """

    grad_sq: Tensor
    trace: Tensor
    noise_scale: Tensor


def gradient_noise_scale(small_sq: Tensor, big_sq: Tensor, small_batch: float, big_batch: float) -> NoiseScale:
    """Estimate the simple gradient noise scale of McCandlish et al. (arXiv 1812.06162, appendix A.1).

    ``E||g_B||^2 = |G|^2 + tr(Sigma) / B`` is solved at two batch sizes. The small gradients are at hand without a
    further backward: those of micro-batches or of ranks, whose mean is the big one.

    Args:
        small_sq: squared norm of a gradient over ``small_batch`` samples; the mean over several if there are several.
        big_sq: squared norm of the gradient over ``big_batch`` samples, same shape.
        small_batch: samples behind each small gradient.
        big_batch: samples behind the big one.

    Returns:
        ``(grad_sq, trace, noise_scale)``, each of the inputs' shape. Single estimates may be negative; the ratio of two
        noisy estimates is biased, so average the first two over many steps and divide then.

    Raises:
        ValueError: unless ``0 < small_batch < big_batch``.
    """
    if not 0 < small_batch < big_batch:
        raise ValueError(f"small_batch={small_batch}, big_batch={big_batch}: need 0 < small_batch < big_batch")
    grad_sq = (big_batch * big_sq - small_batch * small_sq) / (big_batch - small_batch)
    trace = (small_sq - big_sq) / (1 / small_batch - 1 / big_batch)
    return NoiseScale(grad_sq, trace, trace / grad_sq)


def pair_signal(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Split two independent estimates of the same gradients into signal and noise, layer by layer.

    For ``a`` and ``b`` of mean ``g`` and independent noise, ``E<a, b> = |g|^2`` and ``E|a - b|^2`` is the sum of their
    two total variances.

    Args:
        first: one estimate, a tensor a layer.
        second: the other, same shapes.

    Returns:
        ``(signal, distance)``, both [layers] in float32 or wider: ``<a, b>``, which may be negative in a single pair,
        and ``|a - b|^2``.
    """
    pairs = [(_wide(a), _wide(b)) for a, b in zip(first, second, strict=True)]
    signal = torch.stack([torch.sum(a * b) for a, b in pairs])
    distance = torch.stack([torch.linalg.vector_norm(a - b).square() for a, b in pairs])
    return signal, distance


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))

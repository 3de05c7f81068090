"""Gradient noise of layers, and the learning-rate ratios that follow from it (LANTON, arXiv 2510.14009).

A layer whose gradient is noisy in the dual norm takes a smaller step than the least noisy layer of its norm group.
"""

from typing import Literal

import torch
from torch import Tensor


def noise_ratios(H: Tensor, alpha: float | Literal["auto"] = "auto", power: float = 0.5) -> Tensor:
    """Return the factor of each layer's learning rate within one norm group.

    With ``a_l = alpha / sqrt(alpha^2 + H_l)`` the ratio is ``(a_l / max_j a_j)^power``: exactly 1 for the least noisy
    layer (and for a layer alone), falling to ``(H_min / H_l)^(power/2)`` as ``alpha -> 0``, and to 1 everywhere as
    ``alpha -> inf``. The form with ``power=0.5`` is the paper's Algorithm 1 as reported by others; the exponent and
    the maximum over the group were not checked against its text.

    Args:
        H: [layers], running mean of the squared dual norm of the noise, not negative.
        alpha: noise level (in units of ``sqrt(H)``) above which a layer is slowed. ``"auto"`` takes the root of the
            (lower) median of the positive ``H``, which makes the ratios blind to a common scale of the gradients;
            that choice is ours. A number is the paper's form and depends on loss scale, batch size and width.
        power: 0 turns the method off (all ratios exactly 1).

    Returns:
        [layers] in (0, 1], float32 or wider; NaN where ``H`` is.

    Raises:
        ValueError: if ``alpha`` is neither ``"auto"`` nor a positive number, ``power`` is negative, or ``H`` is not 1D.
    """
    if isinstance(alpha, str):
        if alpha != "auto":
            raise ValueError(f"alpha={alpha!r}: must be 'auto' or a positive number")
    elif not 0 < alpha < float("inf"):
        raise ValueError(f"alpha={alpha}: must be 'auto' or a positive finite number")
    if not power >= 0:
        raise ValueError(f"power={power}: must not be negative")
    if H.ndim != 1:
        raise ValueError(f"H must be [layers], got shape {tuple(H.shape)}")
    if H.numel() == 0:
        return H.clone()
    noise = H.to(torch.promote_types(H.dtype, torch.float32))
    if alpha == "auto":
        # Layers without noise say nothing about its level; nanmedian keeps this free of host syncs.
        floor = torch.where(noise > 0, noise, torch.nan).nanmedian().nan_to_num(nan=0.0)
    else:
        floor = torch.full_like(noise[0], float(alpha) ** 2)
    total = floor + noise
    ratio = (total.min() / total) ** (power / 2)
    # 0/0: nothing is noisy. A ratio that underflows still must not stop a layer for good.
    ratio = torch.where(total == 0, 1.0, ratio.clamp(min=torch.finfo(ratio.dtype).tiny))
    return torch.where(noise.isnan(), noise, ratio)


def noise_ema(H: Tensor, sample: Tensor, decay: float = 0.9, every: int = 1) -> Tensor:
    """Return the running mean of the noise after one more sample.

    ``H <- d H + (1 - d) sample`` with ``d = decay^every``, so that the memory in steps stays the same when only every
    k-th step is measured. ``sample`` is the squared dual norm of a difference of two gradients: of consecutive steps
    (twice the noise, plus the drift of the mean), or of half-batches A, B as ``(A - B)/2`` (the noise of the batch).

    Args:
        H: [layers], the mean so far; zeros at the start.
        sample: [layers], the new squared dual norms, same unit.
        decay: per step, in [0, 1).
        every: steps between two samples, at least 1.

    Returns:
        [layers], a new tensor.

    Raises:
        ValueError: if ``decay`` or ``every`` is out of range, or the shapes differ.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay}: must be in [0, 1)")
    if every < 1:
        raise ValueError(f"every={every}: must be at least 1")
    if H.shape != sample.shape:
        raise ValueError(f"shapes differ: H {tuple(H.shape)}, sample {tuple(sample.shape)}")
    kept = decay**every
    return kept * H + (1 - kept) * sample

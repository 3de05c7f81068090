"""Advantages of completions from their rewards, group by group."""

from typing import Literal

import torch
from torch import Tensor

Baseline = Literal["mean", "median", "leave_one_out"]
Scale = Literal["group", "batch", "none"]


def group_advantages(
    rewards: Tensor, baseline: Baseline = "mean", scale: Scale = "group", eps: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """Return how much better each completion is than those of the same prompt.

    Completions without a reward (NaN) get an advantage of 0 and count nowhere. A group whose rewards are all equal has
    advantages of exactly 0.

    Args:
        rewards: [prompts, completions of each]; NaN where there is none.
        baseline: what is subtracted: the group's ``"mean"`` (GRPO, arXiv 2402.03300), its ``"median"`` (for two middle
            values the lower), or the mean of the others, ``"leave_one_out"`` (RLOO, arXiv 2402.14740).
        scale: divide by the standard deviation within the ``"group"``, over the ``"batch"``, or by nothing
            (``"none"``, Dr. GRPO, arXiv 2503.20783).
        eps: added to that standard deviation.

    Returns:
        Advantages, the shape of ``rewards``; and per group whether all its rewards are equal (or missing).

    Raises:
        ValueError: if ``rewards`` is not a matrix, or an option is unknown.
    """
    if rewards.ndim != 2:
        raise ValueError(f"rewards {tuple(rewards.shape)}: one row per prompt, one column per completion")
    known = rewards.isfinite()
    count = known.sum(1, keepdim=True)
    clean = torch.where(known, rewards, 0.0)
    mean = clean.sum(1, keepdim=True) / count.clamp(min=1)
    top = torch.where(known, rewards, -torch.inf).amax(1, keepdim=True)
    low = torch.where(known, rewards, torch.inf).amin(1, keepdim=True)
    equal = (top <= low) | (count < 2)
    if baseline == "mean":
        centred = clean - mean
    elif baseline == "median":
        centred = clean - torch.where(known, rewards, torch.nan).nanmedian(1, keepdim=True).values.nan_to_num()
    elif baseline == "leave_one_out":
        centred = (clean - mean) * count / (count - 1).clamp(min=1)
    else:
        raise ValueError(f"baseline={baseline!r}: 'mean', 'median' or 'leave_one_out'")
    centred = torch.where(known & ~equal, centred, 0.0)
    if scale == "group":
        spread = (torch.where(known, clean - mean, 0.0).square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (spread + eps)
    elif scale == "batch":
        values = rewards[known]
        centred = centred / ((values.std() if len(values) > 1 else values.new_zeros(())) + eps)
    elif scale != "none":
        raise ValueError(f"scale={scale!r}: 'group', 'batch' or 'none'")
    return centred, equal.squeeze(1)

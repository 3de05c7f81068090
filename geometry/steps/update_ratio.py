"""Size of an update relative to the weights it changes."""

import torch
from torch import Tensor


def update_ratio(before: Tensor, after: Tensor) -> Tensor:
    """Return ``||after - before|| / ||before||``, the relative size of one update.

    A healthy Adam run sits near 1e-3; above 1e-2 the linear model of the step is doubtful.

    Args:
        before: weights before the step, any shape.
        after: weights after it, same shape.

    Returns:
        Unitless scalar in float32 or wider; ``inf`` where zero weights moved, ``0`` where nothing moved.

    Raises:
        ValueError: if the shapes differ.
    """
    if before.shape != after.shape:
        raise ValueError(f"shapes differ: {tuple(before.shape)} before the step, {tuple(after.shape)} after it")
    wide = torch.promote_types(before.dtype, torch.float32)
    moved = torch.linalg.vector_norm(after.to(wide) - before.to(wide))
    size = torch.linalg.vector_norm(before, dtype=wide)
    return torch.where(moved == 0, moved, moved / size)

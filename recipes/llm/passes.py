"""The share of problems solved in k tries."""

import torch
from torch import Tensor


def pass_at_k(passed: Tensor, k: int) -> Tensor:
    """Return the unbiased estimate of the chance that one of k tries passes (arXiv 2107.03374, eq. 1), a problem.

    Args:
        passed: whether each try passed [problems, tries].
        k: at most the number of tries.

    Returns:
        ``1 - C(n - c, k) / C(n, k)`` for c of n tries passed [problems], float64.

    Raises:
        ValueError: if there are fewer than k tries.
    """
    n = passed.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k={k}: pass@k from {n} tries needs 1 <= k <= {n}")
    failed = (n - passed.sum(1)).double().unsqueeze(1)
    i = torch.arange(k, dtype=torch.float64, device=passed.device)
    return 1 - ((failed - i).clamp(min=0) / (n - i)).prod(1)

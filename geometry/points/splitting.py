"""When a Gaussian is divided."""

import torch
from torch import Tensor


def split_threshold(step: int, total: int, first: float = 0.1, last: float = 0.3) -> float:
    """Return ``first + (last - first) step / total``: the surface variation that a split needs.

    GTLR-GS, arXiv 2603.23192, equation 6, as a reproduction cites it: permissive early, nearly closed late (surface
    variation is at most 1/3).
    """
    return first + (last - first) * min(1.0, max(0.0, step / max(1, total)))


def admit(priority: Tensor, cost: Tensor, room: int) -> Tensor:
    """Return the indices of the candidates that fit into ``room``, most important first.

    Args:
        priority: [M]; candidates of equal priority keep their order.
        cost: rows that each adds [M], at least 1.
        room: rows that may be added.
    """
    order = torch.argsort(priority, descending=True, stable=True)
    return order[cost[order].cumsum(0) <= room]

"""Work that every rank could do alone, shared out: each does a part, and one small reduction tells all of them."""

import heapq
from collections.abc import Mapping

import lightning as L
from torch import Tensor


def shared_out(costs: Mapping[str, float], ranks: int) -> dict[str, int]:
    """Say which rank does which piece of work: the dearest first, each to the rank with least to do so far.

    Every rank that calls this with the same costs gets the same answer. No rank's load exceeds the mean by more than
    the dearest piece.

    Args:
        costs: by name, in any unit.
        ranks: how many there are.

    Returns:
        Name to rank, for every name.
    """
    loads = [(0.0, rank) for rank in range(ranks)]
    owner: dict[str, int] = {}
    for name in sorted(costs, key=lambda n: -costs[n]):  # stable: pieces of one cost keep their order
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + costs[name], rank))
        owner[name] = rank
    return owner


def joined(values: Tensor, trainer: L.Trainer) -> Tensor:
    """Return values of which each is zero on all ranks but one, the same bits on every rank: adding zeros is exact."""
    if trainer.world_size == 1:
        return values
    total = trainer.strategy.reduce(values.clone(), reduce_op="sum")
    assert isinstance(total, Tensor)
    return total

"""Work that every rank could do alone, shared out: each does a part, and one small reduction tells all of them."""

import heapq
from collections.abc import Mapping

import lightning as L
import torch
import torch.distributed as dist
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


def sent_to_owners(parts: Mapping[str, Tensor], owner: Mapping[str, int]) -> dict[str, list[Tensor]]:
    """Return every rank's part of the tensors that this rank owns: each part travels once, to its owner alone.

    Args:
        parts: what this rank holds of every tensor, flat; all ranks name the same tensors.
        owner: rank by name.

    Returns:
        For each name that is this rank's, one flat tensor a rank, in the order of ranks.
    """
    ranks, me = dist.get_world_size(), dist.get_rank()
    some = next(iter(parts.values()))
    order = sorted(parts, key=lambda n: owner[n])  # stable: one owner's tensors lie together, the same on all ranks
    lengths = torch.tensor([parts[n].numel() for n in order], device=some.device)
    everyones = lengths.new_empty(ranks, len(order))
    dist.all_gather(list(everyones.unbind()), lengths)
    held = [dict(zip(order, row, strict=True)) for row in everyones.tolist()]
    mine = [n for n in order if owner[n] == me]
    outgoing = torch.cat([parts[n] for n in order])
    leaving = [sum(held[me][n] for n in order if owner[n] == rank) for rank in range(ranks)]
    arriving = [sum(theirs[n] for n in mine) for theirs in held]
    incoming = outgoing.new_empty(sum(arriving))
    dist.all_to_all_single(incoming, outgoing, arriving, leaving)
    pieces: dict[str, list[Tensor]] = {n: [] for n in mine}
    for theirs, sent in zip(held, incoming.split(arriving), strict=True):
        for n, piece in zip(mine, sent.split([theirs[n] for n in mine]) if mine else (), strict=True):
            pieces[n].append(piece)
    return pieces

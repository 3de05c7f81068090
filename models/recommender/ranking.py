"""Where the right item stands among all items, and who comes first, without an array of all scores."""

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 16384
USERS = 128


def target_ranks(
    queries: Tensor, table: Tensor, targets: Tensor, seen: Tensor | None = None, block: int = BLOCK
) -> Tensor:
    """Return the place of each target among all items by ``<query, item>``, from 1.

    Of equal scores the lower item index comes first. Scores of at most ``block`` items and 128 queries stand at once.
    (Beyond one block, a target's own score and its equals' may differ in the last bit, as products of another shape
    do.)

    Args:
        queries: [m, d].
        table: [n, d].
        targets: [m], in ``[0, n)``.
        seen: items that do not count, padded with n or more, [m, s]; a target always counts.
        block: items at once.

    Returns:
        [m], int64.
    """
    return torch.cat([
        _ranks(q, table, t, None if seen is None else seen[i * USERS : (i + 1) * USERS], block)
        for i, (q, t) in enumerate(zip(queries.split(USERS), targets.split(USERS), strict=True))
    ])  # fmt: skip


def _ranks(queries: Tensor, table: Tensor, targets: Tensor, seen: Tensor | None, block: int) -> Tensor:
    m, n = len(queries), len(table)
    whole = n <= block
    own = None if whole else (queries * table[targets]).sum(1, keepdim=True)
    before = torch.zeros(m, dtype=torch.long, device=queries.device)
    place = torch.arange(m, device=queries.device)
    buffer = queries.new_empty(m * min(block, n))
    for start in range(0, n, block):
        rows = table[start : start + block]
        scores = torch.mm(queries, rows.T, out=buffer[: m * len(rows)].view(m, len(rows)))
        if own is None:
            own = scores.gather(1, targets[:, None])
        here = (targets >= start) & (targets < start + len(rows))
        if not whole:  # never counted against itself, however it was rounded
            scores[place[here], targets[here] - start] = float("-inf")
        if seen is not None:
            _hide(scores, seen, start)
        before += _count_above(scores, own, targets - start)
    return before + 1


def _hide(scores: Tensor, seen: Tensor, start: int) -> None:
    """Give the seen items of this block the lowest score."""
    at = seen - start
    inside = (at >= 0) & (at < scores.shape[1])
    user = torch.arange(len(seen), device=seen.device)[:, None].expand_as(at)
    scores[user[inside], at[inside]] = float("-inf")


def _count_above(scores: Tensor, own: Tensor, place: Tensor) -> Tensor:
    """Count scores above the target's, and equal ones before it; ``place`` is the target's column, maybe outside."""
    above = scores.sub_(own)
    # The sign summed in floating point is several times faster than a comparison counted as integers; a block is far
    # below 2^24, so it is exact.
    total = above.sign_().sum(1)  # above minus below
    zeros = scores.shape[1] - above.abs_().sum(1)
    greater = (total + scores.shape[1] - zeros) / 2
    equal = torch.zeros_like(total, dtype=torch.long)
    for i in (zeros > 0).nonzero().flatten().tolist():
        equal[i] = (above[i, : max(int(place[i]), 0)] == 0).sum()
    return greater.round().long() + equal


def top_items(
    queries: Tensor, table: Tensor, k: int, seen: Tensor | None = None, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Return scores and items of the ``k`` best, [m, k] each, best first; seen items left out.

    Where fewer than ``k`` are left, scores are ``-inf`` and items -1.
    """
    best = queries.new_full((len(queries), k), float("-inf"))
    items = torch.full((len(queries), k), -1, dtype=torch.long, device=queries.device)
    for start in range(0, len(table), block):
        scores = queries @ table[start : start + block].T
        if seen is not None:
            _hide(scores, seen, start)
        found, at = scores.topk(min(k, scores.shape[1]), dim=1)
        best, order = torch.cat([best, found], 1).topk(k, dim=1)
        items = torch.cat([items, at + start], 1).gather(1, order)
    return best, items.masked_fill(best == float("-inf"), -1)


def ranking_metrics(ranks: Tensor, ks: Sequence[int]) -> dict[str, Tensor]:
    """Return ``hr@k``, ``ndcg@k`` and ``mrr@k`` of one right item a case, each averaged over cases, from ranks [m]."""
    r = ranks.double()
    result: dict[str, Tensor] = {}
    for k in ks:
        hit = (r <= k).double()
        result[f"hr@{k}"] = hit.mean()
        result[f"ndcg@{k}"] = (hit / torch.log2(r + 1)).mean()
        result[f"mrr@{k}"] = (hit / r).mean()
    return result

"""Losses of a query against the item table: all items, or a sample of them."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from evolute.models.recommender.items import LookedUp

Loss = Literal["full", "sampled", "bce", "bpr"]
LOSSES: tuple[Loss, ...] = ("full", "sampled", "bce", "bpr")
LOGITS = 1 << 25
"""Most logits held at once: 128 MB in float32."""


def item_loss(
    loss: Loss,
    queries: Tensor,
    table: Tensor | LookedUp,
    targets: Tensor,
    negatives: int = 256,
    log_q: Tensor | None = None,
) -> Tensor:
    """Return the mean loss of queries.

    - ``"full"``: softmax over all items, see :func:`cross_entropy`;
    - ``"sampled"``: softmax over the target and ``negatives`` items drawn for the whole batch;
    - ``"bce"``: target against 1, ``negatives`` items drawn a query against 0, each weighing ``1 / negatives``;
    - ``"bpr"``: ``-log sigmoid(s_target - s_negative)``.

    Args:
        loss: its name.
        queries: [m, d].
        table: [n, d]; only ``"full"`` needs all of it.
        targets: item of each query, [m].
        negatives: how many are drawn.
        log_q: logarithms of the probabilities to draw items with, [n]; ``"sampled"`` and ``"bce"`` subtract them
            from the logits (Bengio and Senecal 2008), so that popular items are not punished for being drawn. None
            draws evenly.
    """
    if isinstance(table, Tensor) and loss == "full":
        return cross_entropy(queries, table, targets)
    m, n = len(queries), len(table)
    count = negatives if loss == "sampled" else m * negatives
    if log_q is None:
        drawn = torch.randint(n, (count,), device=table.device)
    else:
        drawn = torch.multinomial(log_q.exp(), count, replacement=True)
    correction = torch.zeros(n, device=table.device) if log_q is None or loss == "bpr" else log_q
    positive = (queries * table[targets]).sum(1) - correction[targets]
    if loss == "sampled":
        logits = queries @ table[drawn].T - correction[drawn]
        logits = logits.masked_fill(drawn == targets[:, None], float("-inf"))
        return F.cross_entropy(torch.cat([positive[:, None], logits], 1), torch.zeros_like(targets))
    drawn = drawn.view(m, negatives)
    logits = torch.einsum("md,mkd->mk", queries, table[drawn]) - correction[drawn]
    if loss == "bpr":
        return -F.logsigmoid(positive[:, None] - logits).mean()
    missed = (drawn != targets[:, None]).to(logits.dtype)
    return (F.softplus(-positive) + (F.softplus(logits) * missed).mean(1)).mean()


def cross_entropy(queries: Tensor, table: Tensor, targets: Tensor, limit: int = LOGITS) -> Tensor:
    """Return the mean of ``logsumexp_i <q, e_i> - <q, e_target>`` over all items, in float32 or wider.

    Above ``limit`` logits they are made block by block, in the backward pass once more, and never stand together:
    memory is that of one block. Only the small case can be differentiated twice.

    Args:
        queries: [m, d].
        table: [n, d].
        targets: [m].
        limit: most logits held at once.
    """
    if len(queries) * len(table) <= limit:
        logits = queries @ table.T
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)
    return _Blockwise.apply(queries, table, targets, max(1, limit // len(queries)))  # pyright: ignore


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, table: Tensor, targets: Tensor, block: int) -> Tensor:  # pyright: ignore
        wide = torch.promote_types(queries.dtype, torch.float32)
        total = torch.full((len(queries),), float("-inf"), dtype=wide, device=queries.device)
        for rows in table.split(block):
            total = torch.logaddexp(total, torch.logsumexp((queries @ rows.T).to(wide), 1))
        ctx.save_for_backward(queries, table, targets, total)
        ctx.block = block
        return (total - (queries * table[targets]).sum(1).to(wide)).mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore
        queries, table, targets, total = ctx.saved_tensors
        scale = grad / len(queries)
        to_queries = -scale.to(queries.dtype) * table[targets]
        to_table = torch.zeros_like(table)
        start = 0
        for rows in table.split(ctx.block):
            p = (torch.exp((queries @ rows.T).to(total.dtype) - total[:, None]) * scale).to(queries.dtype)
            to_queries.addmm_(p, rows)
            torch.mm(p.T, queries, out=to_table[start : start + len(rows)])
            start += len(rows)
        to_table.index_add_(0, targets, -scale.to(queries.dtype) * queries)
        return to_queries, to_table, None, None

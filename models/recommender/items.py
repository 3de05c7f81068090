"""The item table: free, or made from frozen vectors by an adapter."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from evolute.geometry import Adapter, text_adapter


class ItemEmbedding(nn.Embedding):
    """One row an item, and after the last item rows of zeros: padding, and what an encoder asks for besides.

    Args:
        table: first values, [n, d].
        extra: rows after the padding row (a mask token), drawn small.
        freeze: do not train it.
    """

    def __init__(self, table: Tensor, extra: int = 0, freeze: bool = False) -> None:
        n, d = table.shape
        super().__init__(n + 1 + extra, d, padding_idx=n)
        with torch.no_grad():
            self.weight[:n] = table
            self.weight[n + 1 :].normal_(std=0.02)
        self.weight.requires_grad_(not freeze)


class AdaptedItems(nn.Module):
    """Text vectors, mapped to the width of the model by a trained adapter.

    The output is the item vector that everything else sees. An adapter makes norms of its own, so that a table
    normalised before it is not normalised after it: what normalises must act on the output of this module.

    Args:
        vectors: [n, D].
        dim: width of the output.
        adapter: see :func:`evolute.geometry.text_adapter`.
        freeze: do not train the vectors themselves.
        extra: see :class:`ItemEmbedding`.
    """

    def __init__(self, vectors: Tensor, dim: int, adapter: Adapter, freeze: bool = True, extra: int = 0) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors.clone(), requires_grad=not freeze)
        self.adapter = text_adapter(adapter, vectors.shape[1], dim)
        self.extra = nn.Parameter(0.02 * torch.randn(extra, dim)) if extra else None
        self.num_embeddings, self.embedding_dim, self.padding_idx = len(vectors) + 1 + extra, dim, len(vectors)

    @override
    def forward(self, ids: Tensor) -> Tensor:
        """Return rows [..., dim] of ids [...]."""
        n = self.padding_idx
        rows = self.adapter(F.embedding(ids.clamp(max=n - 1), self.vectors))
        rows = rows * (ids < n)[..., None]
        if self.extra is not None:
            special = F.embedding((ids - n - 1).clamp(min=0), self.extra)
            rows = torch.where((ids > n)[..., None], special, rows)
        return rows


def all_items(items: Any, lookup: bool = False) -> Tensor:
    """Return the rows of all items, [n, d], as the model uses them: normalised, if something normalises them.

    Args:
        items: an :class:`ItemEmbedding` or :class:`AdaptedItems`.
        lookup: look them up, for what only hooks on a look-up do to them; their memory is that of the table again.
    """
    n = items.padding_idx
    if isinstance(items, nn.Embedding) and not lookup:
        return items.weight[:n]
    return items(torch.arange(n, device=next(items.parameters()).device))


class LookedUp:
    """The rows of all items, for losses that want a few of them: ``len(rows)`` and ``rows[ids]``, never all."""

    def __init__(self, items: Any) -> None:
        self.items, self.device = items, next(items.parameters()).device

    def __len__(self) -> int:
        return self.items.padding_idx

    def __getitem__(self, ids: Tensor) -> Tensor:
        return self.items(ids)

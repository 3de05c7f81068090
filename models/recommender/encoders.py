"""Encoders of a sequence of item vectors: one output vector a position."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from typing_extensions import override


class GRU4Rec(nn.Module):
    """Gated recurrent network (Hidasi et al. 2016, arXiv 1511.06939), trained at every position.

    Args:
        dim: width of the item vectors.
        hidden: width of the state.
        layers: layers of the network.
        dropout: on the inputs.
    """

    objective = "causal"
    extra = 0

    def __init__(self, dim: int = 64, hidden: int = 128, layers: int = 1, dropout: float = 0.3) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.gru = nn.GRU(dim, hidden, layers, batch_first=True)
        self.out = nn.Linear(hidden, dim)

    @override
    def forward(self, x: Tensor, real: Tensor, at: Tensor | None = None) -> Tensor:
        """Return [b, t, dim]: position ``t`` has seen inputs up to ``t``.

        Args:
            x: item vectors, [b, t, dim].
            real: which positions hold an item, [b, t]; padding is on the right, so nothing sees it.
            at: one position of each sequence, [b]: only these are returned, [b, dim], at less cost.
        """
        if at is None:
            return self.out(self.gru(self.dropout(x))[0])
        # The state there is the last one of a sequence that ends there: what comes later is not run through.
        until = pack_padded_sequence(self.dropout(x), (at + 1).cpu(), batch_first=True, enforce_sorted=False)
        return self.out(self.gru(until)[1][-1])


def _rows(at: Tensor) -> Tensor:
    return torch.arange(len(at), device=at.device)


class Block(nn.Module):
    """A transformer block that normalises before attention and before its feed-forward part."""

    def __init__(self, dim: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.norm_a, self.norm_f = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.feed = nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim))
        self.dropout = nn.Dropout(dropout)

    @override
    def forward(self, x: Tensor, mask: Tensor | None, at: Tensor | None = None) -> Tensor:
        """Return [b, t, dim], or [b, 1, dim] at one position each; without a mask, one sees itself and those before."""
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm_a(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if at is not None:
            x, q = x[_rows(at), at][:, None], q[_rows(at), :, at][:, :, None]
            if mask is None:
                mask = (torch.arange(t, device=at.device) <= at[:, None])[:, None, None]
        rate = self.rate if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate, is_causal=mask is None)
        x = x + self.dropout(self.proj(seen.transpose(1, 2).reshape(b, -1, d)))
        return x + self.dropout(self.feed(self.norm_f(x)))


class _Transformer(nn.Module):
    extra = 0

    def __init__(
        self,
        dim: int = 64,
        max_len: int = 50,
        layers: int = 2,
        heads: int = 2,
        inner: int = 256,
        dropout: float = 0.2,
        head: bool = True,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads={heads} must divide dim={dim}")
        if layers < 1:
            raise ValueError(f"layers={layers}: must be at least 1")
        self.scale = math.sqrt(dim)
        self.position = nn.Parameter(torch.empty(max_len + 1, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, inner, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, dim) if head else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.position, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def _encode(self, x: Tensor, mask: Tensor | None, at: Tensor | None) -> Tensor:
        x = self.dropout(self.scale * x + self.position[: x.shape[1]])
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x = block(x, mask, at if i == last else None)  # the last one need not finish what nobody reads
        return self.head(self.norm(x if at is None else x[:, 0]))


class SASRec(_Transformer):
    """Causal self-attention (Kang and McAuley 2018, arXiv 1808.09781), pre-norm.

    With tied item vectors the residual stream carries the last item to the output, and the first prediction is that
    item again: under cosine logits, all the more so as the temperature is low. ``head``, a linear map after the last
    norm, starts without that preference.

    Args:
        dim: width of the item vectors.
        max_len: longest sequence.
        layers: blocks.
        heads: of attention.
        inner: width of the feed-forward part.
        dropout: on inputs, attention and residuals.
        head: see above; False is the published model.
    """

    objective = "causal"

    @override
    def forward(self, x: Tensor, real: Tensor, at: Tensor | None = None) -> Tensor:
        """Return [b, t, dim], or [b, dim]; arguments as for :class:`GRU4Rec`."""
        return self._encode(x, None, at)


class BERT4Rec(_Transformer):
    """Attention in both directions, trained on masked items (Sun et al. 2019, arXiv 1904.06690).

    The mask token is the row after the padding row of the item table. Arguments as for :class:`SASRec`.
    """

    objective = "masked"
    extra = 1

    @override
    def forward(self, x: Tensor, real: Tensor, at: Tensor | None = None) -> Tensor:
        """Return [b, t, dim], or [b, dim]; arguments as for :class:`GRU4Rec`."""
        return self._encode(x, real[:, None, None, :], at)

"""A lean decoder for Llama-like models: what ``generate`` does to small ones is mostly overhead."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evolute.recipes.llm.finetune import effective_weight

FAMILIES = ("llama", "qwen2")
ROPES = ("default", "llama3", "linear")
SHORT, LONG = 32, 256
"""Tokens in a cache, and in a prompt, from which torch's own kernels pay."""
LOWEST = -1e30


class LlamaDecoder:
    """One token at a time with a preallocated key-value cache, on the model's own weights.

    Queries, keys and values are one product, gate and up another; adapters are merged first; finished rows can leave.
    Takes a copy of the matrices of each layer, so it lives for one rollout: weights that move later are not seen.

    Args:
        model: a Hugging Face causal LM for which :meth:`serves` holds.
    """

    shares = True

    @staticmethod
    def serves(model: Any) -> bool:
        """Say whether the model is a whole, plain Llama or Qwen2 with full attention and a fixed rotary table."""
        config = model.config
        rope: Any = getattr(config, "rope_parameters", None) or {}
        return (
            config.model_type in FAMILIES
            and getattr(config, "hidden_act", "") == "silu"
            and not getattr(config, "use_sliding_window", False)
            and rope.get("rope_type", "default") in ROPES
            and all(type(p) is nn.Parameter and p.numel() for p in model.parameters())
        )

    def __init__(self, model: Any) -> None:
        body, config = model.model, model.config
        self.device = body.embed_tokens.weight.device
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.rotary = body.rotary_emb
        self.embedding = body.embed_tokens.weight
        self.norm = body.norm.weight, body.norm.variance_epsilon
        self.head = effective_weight(model.lm_head)
        self.layers = [_layer(block) for block in body.layers]

    def read(self, prompts: Tensor, starts: Tensor, tokens: int) -> Tensor:
        """Read prompts and return the logits of the first token after each, ``[n, vocab]``.

        Args:
            prompts: ids, padded on the left [n, S].
            starts: where each begins [n].
            tokens: completions grow no longer than this.
        """
        n, width = prompts.shape
        places = torch.arange(width + tokens, device=self.device)
        self.cos, self.sin = (t[0] for t in self.rotary(self.embedding, places.unsqueeze(0)))
        # Added to scores: padding is not seen. Padding itself, which sees nothing, attends evenly to what it may not.
        self.starts, self.at = starts, 0
        self.bias = torch.where(places >= starts.unsqueeze(1), 0.0, LOWEST).unsqueeze(1) if starts.any() else None
        shape = (n, self.kv_heads, width + tokens, self.size)
        self.cache = [(self.embedding.new_empty(shape), self.embedding.new_empty(shape)) for _ in self.layers]
        positions = (places[:width] - starts.unsqueeze(1)).clamp(min=0)
        return self._run(prompts, positions)[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; one may be there several times."""
        self.cache = [(keys.index_select(0, rows), values.index_select(0, rows)) for keys, values in self.cache]
        self.starts = self.starts[rows]
        self.bias = None if self.bias is None else self.bias[rows]

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to every row and return the next logits, ``[n, vocab]``."""
        return self._run(tokens.unsqueeze(1), (self.at - self.starts).unsqueeze(1))[:, -1]

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = F.embedding(ids, self.embedding)
        cos, sin = (t[positions].unsqueeze(2) for t in (self.cos, self.sin))
        end = self.at + ids.shape[1]
        for (qkv, out, gate_up, down, norms), cache in zip(self.layers, self.cache, strict=True):
            x = x + self._attend(_rms(x, *norms[0]), qkv, out, cos, sin, tuple(part[:, :, :end] for part in cache))
            gate, up = F.linear(_rms(x, *norms[1]), *gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate).mul_(up), *down)
        self.at = end
        return F.linear(_rms(x[:, -1:], *self.norm), *self.head)

    def _attend(self, x: Tensor, qkv: Any, out: Any, cos: Tensor, sin: Tensor, cache: Any) -> Tensor:
        n, t = x.shape[:2]
        heads = F.linear(x, *qkv).view(n, t, self.heads + 2 * self.kv_heads, self.size)
        turned, v = heads[:, :, : self.heads + self.kv_heads], heads[:, :, self.heads + self.kv_heads :]
        one, two = turned.chunk(2, -1)
        turned = (turned * cos).addcmul_(torch.cat((-two, one), -1), sin).transpose(1, 2)
        cache[0][:, :, self.at :], cache[1][:, :, self.at :] = turned[:, self.heads :], v.transpose(1, 2)
        y = self._look(turned[:, : self.heads], *cache)
        return F.linear(y.transpose(1, 2).reshape(n, t, -1), *out)

    def _look(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend to the cache: small products, where a fused kernel costs more than it saves.

        Args:
            q: queries [n, heads, t, d].
            keys: of all tokens so far [n, kv_heads, end, d].
            values: likewise.
        """
        n, _, t, end = *q.shape[:3], keys.shape[2]
        if t > LONG:
            return F.scaled_dot_product_attention(
                q, keys, values, attn_mask=self._seen(t, end), is_causal=self.bias is None, enable_gqa=True
            )
        # Three dimensions: a product of slices of the cache then copies nothing.
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        scores = torch.bmm(q.reshape(len(keys), -1, self.size), keys.transpose(1, 2)).mul_(self.size**-0.5)
        if t > 1:
            scores.view(n, self.heads, t, end).add_(torch.full((t, end), LOWEST, device=self.device).triu_(1))
        if self.bias is not None:
            scores.view(n, -1, end).add_(self.bias[..., :end])
        if end >= SHORT:
            y = torch.bmm(scores.softmax(-1), values)
        else:  # torch's softmax and products are slow over so few
            chances = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
            chances /= chances.sum(-1, keepdim=True)
            one = chances.shape[1] == 1
            y = (values * chances.transpose(1, 2)).sum(1, keepdim=True) if one else torch.bmm(chances, values)
        return y.view(n, self.heads, t, self.size)

    def _seen(self, t: int, end: int) -> Tensor | None:
        """Return what the fused kernel adds to the scores of a padded batch [n, 1, t, end]; None without padding."""
        if self.bias is None:
            return None
        return self.bias[:, None, :, :end] + torch.full((t, end), LOWEST, device=self.device).triu(1)


def _layer(block: Any) -> tuple[Any, Any, Any, Any, Any]:
    attention, mlp = block.self_attn, block.mlp
    norms = [(n.weight, n.variance_epsilon) for n in (block.input_layernorm, block.post_attention_layernorm)]
    return (
        _joined(attention.q_proj, attention.k_proj, attention.v_proj),
        effective_weight(attention.o_proj),
        _joined(mlp.gate_proj, mlp.up_proj),
        effective_weight(mlp.down_proj),
        norms,
    )


def _joined(*linears: Any) -> tuple[Tensor, Tensor | None]:
    """Return several linear layers of one input as one."""
    parts = [effective_weight(linear) for linear in linears]
    biases = [b for _, b in parts if b is not None]
    return torch.cat([w for w, _ in parts]), torch.cat(biases) if len(biases) == len(parts) else None


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)

"""A lean decoder for Llama-like models: what ``generate`` does to small ones is mostly overhead."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evolute.recipes.llm.finetune import effective_weight

FAMILIES = ("llama", "qwen2")
ROPES = ("default", "llama3", "linear")


class LlamaDecoder:
    """One token at a time with a preallocated key-value cache, on the model's own weights.

    Queries, keys and values are one product, gate and up another; adapters are merged first; finished rows can leave.
    Takes a copy of the matrices of each layer, so it lives for one rollout: weights that move later are not seen.

    Args:
        model: a Hugging Face causal LM for which :meth:`serves` holds.
    """

    keeps_rows = False

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

    def read(self, prompts: Tensor, starts: Tensor, tokens: int, group_size: int) -> Tensor:
        """Read prompts once and return the logits of the first token of every completion, ``[n * group_size, vocab]``.

        Args:
            prompts: ids, padded on the left [n, S].
            starts: where each begins [n].
            tokens: completions grow no longer than this.
            group_size: completions of each prompt.
        """
        n, width = prompts.shape
        places = torch.arange(width, device=self.device)
        valid = places >= starts.unsqueeze(1)
        causal = places.unsqueeze(1) >= places
        # Padding sees itself, so that no row of the softmax is empty; nothing sees padding.
        self.mask = None
        if bool((starts > 0).any()):
            self.mask = (causal & valid.unsqueeze(1)) | torch.eye(width, dtype=torch.bool, device=self.device)
            self.mask = self.mask.unsqueeze(1)
        longest = torch.arange(width + tokens, device=self.device).unsqueeze(0)
        self.cos, self.sin = (t[0] for t in self.rotary(self.embedding, longest))
        shape = (len(self.layers), 2, n, self.kv_heads, width + tokens, self.size)
        self.cache = self.embedding.new_empty(shape)
        self.at, self.width = 0, width
        positions = (places - starts.unsqueeze(1)).clamp(min=0)
        scores = self._run(prompts, positions)[:, -1]
        self.starts = starts
        if group_size > 1:
            self.keep(torch.arange(n, device=self.device).repeat_interleave(group_size))
            scores = scores.repeat_interleave(group_size, 0)
        self.mask = None
        if bool((starts > 0).any()):
            self.valid = torch.arange(width + tokens, device=self.device) >= self.starts.unsqueeze(1)
        else:
            self.valid = None
        return scores

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order."""
        self.cache = self.cache[:, :, rows]
        self.starts = self.starts[rows]
        valid: Tensor | None = getattr(self, "valid", None)
        if valid is not None:
            self.valid = valid[rows]

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to every row and return the next logits, ``[n, vocab]``."""
        if self.valid is not None:
            self.mask = self.valid[:, None, None, : self.at + 1]
        return self._run(tokens.unsqueeze(1), (self.at - self.starts).unsqueeze(1))[:, -1]

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = F.embedding(ids, self.embedding)
        cos, sin = (t[positions].unsqueeze(1) for t in (self.cos, self.sin))
        end = self.at + ids.shape[1]
        for (qkv, out, gate_up, down, norms), cache in zip(self.layers, self.cache, strict=True):
            x = x + self._attend(_rms(x, *norms[0]), qkv, out, cos, sin, cache, end)
            gate, up = F.linear(_rms(x, *norms[1]), *gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, *down)
        self.at = end
        return F.linear(_rms(x[:, -1:], *self.norm), *self.head)

    def _attend(self, x: Tensor, qkv: Any, out: Any, cos: Tensor, sin: Tensor, cache: Tensor, end: int) -> Tensor:
        n, t = x.shape[:2]
        heads = F.linear(x, *qkv).view(n, t, self.heads + 2 * self.kv_heads, self.size).transpose(1, 2)
        turned, v = heads[:, : self.heads + self.kv_heads], heads[:, self.heads + self.kv_heads :]
        one, two = turned.chunk(2, -1)
        turned = turned * cos + torch.cat((-two, one), -1) * sin
        cache[0][:, :, self.at : end], cache[1][:, :, self.at : end] = turned[:, self.heads :], v
        if t == 1:
            return F.linear(self._look(turned[:, : self.heads], cache, end).reshape(n, 1, -1), *out)
        y = F.scaled_dot_product_attention(
            turned[:, : self.heads], cache[0][:, :, :end], cache[1][:, :, :end], attn_mask=self.mask,
            is_causal=self.mask is None, enable_gqa=self.heads != self.kv_heads,
        )  # fmt: skip
        return F.linear(y.transpose(1, 2).reshape(n, t, -1), *out)

    def _look(self, q: Tensor, cache: Tensor, end: int) -> Tensor:
        """Attend with one query a row: two small products, where a fused kernel costs more than it saves."""
        # Three dimensions: a product of slices of the cache then copies nothing.
        keys, values = (part.flatten(0, 1)[:, :end] for part in cache)
        scores = torch.bmm(q.reshape(len(keys), -1, self.size), keys.transpose(1, 2)) * self.size**-0.5
        if self.mask is not None:
            seen = self.mask.expand(-1, self.kv_heads, -1, -1).reshape(len(keys), 1, end)
            scores = scores.masked_fill(~seen, -torch.inf)
        return torch.bmm(scores.softmax(-1), values)


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
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

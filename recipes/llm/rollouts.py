"""Rollouts: completions drawn from the model that is trained, behind one small interface."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from evolute.recipes.llm.llama_decoder import LlamaDecoder


class Rollout(NamedTuple):
    """Completions, padded on the right.

    Attributes:
        ids: drawn tokens [n, T]; 0 beyond the end.
        mask: tokens that were drawn, the end token included [n, T].
        log_probs: of the drawn tokens at the sampling temperature [n, T]; 0 beyond the end.
        finished: ended by the end token, not by the limit [n].
    """

    ids: Tensor
    mask: Tensor
    log_probs: Tensor
    finished: Tensor


class RolloutEngine(Protocol):
    """Whatever draws completions: the trained model itself, or a server that is given its weights."""

    def __call__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        max_tokens: int,
        temperature: float,
        uniforms: Tensor | None,
        eos_id: int,
    ) -> Rollout:
        """Draw ``group_size`` completions for each prompt.

        Args:
            model: the causal LM, with the weights to sample from.
            prompts: token ids of each prompt.
            group_size: completions a prompt; those of one prompt are adjacent.
            max_tokens: longest completion, T.
            temperature: divides the logits.
            uniforms: numbers in [0, 1) that decide each draw [n, T]; None takes the most probable token.
            eos_id: the token that ends a completion.
        """
        ...


def draw_uniforms(seed: int, number: int, indices: Sequence[int], group_size: int, tokens: int) -> Tensor:
    """Return the numbers that decide the draws, [len(indices) * group_size, tokens].

    They depend on the seed, the rollout and the prompt alone: not on the rank, nor on what else is in the batch.
    """
    rows: list[Tensor] = []
    for index in indices:
        digest = hashlib.sha256(f"{seed}:{number}:{index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        rows.append(torch.rand((group_size, tokens), generator=generator))
    return torch.cat(rows) if rows else torch.empty((0, tokens))


@torch.no_grad()
def sample_completions(
    model: Any,
    prompts: Sequence[Sequence[int]],
    group_size: int,
    max_tokens: int,
    temperature: float,
    uniforms: Tensor | None,
    eos_id: int,
) -> Rollout:
    """Draw completions with a key-value cache on the trained model: the default :class:`RolloutEngine`.

    Llama and Qwen2 models that are whole in this process run through :class:`LlamaDecoder`, all others through their
    own forward. Each prompt is read once, whatever the group size; rows that ended leave the batch.
    """
    was_training = model.training
    model.eval()
    try:
        decoder: Any = LlamaDecoder(model) if LlamaDecoder.serves(model) else _OwnForward(model)
        return _decode(decoder, prompts, group_size, max_tokens, temperature, uniforms, eos_id)
    finally:
        model.train(was_training)


def _decode(
    decoder: Any,
    prompts: Sequence[Sequence[int]],
    group_size: int,
    max_tokens: int,
    temperature: float,
    uniforms: Tensor | None,
    eos_id: int,
) -> Rollout:
    device = decoder.device
    n, width = len(prompts) * group_size, max(map(len, prompts))
    ids = torch.zeros((n, max_tokens), dtype=torch.long)
    log_probs = torch.zeros((n, max_tokens))
    lengths = torch.full((n,), max_tokens)
    finished = torch.zeros(n, dtype=torch.bool)
    padded = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    starts = torch.tensor([width - len(p) for p in prompts], device=device)
    scores = decoder.read(padded, starts, max_tokens, group_size)
    rows = torch.arange(n)
    for step in range(max_tokens):
        u = None if uniforms is None else uniforms[rows, step]
        drawn, log_p = (t.cpu() for t in draw(scores, temperature, u))
        ids[rows, step], log_probs[rows, step] = drawn, log_p
        ends = (drawn == eos_id) & ~finished[rows]
        if ends.any():
            finished[rows[ends]] = True
            lengths[rows[ends]] = step + 1
        alive = (~finished[rows]).nonzero().squeeze(1)
        if step + 1 == max_tokens or (len(alive) == 0 and not decoder.keeps_rows):
            break
        # To take rows out copies the cache: worth it once enough have ended.
        if len(alive) < 0.7 * len(rows) and not decoder.keeps_rows:
            rows, drawn = rows[alive], drawn[alive]
            decoder.keep(alive.to(device))
        scores = decoder.step(drawn.to(device))
    mask = torch.arange(max_tokens) < lengths.unsqueeze(1)
    zero = torch.zeros(())
    return Rollout(torch.where(mask, ids, 0), mask, torch.where(mask, log_probs, zero), finished)


def draw(scores: Tensor, temperature: float, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return one token a row and its log-probability at the temperature.

    Args:
        scores: logits [n, vocab].
        temperature: divides them.
        uniforms: in [0, 1) [n]: where on the cumulative distribution the token is taken; None takes the largest logit.
    """
    log_p = torch.log_softmax(scores.float() / temperature, -1)
    if uniforms is None:
        token = scores.argmax(-1, keepdim=True)
    else:
        total = log_p.exp().cumsum(-1)
        point = uniforms.to(total).unsqueeze(1) * total[:, -1:]
        token = torch.searchsorted(total, point, right=True).clamp(max=scores.shape[-1] - 1)
    return token.squeeze(1), log_p.gather(1, token).squeeze(1)


class _OwnForward:
    """Any Hugging Face causal LM, through its own forward and cache.

    Rows that ended stay in the batch, and all ranks decode to the limit: a sharded model needs every rank in every
    forward.
    """

    keeps_rows = True

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = next(model.parameters()).device

    def read(self, prompts: Tensor, starts: Tensor, tokens: int, group_size: int) -> Tensor:
        prompts, starts = (t.repeat_interleave(group_size, 0) for t in (prompts, starts))
        places = torch.arange(prompts.shape[1], device=self.device)
        self.mask = (places >= starts.unsqueeze(1)).long()
        self.position = prompts.shape[1] - starts.unsqueeze(1) - 1
        self.cache = None
        return self._run(prompts, (places - starts.unsqueeze(1)).clamp(min=0))

    def step(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones((len(self.mask), 1))], 1)
        self.position = self.position + 1
        return self._run(tokens.unsqueeze(1), self.position)

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        out = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = out.past_key_values
        return out.logits[:, -1]

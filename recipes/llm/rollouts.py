"""Rollouts: completions drawn from the model that is trained, behind one small interface."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from evolute.recipes.llm.llama_decoder import LlamaDecoder

WORTH = 0.7
"""Completions that ended, or are alike so far, leave the decoder when it keeps fewer than this share of its rows."""


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
    own forward. Each prompt is read once, whatever the group size, and so is, by the former, what completions of it
    have in common; those that ended leave the batch.
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
    scores = decoder.read(padded, starts, max_tokens)
    rows, state = torch.arange(n), torch.arange(n) // group_size  # completions, and each one's row in the decoder
    alike = decoder.shares
    for step in range(max_tokens):
        u = None if uniforms is None else uniforms[rows, step]
        drawn, log_p = (t.cpu() for t in draw(scores[state.to(device)], temperature, u))
        ids[rows, step], log_probs[rows, step] = drawn, log_p
        ends = (drawn == eos_id) & ~finished[rows]
        if ends.any():
            finished[rows[ends]] = True
            lengths[rows[ends]] = step + 1
        alive = (~finished[rows]).nonzero().squeeze(1)
        if step + 1 == max_tokens or (len(alive) == 0 and decoder.shares):
            break
        # To move rows copies the cache: worth it once enough have ended, and as long as enough are alike.
        if decoder.shares and len(alive) < WORTH * len(rows):
            rows, drawn, state = rows[alive], drawn[alive], state[alive]
        parents, state, own = state, torch.arange(len(rows)), drawn
        if alike:
            branches, back = torch.unique(parents * scores.shape[-1] + drawn, return_inverse=True)
            alike = len(branches) < WORTH * len(rows)
            if alike:
                parents, state, own = branches // scores.shape[-1], back, branches % scores.shape[-1]
        if not torch.equal(parents, torch.arange(len(scores))):
            decoder.keep(parents.to(device))
        scores = decoder.step(own.to(device))
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
        token = (total <= point).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    return token.squeeze(1), log_p.gather(1, token).squeeze(1)


class _OwnForward:
    """Any Hugging Face causal LM, through its own forward and cache.

    Every completion is a row to the limit, on all ranks: a sharded model needs every rank in every
    forward.
    """

    shares = False

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = next(model.parameters()).device

    def read(self, prompts: Tensor, starts: Tensor, tokens: int) -> Tensor:
        places = torch.arange(prompts.shape[1], device=self.device)
        self.mask = (places >= starts.unsqueeze(1)).long()
        self.position = prompts.shape[1] - starts.unsqueeze(1) - 1
        self.cache = None
        return self._run(prompts, (places - starts.unsqueeze(1)).clamp(min=0))

    def keep(self, rows: Tensor) -> None:
        self.mask, self.position = self.mask[rows], self.position[rows]
        self.cache.reorder_cache(rows)  # pyright: ignore[reportOptionalMemberAccess]

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

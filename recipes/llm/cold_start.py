"""A supervised start for reinforcement learning that leaves skill to elicit, kept on disk."""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from evolute.data.completions import PackedPairs, encode_pair
from evolute.data.examples import Example, fingerprint
from evolute.data.tokenizers import Tokenizer
from evolute.recipes.llm.sft import completion_loss

WARMUP = 60
"""Steps over which the learning rate rises, at the beginning and where the answers change."""


@dataclass
class ColdStart:
    """How a model learns the form of the task before it is rewarded.

    The first steps learn true answers; in the last ones each token of an answer is, with some probability, a token of
    some answer instead, drawn anew every time. Such a model knows more than it says: the true token stays the most
    probable one, so that a greedy answer is often right, a sampled one seldom.

    Attributes:
        steps: optimizer steps with true answers.
        corrupt_steps: steps after them with partly false answers.
        corrupt: probability that a token of an answer is drawn in those.
        batch_size: problems a step.
        lr: peak learning rate of AdamW, and a third of it in the last steps; each part warms up and falls along half a
            cosine to a tenth.
        seed: seed of the order and of the false answers.
        cache: folder that keeps the weights by a hash of all that made them; null for
            ``~/.cache/evolute/cold_start``, ``""`` for none.

    Raises:
        ValueError: if a value is out of range.
    """

    steps: int = 1300
    corrupt_steps: int = 300
    corrupt: float = 0.35
    batch_size: int = 128
    lr: float = 3e-3
    seed: int = 0
    cache: str | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("steps", self.steps, 1),
            ("corrupt_steps", self.corrupt_steps, 0),
            ("batch_size", self.batch_size, 1),
        ):
            if value < least:
                raise ValueError(f"cold_start: {name}={value}: must be at least {least}")
        if not 0 <= self.corrupt <= 1:
            raise ValueError(f"cold_start: corrupt={self.corrupt}: must lie in [0, 1]")
        if not self.lr > 0:
            raise ValueError(f"cold_start: lr={self.lr}: must be positive")


def cold_start(model: Any, examples: Sequence[Example], tokenizer: Tokenizer, settings: ColdStart) -> None:
    """Train a model in place, or load what the same settings, data and initial weights once gave.

    Args:
        model: causal LM, whole in this process.
        examples: problems with their answers.
        tokenizer: their tokenizer.
        settings: how.

    Raises:
        ValueError: if a problem has no answer or does not fit the model's context.
    """
    path = _cached(model, examples, tokenizer, settings)
    if path is not None and path.is_file():
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        rank_zero_info(f"cold start: {path}")
        return
    rank_zero_info(f"cold start: {settings.steps + settings.corrupt_steps} supervised steps")
    _train(model, examples, tokenizer, settings)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        torch.save(model.state_dict(), part)
        os.replace(part, path)


def _train(model: Any, examples: Sequence[Example], tokenizer: Tokenizer, settings: ColdStart) -> None:
    longest = int(getattr(model.config, "max_position_embeddings", 1 << 30))
    length = min(longest, 1 + max(len(tokenizer.encode(e.prompt + (e.completion or ""))) for e in examples))
    rows = PackedPairs([encode_pair(e, tokenizer, length) for e in examples], length, packing=False)
    labels = rows[torch.arange(len(rows))]["labels"]
    pool = labels[(labels >= 0) & (labels != tokenizer.eos_id)]
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    for step in range(settings.steps + settings.corrupt_steps):
        batch = rows[torch.randint(len(examples), (settings.batch_size,), generator=generator)]
        if step >= settings.steps:
            batch = _corrupted(batch, pool, settings.corrupt, tokenizer.eos_id, generator)
        optimizer.param_groups[0]["lr"] = _rate(step, settings)
        optimizer.zero_grad()
        completion_loss(model, batch)[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    optimizer.zero_grad()


def _rate(step: int, settings: ColdStart) -> float:
    """Return the learning rate of a step. The loss jumps where the answers change, so the rate is warmed up twice."""
    first = step < settings.steps
    peak, step, steps = (
        (settings.lr, step, settings.steps)
        if first
        else (settings.lr / 3, step - settings.steps, settings.corrupt_steps)
    )
    return peak * min(1.0, (step + 1) / WARMUP) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def _corrupted(
    batch: dict[str, Tensor], pool: Tensor, chance: float, eos_id: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return a batch in which tokens of answers, their end aside, are with that chance drawn from ``pool``."""
    labels = batch["labels"]
    hit = (labels >= 0) & (labels != eos_id) & (torch.rand(labels.shape, generator=generator) < chance)
    drawn = pool[torch.randint(len(pool), labels.shape, generator=generator)]
    return {**batch, **{name: torch.where(hit, drawn, batch[name]) for name in ("labels", "input_ids")}}


def _cached(model: Any, examples: Sequence[Example], tokenizer: Tokenizer, settings: ColdStart) -> Path | None:
    if settings.cache == "":
        return None
    digest = hashlib.sha256()
    values = {k: v for k, v in asdict(settings).items() if k != "cache"}
    config = {k: v for k, v in model.config.to_dict().items() if k != "transformers_version"}
    digest.update(json.dumps([values, config, tokenizer.name, torch.__version__], sort_keys=True, default=str).encode())
    digest.update(fingerprint(examples).encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    folder = Path(settings.cache).expanduser() if settings.cache else Path.home() / ".cache" / "evolute" / "cold_start"
    return folder / f"{digest.hexdigest()[:24]}.pt"

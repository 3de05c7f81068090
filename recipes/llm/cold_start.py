"""A supervised start for reinforcement learning that leaves skill to elicit, kept on disk."""

import hashlib
import json
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from evolute.data.completions import PackedPairs, encode_pair
from evolute.data.examples import Example, fingerprint
from evolute.data.tokenizers import Tokenizer
from evolute.recipes.llm.sft import completion_loss


@dataclass
class ColdStart:
    """How a model learns the form of the task before it is rewarded.

    The first steps learn true answers; the last ones learn answers of which a share is another problem's. Such a model
    knows more than it says: its most probable answer is often right, a sampled one seldom.

    Attributes:
        steps: optimizer steps with true answers.
        corrupt_steps: steps after them with partly false answers.
        corrupt: share of false answers in those.
        batch_size: problems a step.
        lr: peak learning rate of AdamW; it falls along half a cosine over all steps.
        seed: seed of the order and of the false answers.
        cache: folder that keeps the weights by a hash of all that made them; null for
            ``~/.cache/evolute/cold_start``, ``""`` for none.

    Raises:
        ValueError: if a value is out of range.
    """

    steps: int = 2000
    corrupt_steps: int = 300
    corrupt: float = 0.75
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
    total = settings.steps + settings.corrupt_steps
    longest = int(getattr(model.config, "max_position_embeddings", 1 << 30))
    length = 1 + max(len(tokenizer.encode(e.prompt + (e.completion or ""))) for e in examples)
    chance = random.Random(settings.seed)
    false = [
        e._replace(completion=chance.choice(examples).completion) if chance.random() < settings.corrupt else e
        for e in examples
    ]
    true_rows, false_rows = (
        PackedPairs(
            [encode_pair(e, tokenizer, min(length, longest)) for e in half], min(length, longest), packing=False
        )
        for half in (examples, false)
    )
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total, eta_min=0.1 * settings.lr)
    model.train()
    for step in range(total):
        chosen = torch.randint(len(examples), (settings.batch_size,), generator=generator)
        batch = (true_rows if step < settings.steps else false_rows)[chosen]
        optimizer.zero_grad()
        completion_loss(model, batch)[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()


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

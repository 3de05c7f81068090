"""Continuations of held-out prompts."""

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import Tensor


@torch.no_grad()
def sample(model: Any, prompts: Tensor, tokens: int, limit: int, temperature: float, seed: int) -> Tensor:
    """Continue prompts with a Hugging Face causal LM and its key-value cache.

    Draws come from a generator of its own on the CPU: the global ones are untouched (``model.generate`` would use
    them).

    Args:
        model: the model, in eval mode.
        prompts: ids ``[n, t]``.
        tokens: ids to draw for each prompt.
        limit: ids from here on (padding of the vocabulary) are never drawn.
        temperature: divides the logits.
        seed: seed of the draws.

    Returns:
        The drawn ids, ``[n, tokens]``, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Tensor] = []
    inputs, cache = prompts, None
    for _ in range(tokens):
        out = model(input_ids=inputs, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        probs = torch.softmax(out.logits[:, -1, :limit].float().cpu() / temperature, dim=-1)
        drawn.append(torch.multinomial(probs, 1, generator=generator))
        inputs = drawn[-1].to(prompts.device)
    return torch.cat(drawn, dim=1) if drawn else prompts.new_empty((len(prompts), 0)).cpu()


def write_samples(rows: list[dict[str, Any]], folder: str, loggers: list[Logger]) -> None:
    """Append rows of ``step``, ``prompt``, ``text`` to ``samples.jsonl`` and show them where a logger takes text."""
    path = Path(folder) / "samples.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            columns = ["step", "prompt", "text"]
            logger.log_text("samples", columns=columns, data=[[row[c] for c in columns] for row in rows])
        elif isinstance(logger, TensorBoardLogger):
            text = "\n\n---\n\n".join(f"    {row['prompt']}▸{row['text']}".replace("\n", "\n    ") for row in rows)
            logger.experiment.add_text("samples", text, global_step=rows[0]["step"])


def forget_samples(folder: str, step: int) -> None:
    """Drop rows of ``samples.jsonl`` after optimizer step ``step``, which a resumed run will draw again."""
    path = Path(folder) / "samples.jsonl"
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if len(kept) < len(lines):
            partial = path.with_suffix(".tmp")
            partial.write_text("".join(kept), encoding="utf-8")
            partial.replace(path)

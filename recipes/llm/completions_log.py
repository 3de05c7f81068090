"""A table of completions, token by token, with what a mask callback thought of each."""

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from evolute.callbacks.record import run_folder

FILE = "completions.jsonl"


class CompletionsLog:
    """Writes some completions of every so many rollouts to ``completions.jsonl`` of the run folder, and to W&B.

    A row is ``step``, ``prompt``, ``tokens`` (their texts), ``reward`` and ``advantage``; where a callback such as
    ``CAPO`` looked at the tokens, also ``shift`` (predicted KL of each, nats; null where it did not look) and
    ``rejected``.

    Args:
        every: rollouts between two tables; 0 for none.
        rows: completions a table.
    """

    def __init__(self, every: int, rows: int = 8) -> None:
        self.every, self.rows = every, rows
        self._open: dict[str, Any] | None = None

    def begin(self, number: int, prompts: list[str], batch: dict[str, Tensor], rewards: Tensor, tokenizer: Any) -> None:
        """Note some completions of rollout ``number``, spread over its prompts, if it is one to show."""
        self._open = None
        if not self.every or number % self.every:
            return
        group = len(rewards) // max(1, len(prompts))
        rows: list[dict[str, Any]] = []
        places = range(0, len(rewards), max(1, len(rewards) // self.rows))[: self.rows]
        for i in places:
            count = int(batch["drawn"][i])
            reward = float(rewards[i])
            rows.append(
                {
                    "prompt": prompts[i // group],
                    "tokens": [tokenizer.decode([t]) for t in batch["actions"][i, :count].tolist()],
                    "reward": reward if math.isfinite(reward) else None,
                    "advantage": float(batch["advantages"][i, 0]),
                }
            )
        self._open = {"rows": rows, "places": places}

    def end(self, trainer: L.Trainer, step: int) -> None:
        """Write the noted completions with the verdict of optimizer step ``step``, their first."""
        noted, self._open = self._open, None
        folder = run_folder(trainer)
        if noted is None or not trainer.is_global_zero or folder is None:
            return
        untyped: list[Any] = list(getattr(trainer, "callbacks", []))
        verdicts = [c.last for c in untyped if getattr(c, "last", None) and hasattr(c.last[0], "rejected")]
        for i, row in zip(noted["places"], noted["rows"], strict=True):
            row["step"] = step
            if verdicts and i < len(verdicts[0][0].rejected):
                shifts, count = verdicts[0][0], len(row["tokens"])
                row["shift"] = [_plain(v) for v in shifts.policy[i, :count].tolist()]
                row["rejected"] = [bool(v) for v in shifts.rejected[i, :count].tolist()]
        with (folder / FILE).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in noted["rows"])
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                _send(logger, noted["rows"])


def forget_completions(folder: Path | None, step: int) -> None:
    """Drop rows at or after optimizer step ``step``, which a resumed run will write again."""
    path = None if folder is None else folder / FILE
    if path is not None and path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < step]
        part = path.with_suffix(".tmp")
        part.write_text("".join(kept), encoding="utf-8")
        part.replace(path)


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _send(logger: WandbLogger, rows: list[dict[str, Any]]) -> None:
    import wandb

    from evolute.reports.completions import completion_html

    html = {"completion": [wandb.Html(completion_html(row), inject=False) for row in rows]}
    columns = ["step", "prompt", "completion", "reward", "advantage"]
    data = [[html["completion"][i] if c == "completion" else row[c] for c in columns] for i, row in enumerate(rows)]
    logger.log_table("completions", columns=columns, data=data)

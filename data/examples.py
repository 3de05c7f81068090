"""Prompts and completions: reasoning-gym tasks, .jsonl files and Hugging Face data sets, chat or plain."""

import hashlib
import json
from abc import ABC
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evolute.data.resumable import TokenizedDataModule
from evolute.data.tokenizers import HFTokenizer, Tokenizer, one_line

GYM = "reasoning-gym/"
"""Begins the name of a reasoning-gym task; its arguments (``size`` and ``seed`` among them) stand beside it."""


class Example(NamedTuple):
    """One problem.

    Attributes:
        prompt: text the model continues.
        completion: text it should continue with, without the end; None where no answer is known.
        columns: everything else the source says of it, for rewards and verifiers.
    """

    prompt: str
    completion: str | None
    columns: dict[str, Any]


def read_rows(source: str, source_args: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return the rows of a source.

    Args:
        source: ``"reasoning-gym/<task>"``, a .jsonl file, a folder written by ``save_to_disk``, or a data set's name
            on the Hugging Face Hub.
        source_args: arguments of the task, or of ``load_dataset`` (``split`` by default ``"train"``).

    Raises:
        FileNotFoundError: if the file is not there.
        ImportError: if reading it needs an extra that is not installed.
        ValueError: if it cannot be read, or holds nothing.
    """
    arguments = dict(source_args or {})
    if source.startswith(GYM):
        rows = _gym(source.removeprefix(GYM), arguments)
    elif source.endswith(".jsonl"):
        if arguments:
            raise ValueError(f"source_args={arguments}: a .jsonl file takes none")
        rows = _jsonl(Path(source).expanduser())
    else:
        rows = _dataset(source, arguments)
    if not rows:
        raise ValueError(f"source={source!r}: it holds no row")
    return rows


def to_example(
    row: dict[str, Any], tokenizer: Tokenizer, prompt_template: str | None = None, place: str = "row"
) -> Example:
    """Return a row as prompt and completion.

    A row has ``messages`` (chat: the last turn is the completion), or ``prompt`` (text, or chat turns) with or without
    ``completion``, or ``question`` and ``answer``. Chat turns are written by the tokenizer's own template.

    Args:
        row: the row.
        tokenizer: writes chat turns.
        prompt_template: format string over the row's columns that makes the prompt, ``"{question}\\n"``; a column that
            is a mapping gives ``"{metadata[expression]}="``.
        place: name of the row in errors.

    Raises:
        ValueError: if the row has none of these forms.
    """
    completion: Any = row.get("completion", row.get("answer"))
    if "messages" in row:
        turns = row["messages"]
        if not isinstance(turns, list) or len(turns) < 2 or turns[-1].get("role") != "assistant":
            raise ValueError(f"{place}: messages must be a list that ends with a turn of the assistant")
        prompt, completion = _chat(turns[:-1], tokenizer, place), turns[-1]["content"]
    elif prompt_template is not None:
        try:
            prompt = prompt_template.format(**row)
        except (KeyError, IndexError, AttributeError, ValueError, TypeError) as error:
            columns = ", ".join(map(repr, row))
            raise ValueError(
                f"{place}: prompt_template={prompt_template!r} fails on {error}; it has {columns}"
            ) from error
    else:
        prompt = row.get("prompt", row.get("question"))
        if isinstance(prompt, list):
            prompt = _chat(prompt, tokenizer, place)
    if isinstance(completion, list) and completion:
        completion = completion[-1].get("content")
    if not isinstance(prompt, str) or not isinstance(completion, str | None):
        columns = ", ".join(map(repr, row)) or "none"
        raise ValueError(
            f"{place}: needs messages, prompt and completion, or question and answer, as text or chat turns; "
            f"it has {columns}"
        )
    return Example(prompt, completion, {k: v for k, v in row.items() if k not in ("prompt", "messages")})


def split_examples(examples: Sequence[Example], val_fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split by a hash of ``(seed, prompt)``, so that equal prompts fall on the same side.

    Args:
        examples: the problems.
        val_fraction: share of the distinct prompts that is held out, in (0, 1).
        seed: seed of the split.

    Returns:
        Training and validation problems, in their order.
    """

    def rank(prompt: str) -> bytes:
        return hashlib.sha256(f"{seed}:{prompt}".encode("utf-8", "surrogatepass")).digest()

    distinct = sorted({e.prompt for e in examples}, key=rank)
    held = set(distinct[: max(1, round(val_fraction * len(distinct)))])
    return [e for e in examples if e.prompt not in held], [e for e in examples if e.prompt in held]


def fingerprint(examples: Sequence[Example]) -> str:
    """Return a hash over the problems in order."""
    digest = hashlib.sha256()
    for example in examples:
        for text in (example.prompt, example.completion or ""):
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


class ExampleDataModule(TokenizedDataModule, ABC):
    """What data modules of problems share: where they come from, and which of them are held out."""

    def __init__(
        self,
        source: str,
        source_args: dict[str, Any] | None,
        tokenizer: str,
        prompt_template: str | None,
        val_fraction: float,
        seed: int,
    ) -> None:
        super().__init__(tokenizer)
        if not 0 < val_fraction < 1:
            raise ValueError(f"{type(self).__name__}(val_fraction={val_fraction}): must lie between 0 and 1")
        self.source, self.source_args = source, source_args
        self.prompt_template = prompt_template
        self.val_fraction = val_fraction
        self.seed = seed
        self.fingerprint = ""

    def _examples(self) -> list[Example]:
        """Read the source."""
        rows = read_rows(self.source, self.source_args)
        places = (f"source={self.source!r}, row {i}" for i in range(len(rows)))
        return [
            to_example(row, self.tokenizer, self.prompt_template, place)
            for row, place in zip(rows, places, strict=True)
        ]


def _gym(task: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(f"source={GYM + task!r} needs reasoning-gym: pip install 'evolute[llm]'") from error
    try:
        data: Any = reasoning_gym.create_dataset(task, **{"size": 1000, "seed": 0, **arguments})
        return [data[i] for i in range(len(data))]
    except Exception as error:  # unknown tasks, unknown arguments, failed assertions
        raise ValueError(f"source={GYM + task!r}, source_args={arguments}: {one_line(error)}") from error


def _jsonl(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"source={str(path)!r}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({one_line(error)})") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({one_line(error)})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: holds {type(row).__name__}, not an object with columns")
        rows.append(row)
    return rows


def _dataset(source: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"source={source!r} needs datasets: pip install 'evolute[llm]'") from error
    split = arguments.pop("split", "train")
    try:
        if (Path(source) / "state.json").is_file() or (Path(source) / "dataset_dict.json").is_file():
            data: Any = datasets.load_from_disk(source)
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(source, split=split, **arguments)
    except Exception as error:  # hub, network, file and builder errors of a dozen types
        raise ValueError(
            f"source={source!r}, split={split!r}: not a .jsonl file, a reasoning-gym task or a data set that can be "
            f"loaded ({one_line(error)})"
        ) from error
    return list(data)


def _chat(turns: Any, tokenizer: Tokenizer, place: str) -> str:
    hf = tokenizer.hf if isinstance(tokenizer, HFTokenizer) else None
    if hf is None or not hf.chat_template:
        raise ValueError(f"{place}: has chat turns, and tokenizer {tokenizer.name!r} no chat template: give text")
    return str(hf.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

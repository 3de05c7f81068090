"""Supervised pairs for language models: prompt and completion, packed, with the loss on completions only."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from evolute.data.examples import Example, ExampleDataModule, fingerprint, split_examples
from evolute.data.packing import IGNORE_INDEX
from evolute.data.tokenizers import Tokenizer


def encode_pair(example: Example, tokenizer: Tokenizer, length: int) -> tuple[list[int], list[int]]:
    """Return ids and labels of prompt, completion and end, cut at ``length``; a prompt's labels are -100.

    Raises:
        ValueError: if there is no completion, or the prompt alone fills ``length``.
    """
    if example.completion is None:
        raise ValueError(f"prompt {example.prompt[:60]!r} has no completion to learn")
    prompt = [int(i) for i in tokenizer.encode(example.prompt)]
    if not 0 < len(prompt) < length:
        raise ValueError(
            f"prompt {example.prompt[:60]!r} has {len(prompt)} tokens: it needs at least 1, and room for a completion "
            f"within context + 1 = {length}"
        )
    completion = [int(i) for i in tokenizer.encode(example.completion)] + [tokenizer.eos_id]
    ids = (prompt + completion)[:length]
    return ids, ([IGNORE_INDEX] * len(prompt) + completion)[:length]


class PackedPairs(Dataset[dict[str, Tensor]]):
    """Encoded pairs in rows of ``length`` tokens.

    A row is ``{"input_ids", "labels", "position_ids"}``, int64 ``[length]``, not shifted. Positions begin at 0 with
    every pair (and with the padding), by which Hugging Face models keep packed pairs from seeing each other.

    Args:
        pairs: ids and labels of each pair, at most ``length`` long.
        length: tokens a row.
        packing: put pairs together (first fit, longest first) where they fit; else one a row.
        pad_to: rows are added, wholly ignored, until their number is a multiple of this.
        pad_id: id of padding; never a target.
    """

    def __init__(
        self, pairs: Sequence[tuple[list[int], list[int]]], length: int, packing: bool, pad_to: int = 1, pad_id: int = 0
    ) -> None:
        rows = _first_fit([len(ids) for ids, _ in pairs], length) if packing else [[i] for i in range(len(pairs))]
        count = -(-len(rows) // pad_to) * pad_to
        self._columns = {
            "input_ids": torch.full((count, length), pad_id),
            "labels": torch.full((count, length), IGNORE_INDEX),
            "position_ids": torch.arange(length).repeat(count, 1),
        }
        for row, members in enumerate(rows):
            at = 0
            for member in members:
                ids, labels = pairs[member]
                end = at + len(ids)
                self._columns["input_ids"][row, at:end] = torch.tensor(ids)
                self._columns["labels"][row, at:end] = torch.tensor(labels)
                self._columns["position_ids"][row, at:end] = torch.arange(len(ids))
                at = end
            self._columns["position_ids"][row, at:] = torch.arange(length - at)
        self.targets = int((self._columns["labels"] != IGNORE_INDEX).sum())

    def __len__(self) -> int:
        return len(self._columns["labels"])

    @override
    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self._columns.items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a whole batch, ``[len(indices), length]``."""
        return self[indices]


def _first_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Put items into bins of ``length``, each into the first with room, longest first."""
    bins: list[list[int]] = []
    room: list[int] = []
    first_open = 0
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        while first_open < len(room) and room[first_open] < min(sizes):
            first_open += 1
        place = next((b for b in range(first_open, len(room)) if room[b] >= sizes[item]), len(room))
        if place == len(room):
            bins.append([])
            room.append(length)
        bins[place].append(item)
        room[place] -= sizes[item]
    return bins


class CompletionDataModule(ExampleDataModule):
    """Prompts with the completions to learn, in rows of ``context + 1`` tokens.

    A batch is ``{"input_ids", "labels", "position_ids"}``, int64 ``[batch_size, context + 1]``, not shifted; labels
    are -100 on prompts and padding. The order depends on ``seed`` alone; a resumed run continues at the next batch.

    Args:
        source: ``"reasoning-gym/<task>"``, a .jsonl file, a folder written by ``save_to_disk``, or a data set's name on
            the Hugging Face Hub; the forms of a row are those of :func:`evolute.data.examples.to_example`.
        source_args: arguments of the task, or of ``load_dataset``.
        tokenizer: ``"byte"``, ``"chars:<alphabet>"``, or name or folder of a Hugging Face tokenizer.
        prompt_template: format string over a row's columns that makes the prompt.
        context: predictions a row.
        batch_size: rows a batch, on each rank.
        packing: put several pairs into a row.
        val_fraction: share of the distinct prompts held out.
        seed: seed of the split and of the order of batches.
        num_workers: loader processes.

    Raises:
        ValueError: if an argument is out of range, or (in ``setup``) the source does not serve.
    """

    def __init__(
        self,
        source: str,
        source_args: dict[str, Any] | None = None,
        tokenizer: str = "byte",
        prompt_template: str | None = None,
        context: int = 256,
        batch_size: int = 16,
        packing: bool = True,
        val_fraction: float = 0.05,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(source, source_args, tokenizer, prompt_template, val_fraction, seed)
        for name, value, least in (
            ("context", context, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"CompletionDataModule({name}={value}): must be at least {least}")
        self.save_hyperparameters()
        self.context = context
        self.batch_size = batch_size
        self.packing = packing
        self.num_workers = num_workers

    @override
    def setup(self, stage: str | None = None) -> None:
        if self._windows is not None:
            return
        examples = self._examples()
        self.fingerprint = fingerprint(examples)
        train, val = split_examples(examples, self.val_fraction, self.seed)
        length = self.context + 1
        halves = [[encode_pair(e, self.tokenizer, length) for e in half] for half in (train, val)]
        cut = sum(len(ids) == length and ids[-1] != self.tokenizer.eos_id for half in halves for ids, _ in half)
        if cut:
            rank_zero_warn(f"{cut} of {len(examples)} completions do not fit context={self.context} and were cut")
        training = PackedPairs(halves[0], length, self.packing, 1, self.tokenizer.eos_id)
        validation = PackedPairs(halves[1], length, self.packing, self._world[1], self.tokenizer.eos_id)
        needed = self.batch_size * self._world[1]
        if len(training) < needed:
            raise ValueError(
                f"source={self.source!r} gives {len(training)} training rows of {self.context} tokens, a batch takes "
                f"{needed}: use more rows, or a smaller context or batch_size"
            )
        self._windows = training, validation
        rank_zero_info(f"{self.source}: {len(train):,} training pairs in {len(training):,} rows, {len(val):,} held out")

    @override
    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "tokenizer": self.tokenizer_name,
            "context": self.context,
            "samples a batch": self.batch_size * self._world[1],
            "packing": self.packing,
            "val_fraction": self.val_fraction,
            "seed": self.seed,
        }

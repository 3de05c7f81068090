"""Prompts of verifiable problems, and the rollouts made from them, served as a dataloader."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from evolute.data.examples import Example, ExampleDataModule, fingerprint, split_examples
from evolute.data.samplers import ResumableSampler

Item = dict[str, Tensor]
Collect = Callable[[dict[str, Any], int], list[Item]]
"""From a batch of prompts and the number of the rollout to the batches to train on, in order."""


class Collector(Protocol):
    """What :class:`PromptDataModule` asks of the module that it feeds."""

    items_per_rollout: int
    """Training batches that one rollout gives: inner epochs times minibatches."""

    def collect(self, prompts: dict[str, Any], number: int) -> list[Item]:
        """Answer prompts with the present weights and return the training batches, replays included."""
        ...


class RolloutLoader:
    """Yields training batches, asking for a new rollout when the last one is used up.

    A rollout is made when its first batch is asked for, with the weights of that moment.

    Args:
        prompts: from the number of a rollout to its batch of prompts.
        rollouts: rollouts an epoch.
        items: training batches a rollout gives.
        collect: makes them.
        position: ``(epoch, batch)`` to begin at, or None when the epoch has no batch left.
        held: the rollout in use, ``{"number", "items"}``; filled here, kept by the data module for checkpoints.
    """

    def __init__(
        self,
        prompts: Callable[[int], dict[str, Any]],
        rollouts: int,
        items: int,
        collect: Collect,
        position: Callable[[], tuple[int, int] | None],
        held: dict[str, Any],
    ) -> None:
        self.prompts, self.rollouts, self.items = prompts, rollouts, items
        self.collect, self.position, self.held = collect, position, held

    def __len__(self) -> int:
        return self.rollouts * self.items

    def __iter__(self) -> Iterator[Item]:
        place = self.position()
        if place is None:
            return
        epoch, batch = place
        first, skipped = divmod(batch, self.items)
        for number in range(epoch * self.rollouts + first, (epoch + 1) * self.rollouts):
            if self.held.get("number") != number:
                self.held.update(number=number, items=self.collect(self.prompts(number), number))
            yield from self.held["items"][skipped:]
            skipped = 0

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: ``position`` knows the place. Lightning takes a loader without a state for unresumable."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Accept that nothing."""


class PromptDataModule(ExampleDataModule):
    """Problems to be answered by the model itself.

    Training batches are what the trained module's ``collect`` makes of ``batch_size`` prompts. A validation batch is
    ``{"prompts", "ids", "indices", "columns"}``: the texts, their token ids, their numbers, and the source's columns as
    lists (``answer`` among them where it is known). A checkpoint in the middle of a rollout keeps it, for every rank.

    Args:
        source: as in :class:`evolute.data.CompletionDataModule`.
        source_args: arguments of the task, or of ``load_dataset``.
        tokenizer: ``"byte"``, ``"chars:<alphabet>"``, or name, folder or .gguf file of a Hugging Face tokenizer.
        prompt_template: format string over a row's columns that makes the prompt.
        context: tokens a prompt may have; a longer one is refused.
        batch_size: prompts a rollout, on each rank.
        val_batch_size: prompts a validation batch.
        val_fraction: share of the distinct prompts held out.
        max_val: held-out prompts used, None for all.
        long_prompts: ``"raise"`` refuses a source with longer prompts, ``"drop"`` leaves them out and says how many.
        seed: seed of the split and of the order of prompts.

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
        batch_size: int = 8,
        val_batch_size: int = 64,
        val_fraction: float = 0.1,
        max_val: int | None = 256,
        long_prompts: str = "raise",
        seed: int = 0,
    ) -> None:
        super().__init__(source, source_args, tokenizer, prompt_template, val_fraction, seed)
        for name, value in (
            ("context", context),
            ("batch_size", batch_size),
            ("val_batch_size", val_batch_size),
            ("max_val", 1 if max_val is None else max_val),
        ):
            if value < 1:
                raise ValueError(f"PromptDataModule({name}={value}): must be at least 1")
        if long_prompts not in ("raise", "drop"):
            raise ValueError(f"PromptDataModule(long_prompts={long_prompts!r}): 'raise' or 'drop'")
        self.save_hyperparameters()
        self.context = context
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.max_val = max_val
        self.long_prompts = long_prompts
        self.train_examples: list[Example] = []
        self.val_examples: list[Example] = []
        self._held: dict[str, Any] = {}

    @override
    def setup(self, stage: str | None = None) -> None:
        if self.train_examples:
            return
        examples = self._examples()
        lengths = [len(self.tokenizer.encode(e.prompt)) for e in examples]
        for number, (example, length) in enumerate(zip(examples, lengths, strict=True)):
            if length == 0 or (length > self.context and self.long_prompts == "raise"):
                raise ValueError(
                    f"source={self.source!r}, row {number}: prompt {example.prompt[:60]!r} has {length} tokens, "
                    f"allowed are 1 to context={self.context}: raise context, or set long_prompts to drop"
                )
        kept = [e for e, length in zip(examples, lengths, strict=True) if length <= self.context]
        if len(kept) < len(examples):
            rank_zero_warn(f"{len(examples) - len(kept)} of {len(examples)} prompts exceed context={self.context}")
        self.fingerprint = fingerprint(kept)
        train, val = split_examples(kept, self.val_fraction, self.seed)
        needed = self.batch_size * self._world[1]
        if len(train) < needed or not val:
            raise ValueError(
                f"source={self.source!r} gives {len(train)} training and {len(val)} held-out prompts, a rollout takes "
                f"{needed}: use more rows, or a smaller batch_size"
            )
        self.train_examples, self.val_examples = train, val[: self.max_val]
        rank_zero_info(f"{self.source}: {len(train):,} training prompts, {len(self.val_examples):,} held out")

    @override
    def train_dataloader(self) -> Any:
        rank, world = self._world
        module: Any = None if self.trainer is None else self.trainer.lightning_module
        if not hasattr(module, "collect"):
            raise ValueError(
                f"PromptDataModule feeds a module with a method collect, which {type(module).__name__} lacks"
            )
        rollouts = len(self.train_examples) // (self.batch_size * world)

        def prompts(number: int) -> dict[str, Any]:
            epoch, place = divmod(number, rollouts)
            sampler = ResumableSampler(len(self.train_examples), self.seed, world, rank)
            sampler.seek(epoch, place * self.batch_size)
            order = iter(sampler)
            return self._batch(self.train_examples, [next(order) for _ in range(self.batch_size)])

        return RolloutLoader(prompts, rollouts, module.items_per_rollout, module.collect, self._position, self._held)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        rank, world = self._world
        # Each rank takes its share; shares may differ by one problem, and are weighted when joined.
        mine = list(range(rank, len(self.val_examples), world))
        return DataLoader(
            mine,  # pyright: ignore[reportArgumentType]
            batch_size=self.val_batch_size,
            collate_fn=lambda indices: self._batch(self.val_examples, indices),
            sampler=_InOrder(len(mine)),
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _batch(self, examples: list[Example], indices: list[int]) -> dict[str, Any]:
        chosen = [examples[i] for i in indices]
        names = dict.fromkeys(name for e in chosen for name in e.columns)
        return {
            "prompts": [e.prompt for e in chosen],
            "ids": [[int(i) for i in self.tokenizer.encode(e.prompt)] for e in chosen],
            "indices": list(indices),
            "columns": {name: [e.columns.get(name) for e in chosen] for name in names},
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        held: list[Any] = [dict(self._held)]
        if self._world[1] > 1:
            held = [None] * self._world[1]
            torch.distributed.all_gather_object(held, dict(self._held))
        return {**super().state_dict(), "rollouts": held}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        rank, world = self._world
        rollouts = state_dict.get("rollouts", [])
        # Another number of ranks shares prompts out differently: then the rollout is made again.
        self._held.update(rollouts[rank] if len(rollouts) == world else {})

    @override
    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "tokenizer": self.tokenizer_name,
            "prompts a rollout": self.batch_size * self._world[1],
            "val_fraction": self.val_fraction,
            "seed": self.seed,
        }


class _InOrder(torch.utils.data.Sampler[int]):
    """Positions in order; a sampler that Lightning does not replace by a distributed one."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    @override
    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size))

"""What data modules share that continue at the next batch after a resume."""

from abc import ABC, abstractmethod
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from evolute.data.samplers import Loader, ResumableLoader, ResumableSampler
from evolute.data.tokenizers import Tokenizer, load_tokenizer


class ResumablePlace(L.LightningDataModule, ABC):
    """A place in an order of training batches, which a checkpoint keeps.

    A subclass says in ``_identity`` what a place in its data depends on, and gives ``_position`` to its loader.
    """

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return how many batches were trained on, and what that number means nothing without.

        The count is the trainer's own, of batches whose optimisation finished: workers fetch ahead of it.
        """
        return {"batches": 0 if self.trainer is None else _progress(self.trainer).total.processed, **self._identity()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the place in a checkpoint is a place in this data; the count itself is in Lightning's loops.

        Raises:
            ValueError: if the corpus, the order or the size of batches differ from the checkpoint's.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        for key, now in self._identity().items():
            if state_dict.get(key, now) != now:
                raise ValueError(
                    f"the checkpoint was trained with {key}={state_dict[key]!r}, this run has {now!r}: "
                    "its place in the data means nothing here; resume with the same value"
                )

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """Return what must be equal for a place in the data to mean the same."""

    def _position(self) -> tuple[int, int] | None:
        """Return ``(epoch, batch)`` to train on next, ``None`` if the running epoch has no batch left.

        Epochs are counted from the batches trained, not taken from Lightning, which can count one twice when it
        resumes at an epoch's end. It then also runs that finished epoch once more: that must yield nothing.
        """
        trainer = self.trainer
        if trainer is None or trainer.state.status != TrainerStatus.RUNNING or not trainer.training:
            return 0, 0
        progress = _progress(trainer)
        per_epoch = int(trainer.num_training_batches)
        if progress.current.ready >= per_epoch:
            return None
        return divmod(progress.total.processed, per_epoch)

    @property
    def _world(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)


class ResumableDataModule(ResumablePlace):
    """Batches of fixed windows, in an order of the seed alone.

    A subclass sets ``batch_size``, ``seed`` and ``num_workers``, fills ``_windows`` in ``setup`` and says in
    ``_identity`` what a place in its data depends on.
    """

    batch_size: int
    seed: int
    num_workers: int

    def __init__(self) -> None:
        super().__init__()
        self._windows: tuple[Dataset[Any], Dataset[Any]] | None = None

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        windows, _ = self._packed()
        rank, world = self._world
        loader = ResumableLoader(
            windows,
            batch_size=self.batch_size,
            sampler=ResumableSampler(len(windows), self.seed, world, rank),
            drop_last=True,
            **self._loader_options(),
        )
        loader.position = self._position
        return loader

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        _, windows = self._packed()
        rank, world = self._world
        # The windows divide by the number of ranks (see PackedWindows), so this sampler repeats none of them.
        sampler = DistributedSampler(windows, world, rank, shuffle=False) if world > 1 else None
        return Loader(windows, batch_size=self.batch_size, sampler=sampler, **self._loader_options())

    def _packed(self) -> tuple[Any, Any]:
        if self._windows is None:
            raise RuntimeError(f"{type(self).__name__}: call setup() first (a Trainer does)")
        return self._windows

    def _loader_options(self) -> dict[str, Any]:
        # Its own generator: making an iterator then draws nothing from the global one.
        return {
            "collate_fn": _as_is,
            "num_workers": self.num_workers,
            "generator": Generator().manual_seed(self.seed),
            "pin_memory": self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        }


class TokenizedDataModule(ResumableDataModule, ABC):
    """A data module of text, with the tokenizer of that name."""

    def __init__(self, tokenizer: str) -> None:
        super().__init__()
        self.tokenizer_name = tokenizer
        self._tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_name)
        return self._tokenizer


def _progress(trainer: L.Trainer) -> Any:
    """Return Lightning's counters of training batches, ``.current`` of the epoch and ``.total``."""
    return trainer.fit_loop.epoch_loop.batch_progress


def _as_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch, which the data set already put together."""
    return batch

"""A sampler and a loader that continue at the next batch after a resume."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override


class ResumableSampler(DistributedSampler[int]):
    """Epoch ``e`` visits the samples in a random order that depends on ``(seed, e)`` alone.

    Every rank takes its strided part of that order, so that the batches of all ranks joined are the batch that one
    process would take; the last samples that do not divide among the ranks are dropped for the epoch. It is a
    ``DistributedSampler`` so that Lightning leaves it in place under every strategy.

    Args:
        size: number of samples in the data set.
        seed: seed of the orders.
        num_replicas: number of ranks.
        rank: this rank, from 0.

    Attributes:
        start: samples of this rank's epoch that iteration skips. ``len()`` stays that of the whole epoch, which is
            what Lightning compares its own count of fetched batches with.
    """

    def __init__(self, size: int, seed: int = 0, num_replicas: int = 1, rank: int = 0) -> None:
        # Only its length is asked for.
        super().__init__(cast(Dataset[int], range(size)), num_replicas, rank, shuffle=True, seed=seed, drop_last=True)
        self.size = size
        self.start = 0

    def seek(self, epoch: int, start: int) -> None:
        """Go to sample ``start`` of epoch ``epoch`` (of this rank)."""
        self.epoch = epoch
        self.start = start

    @override
    def set_epoch(self, epoch: int) -> None:
        """Go to the start of another epoch; the current epoch keeps its place."""
        if epoch != self.epoch:
            self.seek(epoch, 0)

    @override
    def __iter__(self) -> Iterator[int]:
        # Hashed, not added: seed 0 in epoch 1 must not repeat seed 1 in epoch 0.
        digest = hashlib.sha256(f"{self.seed}:{self.epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        order = torch.randperm(self.size, generator=generator)
        mine = order[self.rank : self.total_size : self.num_replicas]
        return iter(mine[self.start :].tolist())


class ResumableLoader(DataLoader[Any]):
    """A ``DataLoader`` that asks where to begin when its first batch is asked for, not when its iterator is made.

    Lightning makes the first iterator early (``estimated_stepping_batches`` in ``configure_optimizers`` is enough):
    before the progress of a checkpoint is restored and before ``set_epoch``. Worker processes would then prefetch
    from the wrong place.

    Attributes:
        position: called at the first batch of an iteration; returns ``(epoch, batch)`` to begin at, or ``None`` when
            this epoch has no batch left. Without it the loader begins where its sampler stands.
    """

    position: Callable[[], tuple[int, int] | None] | None = None

    @override
    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.position is not None and isinstance(self.sampler, ResumableSampler):
            place = self.position()
            if place is None:
                return
            epoch, batch = place
            self.sampler.seek(epoch, batch * (self.batch_size or 1))
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: ``position`` knows the place. Lightning takes a loader without a state for unresumable."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Accept that nothing."""

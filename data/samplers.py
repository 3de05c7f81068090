"""A sampler and a loader that continue at the next batch after a resume."""

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
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


class Loader(DataLoader[Any]):
    """A ``DataLoader`` whose workers can be started right after a collective of gloo (see :func:`settle`)."""

    @override
    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.num_workers:
            settle()
        return super().__iter__()


def settle(limit: float = 5.0) -> None:
    """Wait, at most ``limit`` seconds, until gloo's threads rest, so that this process can be forked.

    A collective returns before its thread has dropped the tensors. If theirs is the last reference, the thread enters
    the interpreter, which takes the lock on the list of its threads. A child forked at that moment finds the lock held
    by a thread that it does not have, and never comes out of ``fork``: its loader waits for a batch for ever, and the
    other ranks for this one. Lightning broadcasts a flag just before it asks for each batch, so the moment is not rare
    where processors are few. Threads are seen on Linux only, where loaders fork.
    """
    end = time.monotonic() + limit
    resting = False
    while not resting and time.monotonic() < end:
        time.sleep(1e-3)  # without the interpreter's lock: who waits for it, wakes
        resting = all(state == "S" for name, state in _threads() if name == "pt_gloo_runloop")


def _threads() -> Iterator[tuple[str, str]]:
    """Yield the name and the state letter of each thread of this process."""
    for stat in Path("/proc/self/task").glob("*/stat"):
        try:
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
        except OSError:  # it ended
            continue
        yield name, rest.split()[0]


class ResumableLoader(Loader):
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

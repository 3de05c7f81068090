"""The order of samples: a permutation of its own for each epoch, shared out among ranks, entered anywhere."""

import hashlib
import threading
import time
from pathlib import Path

import pytest
import torch

from evolute.data import ResumableLoader, ResumableSampler, samplers
from evolute.data.samplers import Loader, settle


def order(epoch=0, start=0, **kwargs):
    sampler = ResumableSampler(**{"size": 23, "seed": 3} | kwargs)
    sampler.seek(epoch, start)
    return list(sampler)


def test_an_epoch_is_a_permutation_of_its_own():
    assert sorted(order(0)) == list(range(23))
    assert sorted(order(1)) == list(range(23))
    assert order(0) == order(0)
    assert len({tuple(order(e, seed=s)) for e in range(3) for s in range(3)}) == 9  # seed + epoch would give 5


def test_ranks_share_an_epoch_without_overlap():
    parts = [order(num_replicas=3, rank=r) for r in range(3)]
    assert [len(p) for p in parts] == [7, 7, 7]
    assert [i for step in zip(*parts, strict=True) for i in step] == order()[:21]
    assert len(ResumableSampler(23, num_replicas=3, rank=1)) == 7


def test_start_skips_samples_and_not_length():
    assert order(start=5) == order()[5:]
    sampler = ResumableSampler(23, seed=3)
    sampler.seek(2, 5)
    assert len(sampler) == 23
    sampler.set_epoch(2)
    assert list(sampler) == order(2)[5:]
    sampler.set_epoch(3)
    assert list(sampler) == order(3)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_asks_for_its_place_at_the_first_batch(workers):
    place: list[tuple[int, int] | None] = [(0, 0)]
    loader = ResumableLoader(range(23), batch_size=4, sampler=ResumableSampler(23, 3), num_workers=workers)
    loader.position = lambda: place[0]
    iterator = iter(loader)
    place[0] = (2, 3)
    assert torch.cat(list(iterator)).tolist() == order(2)[12:]
    place[0] = None
    assert list(loader) == []


def test_a_process_is_forked_only_when_the_threads_of_gloo_rest():
    ended = threading.Event()

    def busy(seconds: float) -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text("pt_gloo_runloop")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            hashlib.sha256(bytes(1 << 20)).digest()  # without the interpreter's lock
        ended.set()
        finish.wait()

    finish = threading.Event()
    thread = threading.Thread(target=busy, args=(0.5,))
    thread.start()
    try:
        loader = Loader(range(4), num_workers=1)  # pyright: ignore[reportArgumentType]
        assert [int(i) for i in loader] == [0, 1, 2, 3]
        assert ended.is_set()  # it waited
        start = time.monotonic()
        settle(limit=60)  # a thread that rests is not waited for
        assert time.monotonic() - start < 30
    finally:
        finish.set()
        thread.join()


def test_a_process_without_workers_to_start_waits_for_nobody(monkeypatch):
    monkeypatch.setattr(samplers, "settle", lambda: pytest.fail("waited"))
    assert [int(i) for i in Loader(range(4))] == [0, 1, 2, 3]  # pyright: ignore[reportArgumentType]

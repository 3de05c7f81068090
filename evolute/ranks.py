"""Several processes, one voice: the first rank speaks, the others follow it and do not outlive it."""

import os
import sys
import threading
import time

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from evolute.messages import fail

_LEADER = "EVOLUTE_LEADER"
GRACE = 20.0
"""Seconds that a process may go on without the one that started it: to end by itself, or to say what is wrong."""


def follows() -> bool:
    """Say whether another process is the first rank."""
    return _rank() > 0


def _rank() -> int:
    return int(getattr(rank_zero_only, "rank", None) or 0)


def join() -> None:
    """Note who the first rank is, for the processes that Lightning will start; end with it in one of those.

    torch waits half an hour for a peer that is gone. Lightning watches its children; nobody else watches the parent.
    """
    if not follows():
        os.environ[_LEADER] = str(os.getpid())
    elif _led():
        threading.Thread(target=_end_with_leader, daemon=True, name="evolute-leader").start()


def _led() -> bool:
    return os.environ.get(_LEADER) == str(os.getppid())


def _end_with_leader() -> None:
    while _led():
        time.sleep(0.5)
    time.sleep(GRACE)
    print("evolute: error: the process of the first rank is gone", file=sys.stderr, flush=True)
    os._exit(1)


def refuse(message: str) -> int:
    """Print an error in one line and return 2. The ranks after the first leave it to that one, unless it goes on."""
    if not follows():
        return fail(message)
    led, end = _led(), time.monotonic() + GRACE / 2
    while time.monotonic() < end:
        if led and not _led():
            return 2
        time.sleep(0.1)
    return fail(f"rank {_rank()}: {message}")

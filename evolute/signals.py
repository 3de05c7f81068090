"""Told to stop: SIGUSR1 (the time limit is near) and SIGTERM (others need the place), heard from the first moment.

Imports nothing heavy: a signal during the imports must be remembered, not die of.
"""

import atexit
import os
import signal
from types import FrameType

INTERRUPTED = 75
"""Exit code of a run that was told to stop and has saved: start it again (``EX_TEMPFAIL`` of sysexits.h)."""

_heard: list[int] = []
_listening = False


def listen() -> bool:
    """Remember both signals instead of dying of them, if this process belongs to a SLURM job; say whether it does.

    SLURM signals every process of a step. Processes forked later inherit the handler of SIGUSR1, but must be able to
    end of SIGTERM: that is how a pool ends its workers.
    """
    global _listening
    if "SLURM_JOB_ID" in os.environ and not _listening:
        signal.signal(signal.SIGUSR1, _remember)
        signal.signal(signal.SIGTERM, _remember)
        atexit.register(_ignore)
        os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
        _listening = True
    return _listening


def told() -> bool:
    """Say whether this process was told to stop."""
    return bool(_heard)


def _remember(number: int, frame: FrameType | None) -> None:
    _heard.append(number)


def _ignore() -> None:
    """All is done: Python would give both their default, death, for the second that it takes itself apart."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

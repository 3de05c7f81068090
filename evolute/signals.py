"""Told to stop: SIGUSR1 (the time limit is near) and SIGTERM (others need the place), heard from the first moment.

Imports nothing heavy: a signal during the imports must be remembered, not die of.
"""

import os
import signal
from types import FrameType

INTERRUPTED = 75
"""Exit code of a run that was told to stop and has saved: start it again (``EX_TEMPFAIL`` of sysexits.h)."""

_heard: list[int] = []
_listening = False


def listen() -> bool:
    """Remember both signals instead of dying of them, if this process belongs to a SLURM job; say whether it does.

    SLURM signals every process of a step, and a loader's worker that died of it would take the run along. Processes
    forked later inherit the handlers; torch gives its workers one of its own for SIGTERM, so they do not get that
    signal at all. They still end with their loader, and with this process.
    """
    global _listening
    if "SLURM_JOB_ID" in os.environ and not _listening:
        signal.signal(signal.SIGUSR1, _remember)
        signal.signal(signal.SIGTERM, _remember)
        os.register_at_fork(after_in_child=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]))
        _listening = True
    return _listening


def told() -> bool:
    """Say whether this process was told to stop."""
    return bool(_heard)


def _remember(number: int, frame: FrameType | None) -> None:
    _heard.append(number)

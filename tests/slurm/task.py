#!/usr/bin/env python3
"""Stands in for ``evolute fit`` where only the batch script is tested: no torch, a start in no time.

TASK says what it does when told to stop: ``save`` (the default), ``ignore`` (goes on), ``deaf`` (no handler yet), or
``die`` (rank 1 is killed at once), ``fail`` (exits 1 when told), ``refuse`` (exits 2 when told). It lives SECONDS.
"""

import os
import signal
import sys
import time

task = os.environ.get("TASK", "save")
rank = int(os.environ["SLURM_PROCID"])
told: list[int] = []
if task != "deaf":
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: told.append(number))
print(f"rank {rank} of {os.environ['SLURM_NTASKS']} runs", *sys.argv[1:], flush=True)
if task == "die" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
end = time.monotonic() + float(os.environ.get("SECONDS", "30"))
while time.monotonic() < end:
    time.sleep(0.02)
    if told and task == "save":
        print(f"rank {rank} told", flush=True)
        if rank:
            sys.exit(0)
        time.sleep(0.5)  # longer than the others
        print("saved", flush=True)
        sys.exit(75)
    if told and task in ("fail", "refuse"):
        sys.exit(1 if task == "fail" else 2)
print(f"rank {rank} finished", flush=True)

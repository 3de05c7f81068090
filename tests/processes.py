"""A pair of processes that train together: a test file that is also their script."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def run_pair(script: str, folder: Path, timeout: float, *arguments: str) -> list[Any]:
    """Run ``script folder *arguments`` as ranks 0 and 1; return what each saved as ``<rank>.pt`` in the folder.

    DeepSpeed finds the CPU and an extensions folder of its own, in which nothing must ever be built.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NODE_RANK": "0",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
    }
    logs = [folder / f"{rank}.log" for rank in range(2)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as output:
                environment = {**os.environ, **shared, "LOCAL_RANK": str(rank)}
                command = [sys.executable, script, str(folder), *arguments]
                processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
        codes = [p.wait(timeout) for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    for code, log in zip(codes, logs, strict=True):
        assert code == 0, log.read_text()[-3000:]
    assert not (folder / "extensions").exists(), "DeepSpeed began to build an op"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]

"""Commands as processes: the real executable, or children of one warm process."""

import copy
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

EXECUTABLE = Path(sys.executable).with_name("evolute")
REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"}

TINY: dict[str, Any] = {
    "seed_everything": 0,
    "model": {
        "class_path": "evolute.recipes.llm.Pretrain",
        "init_args": {
            "config": {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "num_key_value_heads": 2},
            "optimizer": "adamw", "lr": 0.01, "samples": 1, "sample_tokens": 4,
        },
    },
    "data": {
        "class_path": "evolute.data.TextDataModule",
        "init_args": {"source": "", "context": 32, "batch_size": 8, "val_fraction": 0.2},
    },
    "trainer": {
        "accelerator": "cpu", "devices": 1, "max_steps": 6, "val_check_interval": 3, "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0, "log_every_n_steps": 1, "enable_model_summary": False,
        "enable_progress_bar": False,
        "callbacks": [{"class_path": "evolute.callbacks.NoiseAdaptiveLR", "init_args": {"alpha": 0.5}}],
    },
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What a command said."""

    code: int
    out: str
    err: str


class Server:
    """Runs commands in children of one process that has everything imported (see ``server.py``)."""

    def __init__(self, scratch: Path) -> None:
        self.running = 0
        self.out, self.err = scratch / "out", scratch / "err"
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT,
        )

    def start(self, *args: str | Path, cwd: Path, **env: str) -> int:
        """Start a command; return its process id. One that still runs is killed."""
        if self.running:
            os.kill(self.running, signal.SIGKILL)
            self.wait()
        self.out.write_text("")
        self.err.write_text("")
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {"args": [str(a) for a in args], "cwd": str(cwd), "env": env}
        self.process.stdin.write(json.dumps(request | {"out": str(self.out), "err": str(self.err)}) + "\n")
        self.process.stdin.flush()
        self.running = int(self.process.stdout.readline())
        return self.running

    def wait(self) -> Result:
        """Return what the command said once it ended; its code is -9 if it was killed."""
        assert self.process.stdout is not None
        code = int(self.process.stdout.readline())
        self.running = 0
        return Result(code, self.out.read_text(), self.err.read_text())

    def __call__(self, *args: str | Path, cwd: Path, **env: str) -> Result:
        self.start(*args, cwd=cwd, **env)
        return self.wait()


def execute(*args: str | Path, cwd: Path, **env: str) -> Result:
    """Run the installed ``evolute``."""
    done = subprocess.run(
        [EXECUTABLE, *args], cwd=cwd, env=os.environ | ENVIRONMENT | env, capture_output=True, text=True, timeout=120
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def evolute(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``evolute(*args, cwd=...)``, warm."""
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    assert server.process.stdin is not None
    server.process.stdin.close()
    server.process.wait(20)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    words = "the curvature of a loss is what a step meets when it goes too far along its own gradient"
    draw = random.Random(0)
    for i in range(30):
        (folder / f"{i}.txt").write_text(" ".join(draw.choice(words.split(" ")) for _ in range(60)))
    return folder


def recipe(folder: Path, corpus: Path, **changes: Any) -> Path:
    """Write ``tiny.yaml``, with values by dotted key changed (``...`` removes one), and return it."""
    config = copy.deepcopy(TINY)
    config["data"]["init_args"]["source"] = str(corpus)
    for key, value in changes.items():
        *path, last = key.split(".")
        place: Any = config
        for name in path:
            place = place[int(name)] if isinstance(place, list) else place[name]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(config))
    return file

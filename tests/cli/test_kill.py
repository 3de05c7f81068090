"""A run that is killed with SIGKILL again and again, and resumed, equals one that was left alone."""

import csv
import io
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from tests.cli.conftest import ENVIRONMENT, EXECUTABLE, execute, recipe

STEPS = 60


class SlowIO(TorchCheckpointIO):
    """Leaves a file half written for a while."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        memory = io.BytesIO()
        torch.save(checkpoint, memory)
        content = memory.getvalue()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            time.sleep(0.02)
            file.write(content[len(content) // 2 :])


class Slow(Callback):
    """Makes time for a kill, and says where the run is."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        trainer.strategy.checkpoint_io = SlowIO()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        print("TRAINING", flush=True)
        time.sleep(0.01)

    def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
        print("VALIDATING", flush=True)
        time.sleep(0.02)


def callback(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"evolute.callbacks.{name}", "init_args": arguments}


def changes(workers: int) -> dict[str, Any]:
    return {
        "data.init_args.num_workers": workers,
        "data.init_args.batch_size": 4,
        "trainer.max_steps": STEPS,
        "trainer.accumulate_grad_batches": 2,
        "trainer.val_check_interval": 10,
        "trainer.limit_val_batches": 3,
        "trainer.callbacks": [
            callback("CurvatureMonitor", every_n_steps=7, samples=4, budget=None),
            callback("StepRadius", every_n_steps=5, budget=None),
            callback("LayerMonitor", every_n_steps=4, budget=None),
            callback("NoiseAdaptiveLR", every_n_steps=2),
            {"class_path": "tests.cli.test_kill.Slow"},
        ],
    }


def until(condition: Any, alive: int, limit: float = 60.0) -> bool:
    """Wait for a condition; say whether it came true before the process ended."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if condition():
            return True
        if state(alive) in "Z":
            return False
        time.sleep(0.001)
    raise TimeoutError


def state(pid: int) -> str:
    """Return the state letter of a process, ``Z`` if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def plain(value: Any) -> Any:
    """Make values comparable, without what the clock says."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in ("spent", "elapsed")}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return (str(value.dtype), value.tolist()) if isinstance(value, torch.Tensor) else value


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [
            {k: v for k, v in row.items() if v and "time" not in k and "per_s" not in k} for row in csv.DictReader(file)
        ]


def files(folder: Path) -> list[str]:
    found = (p.relative_to(folder).as_posix() for p in folder.rglob("*"))
    return sorted(name for name in found if not name.startswith("config."))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_ten_times_equals_left_alone(workers, evolute, corpus, tmp_path):
    recipe(tmp_path, corpus, **changes(workers))
    fit = ["fit", "--config", "tiny.yaml", "--checkpoint_every", "3", "--run"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = evolute(*fit, whole, cwd=tmp_path)
    assert result.code == 0, result.err

    draw = random.Random(workers)
    moments = ["saving"] * 4 + ["validating"] * 3 + ["any"] * 3
    draw.shuffle(moments)
    orphans: list[int] = []
    for number, moment in enumerate(moments):
        pid = evolute.start(*fit, broken, *(["--resume"] if number else []), cwd=tmp_path)
        assert until(lambda: "TRAINING" in evolute.out.read_text(), pid), evolute.err.read_text()
        if moment == "saving":
            for _ in range(draw.choice([1, 2])):
                assert until(lambda: not list(broken.glob("checkpoints/*.tmp")), pid)
                assert until(lambda: list(broken.glob("checkpoints/*.tmp")), pid)
        elif moment == "validating":
            assert until(lambda: "VALIDATING" in evolute.out.read_text(), pid)
            time.sleep(draw.uniform(0, 0.05))
        else:
            time.sleep(draw.uniform(0, 0.4))
        orphans += children(pid)
        os.kill(pid, signal.SIGKILL)
        result = evolute.wait()
        assert result.code == -signal.SIGKILL, (number, moment, result)
        if moment == "saving":
            assert list(broken.glob("checkpoints/*.tmp"))
    result = evolute(*fit, broken, "--resume", cwd=tmp_path)
    assert result.code == 0, result.err

    last = f"checkpoints/step={STEPS:08d}.ckpt"
    ours, theirs = (torch.load(folder / last, weights_only=True) for folder in (whole, broken))
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert plain(ours[key]) == plain(theirs[key]), key
    assert rows(whole) == rows(broken)
    assert len(rows(whole)) >= STEPS
    assert (whole / "samples.jsonl").read_text() == (broken / "samples.jsonl").read_text()
    assert files(whole) == files(broken)
    assert len(list(broken.glob("config*.yaml"))) == 1 + len(moments)
    assert orphans or not workers
    for pid in orphans:
        until(lambda pid=pid: state(pid) == "Z", alive=os.getpid(), limit=20)


@pytest.mark.slow
def test_the_executable_is_killed_before_its_first_checkpoint_and_resumes(corpus, tmp_path):
    recipe(tmp_path, corpus, **changes(0), **{"seed_everything": 3})
    fit = ["fit", "--config", "tiny.yaml", "--trainer.max_steps", "9", "--checkpoint_every", "4", "--run"]
    assert execute(*fit, "whole", cwd=tmp_path).code == 0
    process = subprocess.Popen(
        [EXECUTABLE, *fit, "broken"],
        cwd=tmp_path, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("TRAINING"):
            break
    process.kill()
    process.wait()
    process.stdout.close()
    assert not list((tmp_path / "broken").glob("checkpoints/*.ckpt"))
    done = execute(*fit, "broken", "--resume", cwd=tmp_path)
    assert done.code == 0, done.err
    assert rows(tmp_path / "whole") == rows(tmp_path / "broken")
    assert files(tmp_path / "whole") == files(tmp_path / "broken")

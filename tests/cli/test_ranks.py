"""Two processes that Lightning starts itself are one run: one voice, one run folder, and neither outlives the other."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from evolute.callbacks.run_checkpoint import checkpoints
from evolute.callbacks.zero_checkpoint import load_checkpoint
from evolute.registry import strategies
from tests.cli.conftest import ENVIRONMENT, EXECUTABLE, execute, recipe
from tests.cli.test_bad_input import contents, refused
from tests.cli.test_kill import children, rows, state

PAIR = ["--config", "strategy/ddp", "--trainer.devices", "2", "--data.init_args.batch_size", "4"]
SLOW = [{"class_path": "tests.cli.test_kill.Slow"}]

pytestmark = pytest.mark.slow


def test_two_ranks_speak_and_write_once(corpus, tmp_path):
    recipe(tmp_path, corpus, **{"trainer.enable_model_summary": True})
    result = execute("fit", "--config", "tiny.yaml", *PAIR, cwd=tmp_path)
    assert result.code == 0, result.err
    for line in ("run folder: runs/tiny-1", "Report: "):
        assert result.out.count(line) == 1, result.out
    said = [line for line in (result.out + result.err).splitlines() if any(c.isalpha() for c in line)]
    assert len(said) == len(set(said)), said
    assert "rank: 1" not in result.err.lower()
    assert [int(r["step"]) for r in rows(tmp_path / "runs" / "tiny-1")] == list(range(6))
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["tiny-1"]


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--config", "strategy/zero2_cpu", "--model.init_args.optimizer", "scion"], ["'scion'", "whole matrices"]),
        ([*PAIR, "--data.init_args.batch_size", "1000"], ["use more text"]),
    ],
    ids=["zero", "data"],
)
def test_what_two_ranks_refuse_is_said_once(args, parts, corpus, tmp_path):
    recipe(tmp_path, corpus)
    before = contents(tmp_path)
    refused(execute("fit", "--config", "tiny.yaml", *args, cwd=tmp_path), *parts)
    assert contents(tmp_path) == before


@contextmanager
def training(folder: Path, *args: str) -> Iterator[tuple[int, int, Path]]:
    """Start two ranks; yield their process ids, once they train, and where they write what they say."""
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [EXECUTABLE, "fit", "--config", "tiny.yaml", *args],
            cwd=folder, env=os.environ | ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    second = 0
    try:
        until(lambda: log.read_text().count("TRAINING") > 6 or process.poll() is not None, 240)
        (second,) = children(process.pid)
        yield process.pid, second, log
        assert process.wait(60) != 0
        until(lambda: state(second) == "Z", 60)
    finally:
        for pid in (process.pid, second):
            if pid and state(pid) != "Z":
                os.kill(pid, signal.SIGKILL)
        process.wait()


def until(condition: Any, limit: float) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("victim", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize("strategy", ["ddp", "zero2_cpu"])
def test_neither_rank_outlives_the_other(strategy, victim, corpus, tmp_path):
    recipe(tmp_path, corpus, **{"trainer.max_steps": 100000, "trainer.callbacks": SLOW})
    args = ["--config", f"strategy/{strategy}", "--trainer.devices", "2", "--data.init_args.batch_size", "4"]
    with training(tmp_path, *args) as (*ranks, log):
        os.kill(ranks[victim], signal.SIGKILL)
    # Who notices first has the word: the other rank's collective, or Lightning, which started them.
    assert re.search("rror|terminated with code -9", log.read_text())


def test_a_killed_zero_run_leaves_whole_checkpoints_and_goes_on(corpus, tmp_path):
    changes = {"trainer.max_steps": 40, "trainer.callbacks": SLOW, "model.init_args.schedule": "constant"}
    recipe(tmp_path, corpus, **changes)
    args = ["--config", "strategy/zero2_cpu", "--data.init_args.batch_size", "4", "--checkpoint_every", "1", "--run"]
    folder = tmp_path / "run" / "checkpoints"
    with training(tmp_path, *args, "run", "--trainer.max_steps", "100000") as (first, second, _):
        # Half written: the first rank's file is there, the second one's is not yet.
        until(lambda: list(folder.glob("*.tmp/checkpoint/mp_rank_00_model_states.pt")), 60)
        for pid in (second, first):
            os.kill(pid, signal.SIGKILL)
    found = checkpoints(folder)
    assert found
    for path in found:
        load_checkpoint(path)
    step = int(found[-1].stem.partition("=")[2])
    steps = ["--trainer.max_steps", str(step + 3)]
    done = execute("fit", "--config", "tiny.yaml", *args, "run", "--resume", *steps, cwd=tmp_path)
    assert done.code == 0, done.err
    assert [int(r["step"]) for r in rows(tmp_path / "run")] == list(range(step + 3))
    assert [p.name for p in sorted(folder.iterdir())] == [f"step={step + n:08d}.ckpt" for n in (2, 3)]


def test_the_packaged_strategies_are_listed_apart_and_say_what_they_are(evolute, tmp_path):
    result = evolute("recipes", cwd=tmp_path)
    first, _, second = result.out.partition("\n\n")
    assert "strategy/" not in first
    for name, path in strategies().items():
        assert f"\n{name} " in second
        text = Path(path).read_text()
        assert f"--config {name}" in text
        assert all(len(line) <= 200 for line in text.splitlines())

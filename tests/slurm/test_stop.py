"""Stopping when told, in one process: where the run stops, what is saved, what the exit code is."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.callbacks import Callback

from evolute.callbacks import RunCheckpoint
from evolute.callbacks.run_checkpoint import checkpoints
from evolute.requeue import Interrupted, StopWhenTold, interruptible
from tests.cli.conftest import ENVIRONMENT, Server, evolute, recipe  # noqa: F401  (a fixture)
from tests.cli.test_bad_input import refused
from tests.cli.test_commands import equal_runs
from tests.cli.test_kill import children, until
from tests.cli.test_loggers import history, records
from tests.conftest import fit


class ToldAt(Callback):
    """Hears the signal during a batch, counted from 0."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.heard = False
        self.handlers: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.handlers.append(signal.getsignal(signal.SIGTERM))
        self.heard = self.heard or len(self.handlers) > self.batch


@pytest.mark.parametrize(
    ("batch", "accumulate", "step"), [(0, 1, 1), (3, 1, 4), (0, 3, 1), (2, 3, 1), (3, 3, 2), (5, 3, 2)]
)
def test_it_stops_saved_at_the_end_of_the_step_in_which_it_was_told(batch, accumulate, step, tmp_path):
    told = ToldAt(batch)
    checkpoint = RunCheckpoint(every_n_steps=1000)
    callbacks = [checkpoint, StopWhenTold(checkpoint, lambda: told.heard), told]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as stopped:
        fit(callbacks, default_root_dir=tmp_path, accumulate_grad_batches=accumulate)
    assert str(stopped.value) == f"told to stop, saved at step {step}"
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == [f"step={step:08d}.ckpt"]
    assert len(told.handlers) == step * accumulate
    assert {before} == {*told.handlers, signal.getsignal(signal.SIGTERM)}  # Lightning put none of its own


def test_told_before_the_first_step_it_saves_nothing(tmp_path):
    checkpoint = RunCheckpoint(every_n_steps=1)
    with pytest.raises(Interrupted):
        fit([checkpoint, StopWhenTold(checkpoint, lambda: True)], default_root_dir=tmp_path)
    assert not checkpoints(tmp_path / "checkpoints")


def test_told_again_where_it_resumed_it_keeps_the_checkpoint_it_has(tmp_path):
    first = RunCheckpoint(every_n_steps=1000)
    fit([first], default_root_dir=tmp_path, max_steps=3)
    (saved,) = checkpoints(tmp_path / "checkpoints")
    content = saved.read_bytes()
    again = RunCheckpoint(every_n_steps=1000)
    with pytest.raises(Interrupted) as stopped:
        fit([again, StopWhenTold(again, lambda: True)], default_root_dir=tmp_path, ckpt_path=str(saved))
    assert str(stopped.value) == "told to stop, saved at step 3"
    assert saved.read_bytes() == content


def test_an_error_after_the_signal_is_an_interruption_and_before_it_an_error(capsys):
    with pytest.raises(Interrupted, match=r"failed before it was saved \(RuntimeError\)"), interruptible(lambda: True):
        raise RuntimeError("a worker was terminated")
    assert "a worker was terminated" in capsys.readouterr().err
    with pytest.raises(RuntimeError), interruptible(lambda: False):
        raise RuntimeError("broken")
    with pytest.raises(Interrupted, match=r"^saved$"), interruptible(lambda: True):
        raise Interrupted("saved")


STEPS = 40
SLOW = {
    "trainer.max_steps": STEPS,
    "data.init_args.num_workers": 1,
    "trainer.callbacks": [{"class_path": "tests.cli.test_kill.Slow"}],
}


def test_a_job_that_was_told_leaves_with_75_and_the_same_command_continues_it(evolute: Server, corpus, tmp_path):  # noqa: F811
    """SLURM signals every process of a step: loader workers and W&B's own process as well."""
    recipe(tmp_path, corpus, **SLOW)
    command = ["fit", "--config", "tiny.yaml", "--checkpoint_every", "1000", "--wandb", "true", "--resume", "auto"]
    job = {"SLURM_JOB_ID": "1", "WANDB_MODE": "offline"}
    assert evolute(*command, "--run", "whole", cwd=tmp_path, **job).code == 0
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        pid = evolute.start(*command, "--run", "told", cwd=tmp_path, **job)
        assert until(lambda: "TRAINING" in evolute.out.read_text(), pid), evolute.err.read_text()
        for process in descendants(pid):
            os.kill(process, number)
        result = evolute.wait()
        assert result.code == 75, result
        assert "told to stop, saved at step" in result.out
    result = evolute(*command, "--run", "told", cwd=tmp_path, **job)
    assert result.code == 0, result.err
    equal_runs(tmp_path / "whole", tmp_path / "told", step=STEPS)
    for name in ("config.yaml", "config.1.yaml", "config.3.yaml"):
        assert "resume" not in yaml.safe_load((tmp_path / "told" / name).read_text())
    steps = {name: losses(tmp_path / name) for name in ("whole", "told")}
    assert sorted(steps["told"]) == sorted(steps["whole"])
    assert len(steps["told"]) == STEPS
    assert {entry.run_id for entry in records(tmp_path / "told")["run"]} == {
        (tmp_path / "told" / "wandb" / "run_id").read_text()
    }
    assert not (tmp_path / "told" / "wandb" / "unsent.jsonl").exists()


def descendants(pid: int) -> list[int]:
    """A process and all below it, children first."""
    return [p for child in children(pid) for p in descendants(child)] + [pid]


def losses(run: Path) -> list[tuple[int, float]]:
    """Step and loss of each training step that W&B has."""
    return [(e["trainer/global_step"], e["train/loss"]) for e in history(run) if "train/loss" in e]


def test_pools_in_a_job_can_still_end_their_workers():
    script = (
        "import multiprocessing; from evolute.signals import listen; assert listen();"
        "pool = multiprocessing.get_context('fork').Pool(2); pool.map(abs, [1]); pool.terminate(); pool.join();"
        "print('ended')"
    )
    env = os.environ | ENVIRONMENT | {"SLURM_JOB_ID": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("ended\n", "")


@pytest.mark.parametrize("number", ["SIGUSR1", "SIGTERM"])
def test_a_signal_while_python_takes_itself_apart_does_not_undo_a_finished_run(number):
    code = (
        "import os, signal; from evolute.signals import listen; assert listen();"
        "Late = type('Late', (), {'__del__': lambda self, kill=os.kill, pid=os.getpid(), "
        f"number=signal.{number}: (kill(pid, number), print('sent'))}}); late = Late()"
    )
    environment = {**os.environ, "SLURM_JOB_ID": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "sent\n"), done.stderr


def test_outside_a_job_sigterm_is_not_ours(evolute: Server, corpus, tmp_path):  # noqa: F811
    recipe(tmp_path, corpus, **SLOW)
    pid = evolute.start("fit", "--config", "tiny.yaml", "--run", "run", cwd=tmp_path)
    assert until(lambda: "TRAINING" in evolute.out.read_text(), pid), evolute.err.read_text()
    os.kill(pid, signal.SIGUSR1)
    assert evolute.wait().code == -signal.SIGUSR1


def test_resume_auto_needs_a_folder(evolute: Server, corpus, tmp_path):  # noqa: F811
    recipe(tmp_path, corpus)
    refused(evolute("fit", "--config", "tiny.yaml", "--resume", "auto", cwd=tmp_path), "--resume needs --run")
    refused(evolute("fit", "--config", "tiny.yaml", "--resume", "perhaps", "--run", "x", cwd=tmp_path), "resume")

"""Real runs of two ranks on a real SLURM: preempted, cut off, killed, and still the run that was left alone."""

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from tests.cli.conftest import recipe
from tests.cli.test_kill import callback, plain, rows
from tests.slurm.conftest import Cluster, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # a start is all imports: slow where the machine is busy

STEPS = 200
LONG = 220  # of half a second at least: more than the time limit


class Pace(Callback):
    """Gives the signals time, and says where the run is."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.is_global_zero:
            print(f"STEP {trainer.global_step}", flush=True)
        time.sleep(float(os.environ.get("PACE", "0.015")))


@pytest.fixture(scope="module")
def work(tmp_path_factory, corpus) -> Path:
    work = tmp_path_factory.mktemp("work")
    recipe(work, corpus, **{
        "data.init_args.num_workers": 1,
        "trainer.max_steps": STEPS,
        "data.init_args.batch_size": 4,
        "trainer.accumulate_grad_batches": 4,  # two of four on each of two ranks
        "trainer.val_check_interval": 100,
        "trainer.limit_val_batches": 2,
        "trainer.callbacks": [callback("NoiseAdaptiveLR", every_n_steps=2), {"class_path": f"{__name__}.Pace"}],
    })  # fmt: skip
    return work


class Run:
    """A run of two ranks that ``evolute launch`` submitted."""

    def __init__(self, cluster: Cluster, work: Path, name: str, *options: str, tasks: int = 2, **env: str) -> None:
        self.cluster = cluster
        self.folder = work / name
        said = cluster.run(
            "evolute", "launch", "--config", "tiny.yaml", "--gpus-per-node", "0",
            "--ntasks-per-node", str(tasks), "--cpus-per-task", "1", "--run", name, "--checkpoint_every", "100000",
            "--wandb", "true", *options, WANDB_MODE="offline", WANDB_SILENT="true", cwd=work, **env,
        )  # fmt: skip
        self.job = said.split()[1]
        assert said.startswith(f"job {self.job}\n")
        assert f"run folder: {name}\nlog: {name}/slurm-{self.job}.out\nfollow: tail -F {name}/slurm-" in said

    def text(self) -> str:
        log = self.folder / f"slurm-{self.job}.out"
        return log.read_text() if log.exists() else ""

    def started(self, start: int) -> None:
        until(lambda: f", start {start}," in self.text(), 240, self.text)

    def steps(self, start: int, least: int = 1) -> None:
        """Wait until the given start has taken a number of steps."""
        self.started(start)
        until(lambda: self.text().partition(f", start {start},")[2].count("STEP") >= least, 240, self.text)

    def finished(self) -> None:
        self.cluster.wait(self.job, "COMPLETED", "FAILED", "CANCELLED", limit=300, log=self.text)
        assert self.cluster.state(self.job) == "COMPLETED", self.text()


@pytest.fixture(scope="module")
def limited(cluster, work) -> Iterator[Run]:
    """A run that is longer than its time limit of two minutes. It takes its time beside the other tests."""
    run = Run(cluster, work, "limited", "--time", "2", "--partition", "urgent", "--startup", "30", "--grace", "20",
              "--trainer.max_steps", str(LONG), tasks=1, PACE="0.125")  # fmt: skip
    cluster.kept.add(run.job)
    yield run
    cluster.run("scancel", run.job)
    cluster.kept.discard(run.job)


@pytest.fixture(scope="module")
def whole(cluster, work, limited) -> Path:
    """The run that was left alone."""
    run = Run(cluster, work, "whole", "--time", "30")
    run.finished()
    assert [int(row["step"]) for row in rows(run.folder) if "train/loss" in row] == list(range(STEPS))
    return run.folder


def equal(one: Path, other: Path) -> None:
    ours, theirs = (
        torch.load(run / "checkpoints" / f"step={STEPS:08d}.ckpt", weights_only=True) for run in (one, other)
    )
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert plain(ours[key]) == plain(theirs[key]), key
    assert rows(one) == rows(other)
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()


def wandb_ids(folder: Path) -> list[str]:
    return [path.name.rpartition("-")[2] for path in folder.glob("wandb/offline-run-*")]


def test_preempted_five_times_equals_left_alone(cluster, work, whole):
    draw = random.Random()  # another moment every time
    run = Run(cluster, work, "broken", "--time", "30")
    ways = [
        ["scancel", "--batch", "--signal=USR1", run.job],
        ["scancel", "--signal=TERM", run.job],
        # All other processors but one are free: it needs those of our two ranks.
        ["sbatch", "--partition=urgent", "--ntasks=15", "--output=/dev/null", "--wrap=sleep 1"],
        ["scancel", "--full", "--signal=USR1", run.job],
        ["scancel", "--signal=USR1", run.job],
    ]
    early = draw.choice([0, 2, 3])  # a task that does not listen yet dies; that a step alone was told, SLURM forgets
    for start, way in enumerate(ways, 1):
        if start - 1 == early:  # during the imports
            run.started(start)
            time.sleep(draw.uniform(0.5, 4))
        else:
            run.steps(start)
            time.sleep(draw.uniform(0, 0.6))
        cluster.run(*way)
    run.finished()
    text = run.text()
    assert text.count("back into the queue") == len(ways), text
    assert text.count("told to stop, saved at step") >= len(ways) - 1  # but for one that was too early to be heard
    assert cluster.show(run.job, "Restarts") == str(len(ways))
    equal(whole, run.folder)
    assert len(wandb_ids(run.folder)) >= len(ways)
    assert set(wandb_ids(run.folder)) == {(run.folder / "wandb" / "run_id").read_text()}


def test_one_rank_killed_ends_the_other_and_the_job(cluster, work, whole):
    run = Run(cluster, work, "killed", "--time", "30")
    run.steps(1, least=5)
    for pid in cluster.processes():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        command = Path(f"/proc/{pid}/cmdline").read_text()
        if b"SLURM_PROCID=1" in environment and f"SLURM_JOB_ID={run.job}".encode() in environment and "fit" in command:
            os.kill(pid, signal.SIGKILL)
    cluster.wait(run.job, "FAILED", limit=60)
    assert cluster.show(run.job, "Restarts") == "0"
    until(lambda: run.job not in cluster.run("squeue", "--noheader", "--format=%i"), 60)
    assert not list(run.folder.glob("checkpoints/*"))


def test_a_run_longer_than_its_time_limit_is_continued(cluster, limited):
    until(lambda: cluster.state(limited.job) not in ("RUNNING", "PENDING", "COMPLETING"), 300, limited.text, every=1)
    assert cluster.state(limited.job) == "COMPLETED", limited.text()
    assert "train.sbatch: told to stop by SIGUSR1" in limited.text()
    assert limited.text().count("told to stop, saved at step") == int(cluster.show(limited.job, "Restarts")) >= 1
    assert [int(row["step"]) for row in rows(limited.folder) if "train/loss" in row] == list(range(LONG))
    cluster.kept.discard(limited.job)


def test_a_node_that_fails_continues_at_the_newest_whole_checkpoint(cluster, work, whole):
    run = Run(cluster, work, "failed", "--time", "30", "--checkpoint_every", "20")
    until(lambda: len(list(run.folder.glob("checkpoints/*.ckpt"))) == 2, 240, run.text)
    time.sleep(random.uniform(0, 0.5))
    cluster.power_off()
    assert len(rows(run.folder)) < STEPS
    assert "srun:" not in run.text()  # dead at once: it asked slurmctld for nothing
    cluster.power_on()
    run.finished()
    assert cluster.show(run.job, "Restarts") == "1"
    equal(whole, run.folder)
    assert not list(run.folder.glob("checkpoints/*.tmp"))
    assert re.search(r"start 2,.*STEP [2-9]\d", run.text(), re.DOTALL)


@pytest.mark.parametrize("option", ["--sbatch=--dependency=nonsense", "--gpus-per-node=1", "--partition=gpu"])
def test_what_this_cluster_cannot_do_is_refused_in_one_line_and_nothing_is_left(option, cluster, work):
    command = ["evolute", "launch", "--config", "tiny.yaml", "--gpus-per-node", "0", "--run", "none/below", option]
    refused = subprocess.run(command, cwd=work, env=cluster.env, capture_output=True, text=True, timeout=60)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("evolute: error: ")
    assert refused.stderr.count("\n") == 1
    assert not (work / "none").exists()

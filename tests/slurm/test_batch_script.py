"""``slurm/train.sbatch`` on a real SLURM: when it puts its job back into the queue, and when not."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.conftest import REPOSITORY, SCRIPT, Cluster, until

pytestmark = pytest.mark.slow

TASK = Path(__file__).with_name("task.py")


class Submitted:
    """A job of two tasks that runs ``task.py``."""

    def __init__(self, cluster: Cluster, folder: Path, *options: str, **env: str) -> None:
        self.cluster = cluster
        self.output = folder / "out"
        self.job = cluster.run(
            "sbatch", "--parsable", "--nodes=1", "--ntasks-per-node=2", f"--output={self.output}", *options, SCRIPT,
            "--config", "recipe", EVOLUTE=str(TASK), **env,
        ).strip()  # fmt: skip

    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def running(self, start: int = 1, limit: float = 60) -> None:
        """Wait until both tasks of the given start run."""
        until(lambda: f", start {start}," in self.text(), limit, self.text)
        until(lambda: self.text().rpartition(", start ")[2].count(" runs fit --config recipe") == 2, 30, self.text)

    def ended(self, state: str) -> str:
        self.cluster.wait(self.job, state, limit=60)
        return self.text()


WAYS = {
    "steps": ["scancel", "--signal=USR1"],
    "batch": ["scancel", "--batch", "--signal=USR1"],
    "both": ["scancel", "--full", "--signal=USR1"],
    "terminated": ["scancel", "--signal=TERM"],
}


@pytest.fixture(scope="module")
def limited(cluster, tmp_path_factory) -> Iterator[Submitted]:
    """A job that does not stop when told to, with a time limit of a minute: it runs beside the other tests."""
    job = Submitted(
        cluster, tmp_path_factory.mktemp("limited"), "--time=1", "--signal=B:USR1@5", "--partition=urgent",
        SECONDS="300", TASK="ignore",
    )  # fmt: skip
    cluster.kept.add(job.job)
    yield job
    cluster.run("scancel", job.job)
    cluster.kept.remove(job.job)


def test_a_job_that_was_told_to_stop_and_saved_goes_back_into_the_queue(limited, cluster, tmp_path):
    jobs: dict[str, Submitted] = {}
    for way in WAYS:
        (tmp_path / way).mkdir()
        jobs[way] = Submitted(cluster, tmp_path / way, SECONDS="6")
    for way, job in jobs.items():
        job.running()
        cluster.run(*WAYS[way], job.job)
    for job in jobs.values():
        job.running(start=2)
        text = job.ended("COMPLETED")
        assert text.count("saved\n") == 1, text  # the first rank was let finish
        assert text.count("back into the queue") == 1
        assert text.count(" finished\n") == 2
        assert cluster.show(job.job, "Restarts") == "1"


def test_the_queue_is_not_asked_for_ever(cluster, tmp_path):
    job = Submitted(cluster, tmp_path, EVOLUTE_MAX_REQUEUES="0")
    job.running()
    cluster.run("scancel", "--signal=USR1", job.job)
    assert "not requeued any more after 0 times" in job.ended("FAILED")


def test_a_signal_before_any_task_listens_does_not_lose_the_job(cluster, tmp_path):
    job = Submitted(cluster, tmp_path, SECONDS="4", TASK="deaf")
    job.running()
    cluster.run("scancel", "--batch", "--signal=USR1", job.job)
    job.running(start=2)
    assert "saved" not in job.ended("COMPLETED")


def test_who_makes_room_for_a_more_urgent_job_runs_again_after_it(cluster, tmp_path):
    job = Submitted(cluster, tmp_path, SECONDS="6")
    job.running()
    jobs = len(cluster.run("squeue", "--noheader").splitlines())  # ours, and the limited one if it still runs
    wide = ["--partition=urgent", f"--ntasks={16 - 2 * jobs + 1}"]  # one more than is free
    urgent = cluster.run("sbatch", "--parsable", *wide, "--output=/dev/null", "--wrap=sleep 2").strip()
    cluster.wait(urgent, "COMPLETED", limit=60)
    job.running(start=2)
    text = job.ended("COMPLETED")
    assert text.count("saved\n") == text.count("back into the queue") == 1


def test_a_cancelled_job_stays_cancelled(cluster, tmp_path):
    job = Submitted(cluster, tmp_path)
    job.running()
    cluster.run("scancel", job.job)
    text = job.ended("CANCELLED")
    until(lambda: "not requeued here" in job.text(), 30, job.text)
    assert "back into the queue" not in text
    assert cluster.show(job.job, "Restarts") == "0"


@pytest.mark.parametrize(("task", "code"), [("die", "137:0"), ("refuse", "2:0")])
def test_a_failure_fails_and_takes_the_other_rank_along(task, code, cluster, tmp_path):
    job = Submitted(cluster, tmp_path, TASK=task, SECONDS="60")
    until(lambda: " runs " in job.text(), 30, job.text)
    if task == "refuse":
        job.running()
        cluster.run("scancel", "--batch", "--signal=USR1", job.job)
    text = job.ended("FAILED")
    assert "back into the queue" not in text
    assert " finished" not in text
    assert cluster.show(job.job, "ExitCode") == code


def test_an_accident_after_the_warning_is_no_failure(cluster, tmp_path):
    job = Submitted(cluster, tmp_path, TASK="fail", SECONDS="4")
    job.running()
    cluster.run("scancel", "--batch", "--signal=USR1", job.job)
    job.running(start=2)
    job.ended("COMPLETED")


def test_one_task_of_an_array_is_requeued_alone(cluster, tmp_path):
    lines = "--seed_everything 0\n--run 'a b'"
    submitted = Submitted(cluster, tmp_path, "--array=0-1", "--output=" + str(tmp_path / "%a"), EVOLUTE_ARRAY=lines,
                          SECONDS="8")  # fmt: skip
    array, first, last = submitted.job, tmp_path / "0", tmp_path / "1"
    until(lambda: first.exists() and last.exists(), 60)
    until(lambda: all(f.read_text().count(" runs ") == 2 for f in (first, last)), 60)
    assert "runs fit --config recipe --seed_everything 0\n" in first.read_text()
    assert "runs fit --config recipe --run a b\n" in last.read_text()
    # The last task of an array has the number of the whole array.
    cluster.run("scancel", "--batch", "--signal=USR1", f"{array}_1")
    until(lambda: ", start 2," in last.read_text(), 60)
    for task in (0, 1):
        cluster.wait(f"{array}_{task}", "COMPLETED", limit=60)
    assert first.read_text().count(" finished") == last.read_text().count(" finished") == 2
    assert ", start 2," not in first.read_text()


def test_launch_gives_each_task_of_an_array_its_seed_and_folder(cluster, tmp_path):
    said = cluster.run(
        "evolute", "launch", "--config", "llm/pretrain", "--gpus-per-node", "0", "--time", "20", "--run", "a run",
        "--array", "seeds=3-4", EVOLUTE=str(TASK), SECONDS="0", cwd=tmp_path,
    )  # fmt: skip
    array = said.split()[1]
    for task, seed in enumerate((3, 4)):
        cluster.wait(f"{array}_{task}", "COMPLETED", limit=60)
        text = (tmp_path / "a run" / f"slurm-{array}_{task}.out").read_text()
        assert "--trainer.devices 1 --data.init_args.batch_size 16" in text
        assert f"--resume auto --run a run/seed={seed} --seed_everything {seed}\n" in text


def test_two_clusters_do_not_meet(cluster, tmp_path):
    """A second cluster on the same port is refused, and leaves the first one alone."""
    conf = Path(cluster.env["SLURM_CONF"])
    port = next(line.partition("=")[2] for line in conf.read_text().splitlines() if line.startswith("SlurmctldPort="))
    env = cluster.env | {"SLURM_LOCAL_DIR": str(tmp_path / "second"), "SLURM_LOCAL_PORT": port}
    up = subprocess.run([REPOSITORY / "slurm" / "local" / "up.sh"], env=env, capture_output=True, text=True)
    assert (up.returncode, up.stdout, up.stderr.count("\n")) == (1, "", 1)
    assert f"port {port} is taken" in up.stderr
    assert not list(tmp_path.iterdir())
    again = subprocess.run([REPOSITORY / "slurm" / "local" / "up.sh"], env=env | {"SLURM_LOCAL_DIR": str(conf.parent)},
                           capture_output=True, text=True)  # fmt: skip
    assert again.returncode == 1
    assert "exists" in again.stderr
    assert cluster.run("sinfo", "--noheader", "--format=%P")


def test_a_job_at_its_time_limit_that_did_not_save_is_queued_again(limited, cluster):
    limited.running(start=2, limit=200)
    assert "told to stop by SIGUSR1" in limited.text()
    assert "DUE TO TIME LIMIT" in limited.text()
    assert limited.text().count("back into the queue") == 1

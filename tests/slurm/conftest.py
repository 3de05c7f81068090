"""A real SLURM of one node for the tests that need one, and jobs on it."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cli.conftest import corpus  # noqa: F401  (a fixture)

REPOSITORY = Path(__file__).parents[2]
LOCAL = REPOSITORY / "slurm" / "local"
SCRIPT = REPOSITORY / "slurm" / "train.sbatch"
DAEMONS = {"munged", "slurmctld", "slurmscriptd", "slurmd"}


def until(condition: Callable[[], object], limit: float, what: object = "", every: float = 0.05) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: if it does not within ``limit`` seconds, with what ``what`` is, or returns, by then.
    """
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(what() if callable(what) else what)
        time.sleep(every)


@dataclass
class Cluster:
    """The running cluster.

    Attributes:
        folder: everything of it.
        env: environment of a process that talks to it.
        kept: jobs that outlive the test that began them.
    """

    folder: Path
    env: dict[str, str]
    kept: set[str] = field(default_factory=set)

    def run(self, *command: str | Path, cwd: Path | None = None, **env: str) -> str:
        """Run a command; return what it printed."""
        done = subprocess.run(command, cwd=cwd, env=self.env | env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def show(self, job: int | str, key: str) -> str:
        """Return one field of ``scontrol show job``."""
        words = self.run("scontrol", "--oneliner", "show", "job", str(job)).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{key}="))

    def state(self, job: int | str) -> str:
        return self.show(job, "JobState")

    def wait(self, job: int | str, *states: str, limit: float, log: Callable[[], str] = str) -> None:
        """Wait until a job is in one of the states; where it does not, say what ``log`` returns as well."""

        def what() -> str:
            daemon = (self.folder / "log" / "slurmctld.log").read_text()[-4000:]
            return f"job {job} is {self.state(job)}, not {states}\n{log()}\n{self.processes()}\n{daemon}"

        until(lambda: self.state(job) in states, limit, what, 0.3)

    def processes(self) -> dict[int, str]:
        """Return the processes that carry the cluster's SLURM_CONF, with their names: daemons, steps and tasks."""
        mine = f"SLURM_CONF={self.env['SLURM_CONF']}".encode()
        found: dict[int, str] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mine in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "comm").read_text().strip()
            except OSError:
                continue
        return found

    def power_off(self) -> None:
        """End everything on the node at once, as a power cut would, until SLURM has noticed.

        All is frozen before any of it is killed, and srun is killed first: an srun that sees its tasks die, or that the
        kernel wakes (SIGHUP, SIGCONT) because the parent of its stopped process group died, asks slurmctld to end the
        step, and slurmctld repeats that for a node that does not answer, a minute later, to the same step of the next
        start.
        """
        for signum in (signal.SIGSTOP, signal.SIGKILL):
            for _ in range(3):  # what was being started meanwhile as well
                for pid, name in sorted(self.processes().items(), key=lambda item: item[1] != "srun"):
                    if name not in DAEMONS - {"slurmd"}:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signum)
                time.sleep(0.1)

        until(lambda: "down" in self.run("sinfo", "--noheader", "--format=%T"), 60, "the node is still up", every=0.3)

    def power_on(self) -> None:
        self.run("slurmd")


def free_port() -> int:
    """Return a port that is free, with the next one free too, below those that Linux hands out."""
    for port in range(16900, 20000, 2):
        with socket.socket() as one, socket.socket() as two:
            try:
                one.bind(("127.0.0.1", port))
                two.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of our own; in CI it must start, elsewhere the tests are skipped where SLURM is not installed."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    if os.environ.get("CI") != "true":
        if shutil.which("slurmctld", path=path) is None or shutil.which("munged", path=path) is None:
            pytest.skip("no slurmctld: apt-get install --no-install-recommends slurm-wlm munge")
        if os.geteuid() != 0:
            pytest.skip("a SLURM of our own needs root")
    folder = tmp_path_factory.mktemp("slurm") / "cluster"
    port = free_port()
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SINFO"))}
    own = {"SLURM_LOCAL_DIR": str(folder), "SLURM_LOCAL_PORT": str(port), "SLURM_LOCAL_CPUS": "16", "PATH": path}
    up = subprocess.run([LOCAL / "up.sh"], env=clean | own, capture_output=True, text=True, timeout=60)
    assert up.returncode == 0, up.stderr
    assert up.stdout == f"export SLURM_CONF={folder}/slurm.conf\n"
    ours = {
        "SLURM_CONF": f"{folder}/slurm.conf",
        "PATH": f"{Path(sys.executable).parent}:{path}",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    cluster = Cluster(folder, clean | ours)
    try:
        yield cluster
    finally:
        down = subprocess.run([LOCAL / "down.sh"], env=clean | own, capture_output=True, text=True, timeout=60)
    assert (down.returncode, down.stderr) == (0, "")
    assert not folder.exists()
    assert cluster.processes() == {}
    for taken in (port, port + 1):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", taken)) != 0


@pytest.fixture(autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test on the cluster, end its jobs."""
    yield
    if "cluster" in request.fixturenames:
        running: Cluster = request.getfixturevalue("cluster")

        def jobs() -> set[str]:
            return set(running.run("squeue", "--noheader", "--format=%F").split()) - running.kept

        for job in jobs():
            running.run("scancel", job)
        until(lambda: not jobs(), 60, lambda: running.run("squeue"), every=0.3)
        if not running.kept:
            until(lambda: set(running.processes().values()) <= DAEMONS, 20, running.processes, every=0.3)

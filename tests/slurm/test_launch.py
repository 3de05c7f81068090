"""``evolute launch`` without a cluster, with stand-ins for ``sinfo`` and ``sbatch``: what it checks and submits."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from evolute.launch import launch, parse_axis, points
from evolute.partitions import Nodes, gpus_of, parse_sinfo, parse_time
from evolute.recipe_file import Recipe, overrides
from tests.cli.conftest import ENVIRONMENT, execute
from tests.cli.test_bad_input import contents

SINFO = """\
gpu*|up|4|128|gpu:a100:8(S:0-1)|2-00:00:00|1:00:00
gpu*|up|2|64|gpu:h100:4,shard:8|2-00:00:00|1:00:00
cpu|up|10|64+|(null)|infinite|n/a
short|up|4|128|gpu:a100:8|2:00|n/a
closed|down|4|128|gpu:8|infinite|n/a
"""


class Machine:
    """A folder with a recipe, where ``sbatch`` keeps what it was given."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder / "work"
        self.bin = folder / "bin"
        self.submitted = folder / "submitted"
        self.capsys = capsys
        self.folder.mkdir()
        self.bin.mkdir()
        self.program("sinfo", f"cat <<'EOF'\n{SINFO}EOF")
        self.program("sbatch", f'printf "%s\\0" "$EVOLUTE" "$EVOLUTE_ARRAY" "$@" > {self.submitted}; echo "42;here"')

    def program(self, name: str, body: str) -> None:
        file = self.bin / name
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)

    def recipe(self, **trainer: object) -> None:
        data = {"class_path": "x.Y", "init_args": {"batch_size": 32, "num_workers": 3}}
        (self.folder / "r.yaml").write_text(yaml.safe_dump({"data": data, "trainer": {"devices": 1, **trainer}}))

    def launch(self, *args: str, config: str = "r.yaml") -> tuple[int, str, str]:
        code = launch(["--config", config, *args])
        return (code, *self.capsys.readouterr())

    def given(self) -> list[str]:
        """What sbatch was given: EVOLUTE, EVOLUTE_ARRAY, then its arguments."""
        return self.submitted.read_text().split("\0")[:-1]


@pytest.fixture
def machine(tmp_path, capsys, monkeypatch) -> Machine:
    machine = Machine(tmp_path, capsys)
    machine.recipe()
    monkeypatch.setenv("PATH", f"{machine.bin}:/usr/bin:/bin")
    monkeypatch.delenv("SBATCH_PARTITION", raising=False)
    monkeypatch.delenv("EVOLUTE", raising=False)
    monkeypatch.chdir(machine.folder)
    return machine


GPUS = ["--gpus-per-node", "8"]
# name: (arguments, what the line says)
REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "gpus": (["--gpus-per-node", "9"], ["--gpus-per-node 9", "'gpu'", "8 GPUs"]),
    "gpus-none": ([*GPUS, "--partition", "cpu"], ["'cpu'", "0 GPUs"]),
    "gpus-unsaid": ([], ["--gpus-per-node"]),
    "gpus-what": (["--gpus-per-node", "many"], ["--gpus-per-node", "'many'", "at least 0"]),
    "nodes": ([*GPUS, "--nodes", "8"], ["--nodes 8", "'gpu' has 4 nodes"]),
    "nodes-none": ([*GPUS, "--nodes", "0"], ["--nodes", "at least 1"]),
    "cpus": ([*GPUS, "--cpus-per-task", "17"], ["136 processors", "'gpu'", "128"]),
    "partition": ([*GPUS, "--partition", "gpus"], ["--partition gpus", "did you mean 'gpu'"]),
    "partition-list": ([*GPUS, "--partition", "gpu,cqu"], ["--partition cqu", "did you mean 'cpu'"]),
    "partition-closed": ([*GPUS, "--partition", "closed"], ["--partition closed", "no jobs"]),
    "time-short": ([*GPUS, "--time", "5"], ["--time 5", "300 s", "--startup 120", "--grace 120", "more than 5 min"]),
    "time-seconds": ([*GPUS, "--time", "0:50"], ["--time 0:50", "50 s"]),
    "time-startup": ([*GPUS, "--time", "1:00:00", "--startup", "3500"], ["--startup 3500"]),
    "time-long": ([*GPUS, "--time", "3-0"], ["--time", "4320 minutes", "'gpu' allows 2880"]),
    "time-what": ([*GPUS, "--time", "soon"], ["--time soon", "H:M:S"]),
    "time-default": ([*GPUS, "--partition", "short"], ["default time of partition 'short'", "120 s"]),
    "batch": ([*GPUS, "--nodes", "3"], ["32 samples", "24 ranks", "--global-batch 24 or 48"]),
    "batch-given": ([*GPUS, "--global-batch", "100"], ["100 samples", "--global-batch 96 or 104"]),
    "batch-small": ([*GPUS, "--nodes", "4", "--data.batch_size", "16"], ["16 samples", "--global-batch 32 would"]),
    "batch-unsaid": ([*GPUS, "--data.init_args.batch_size", "null"], ["data.init_args.batch_size"]),
    "tasks": ([*GPUS, "--ntasks-per-node", "4"], ["--ntasks-per-node 4", "--gpus-per-node 8"]),
    "devices": ([*GPUS, "--trainer.devices", "4"], ["--trainer.devices", "--ntasks-per-node"]),
    "accelerator": ([*GPUS, "--trainer.accelerator", "cpu"], ["accelerator=cpu"]),
    "accelerator-none": (["--gpus-per-node", "0", "--trainer.accelerator", "cuda"], ["accelerator=cuda"]),
    "option": ([*GPUS, "--node", "2"], ["--node", "did you mean 'nodes'"]),
    "stray": ([*GPUS, "oops"], ["'oops'"]),
    "no-value": ([*GPUS, "--trainer.max_steps"], ["--trainer.max_steps needs a value"]),
    "folder": ([*GPUS, "--run", "r.yaml/run"], ["r.yaml/run", "cannot write"]),
    "folder-unwritable": ([*GPUS, "--run", "/proc/run"], ["/proc/run"]),
    "folder-taken": ([*GPUS, "--run", "old"], ["old holds a run already", "--resume"]),
    "folder-taken-array": ([*GPUS, "--run", "olds", "--array", "seeds=0-1"], ["olds/seed=1 holds a run"]),
    "resume-what": ([*GPUS, "--resume"], ["--resume needs --run"]),
    "array": ([*GPUS, "--array", "lr"], ["--array lr", "KEY=VALUE"]),
    "array-seeds": ([*GPUS, "--array", "seeds=4-0"], ["seeds=4-0"]),
    "array-twice": ([*GPUS, "--array", "model.lr=1,1"], ["twice"]),
    "array-batch": ([*GPUS, "--array", "data.init_args.batch_size=8,16"], ["batch_size", "--global-batch"]),
    "array-key": ([*GPUS, "--array", "seed=0,1"], ["--array seed", "did you mean 'seeds'"]),
    "array-large": ([*GPUS, "--array", "seeds=0-1000"], ["1001 tasks"]),
}  # fmt: skip


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_and_nothing_written_or_submitted(case, dry, machine, tmp_path):
    args, parts = REFUSED[case]
    for folder in ("old", "olds/seed=1"):
        (machine.folder / folder).mkdir(parents=True)
        (machine.folder / folder / "config.yaml").write_text("a: 1")
    before = contents(tmp_path)
    if case == "folder-unwritable" and os.geteuid() == 0:
        dry = False  # root seems to be able to write everywhere, until it tries
    code, out, err = machine.launch(*args, *(["--dry-run"] if dry else []))
    assert (code, out) == (2, "")
    assert err.startswith("evolute: error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err, err
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("config", "part"), [("llm/pretrian", "did you mean 'llm/pretrain'"), ("broken.yaml", "broken.yaml, line 2")]
)
def test_a_bad_recipe_is_refused(config, part, machine):
    (machine.folder / "broken.yaml").write_text("a: [1,\nb: }{\n")
    code, out, err = machine.launch(*GPUS, config=config)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert part in err


def test_what_it_submits_is_what_the_dry_run_prints(machine):
    args = ["--nodes", "2", *GPUS, "--time", "1-0", "--account", "a", "--qos", "q", "--sbatch=--mem=64G",
            "--trainer.max_steps", "9", "--global-batch", "1024", "--model.name", "a b"]  # fmt: skip
    code, out, err = machine.launch(*args, "--dry-run")
    assert (code, err) == (0, "")
    assert not (machine.folder / "runs").exists()
    comments = [line for line in out.splitlines() if line.startswith("# ")]
    printed = shlex.split("\n".join(out.splitlines()[len(comments) :]))
    assert "# 1024 samples a step = 16 ranks x 32 x 2 accumulated" in comments

    code, said, err = machine.launch(*args)
    assert (code, err) == (0, "")
    evolute, array, *given = machine.given()
    assert printed == ["mkdir", "-p", "runs/r-1", "&&", f"EVOLUTE={evolute}", "sbatch", *given]
    assert array == ""
    script = next(i for i, word in enumerate(given) if word.endswith("train.sbatch"))
    assert Path(given[script]).is_file()
    assert given[:script] == [
        "--parsable", "--job-name=r-1", "--nodes=2", "--ntasks-per-node=8", "--cpus-per-task=4", "--gpus-per-node=8",
        "--time=1-0", "--account=a", "--qos=q", "--signal=B:USR1@120", "--output=runs/r-1/slurm-%j.out", "--mem=64G",
    ]  # fmt: skip
    fit = overrides(given[script + 1 :])
    assert fit == {
        "config": "r.yaml", "trainer.max_steps": 9, "model.name": "a b", "trainer.accelerator": "gpu",
        "trainer.num_nodes": 2, "trainer.devices": 8, "data.init_args.batch_size": 32,
        "trainer.accumulate_grad_batches": 2, "run": "runs/r-1", "resume": "auto",
    }  # fmt: skip
    assert said.startswith("job 42\n")
    assert "\nrun folder: runs/r-1\nlog: runs/r-1/slurm-42.out\nfollow: tail -F runs/r-1/slurm-42.out; squeue" in said
    assert (machine.folder / "runs" / "r-1").is_dir()
    assert "runs/r-2" in machine.launch(*GPUS)[1]


def test_arrays_run_every_combination_each_in_a_folder_of_its_own(machine):
    code, out, err = machine.launch(*GPUS, "--array", "seeds=0-1", "--array", "model.init_args.lr=1e-3,0.1")
    assert (code, err) == (0, "")
    _, array, *given = machine.given()
    assert array.splitlines() == [
        f"--run runs/r-1/seed={seed},lr={lr} --seed_everything {seed} --model.init_args.lr {lr}"
        for seed in (0, 1)
        for lr in ("1e-3", "0.1")
    ]
    assert "--array=0-3" in given
    assert "--output=runs/r-1/slurm-%A_%a.out" in given
    assert "--run" not in given
    assert "log: runs/r-1/slurm-42_%a.out" in out
    assert "tail -F runs/r-1/slurm-42_0.out" in out


def test_a_run_is_continued_when_asked(machine):
    (machine.folder / "old").mkdir()
    (machine.folder / "old" / "config.yaml").write_text("a: 1")
    assert machine.launch(*GPUS, "--run", "old", "--resume")[0] == 0
    assert machine.given()[-4:] == ["--run", "old", "--resume", "auto"]


def test_what_sbatch_refuses_leaves_no_folder(machine, tmp_path):
    machine.program("sbatch", "echo 'sbatch: error: no' >&2; echo 'sbatch: error: never' >&2; exit 1")
    before = contents(tmp_path)
    for args in ([], ["--run", "a/b/c"], ["--array", "seeds=0-3"]):
        code, out, err = machine.launch(*GPUS, *args)
        assert (code, out, err) == (2, "", "evolute: error: sbatch: error: no; sbatch: error: never\n")
        assert contents(tmp_path).keys() == before.keys()


def test_without_slurm_the_dry_run_works_and_submitting_says_what_is_missing(machine, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "/nowhere")
    before = contents(tmp_path)
    code, out, err = machine.launch(*GPUS, "--partition", "any", "--dry-run")
    assert (code, err) == (0, "")
    assert "# not checked against the cluster: sinfo not found" in out
    assert "--partition=any" in out
    code, out, err = machine.launch(*GPUS)
    assert (code, out) == (2, "")
    assert err.startswith("evolute: error: sbatch not found")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("body", ["echo 'slurm_load_partitions: Unable to contact' >&2; exit 1", "exit 1"])
def test_a_silent_controller_is_said_and_does_not_hinder(body, machine):
    machine.program("sinfo", body)
    code, out, err = machine.launch(*GPUS)
    assert (code, err) == (0, "")
    assert "not checked against the cluster: " in out


@pytest.mark.parametrize(
    ("ranks", "total", "batch", "steps", "micro", "accumulated"),
    [(1, None, 32, 1, 32, 1), (2, None, 32, 4, 32, 2), (8, None, 32, 4, 16, 1), (3, 96, 20, 1, 16, 2),
     (1, 7, 3, 1, 1, 7), (2, None, 32, 3, 24, 2)],
)  # fmt: skip
def test_a_step_holds_the_same_samples_on_any_number_of_ranks(ranks, total, batch, steps, micro, accumulated, machine):
    given = {"data.init_args.batch_size": batch, "trainer.accumulate_grad_batches": steps}
    flags, _ = Recipe(["r.yaml"], given).share(ranks, total)
    assert flags[1::2] == [str(micro), str(accumulated)]
    assert micro <= batch
    assert micro * accumulated * ranks == (batch * steps if total is None else total)


def test_the_devices_that_a_recipe_names_count_as_its_batch(machine):
    machine.recipe(devices=[0, 1], num_nodes=2)
    assert Recipe(["r.yaml"], {}).share(8)[0][1] == "16"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 300), ("5:30", 330), ("1:0:0", 3600), ("1-0", 86400), ("1-2:3", 93780), ("1-2:3:4", 93784)],
)
def test_times_as_slurm_reads_them(text, seconds):
    assert parse_time(text) == seconds


def test_gpus_and_partitions_as_slurm_writes_them():
    for gres, gpus in (("gpu:8", 8), ("gpu:a100:4(S:0-1),gpu:h100:2", 6), ("shard:16,gpu:1", 1), ("(null)", 0)):
        assert gpus_of(gres) == gpus
    known, default = parse_sinfo(SINFO)
    assert default == "gpu"
    assert list(known) == ["gpu", "cpu", "short", "closed"]
    assert known["gpu"].nodes == (Nodes(4, 8, 128), Nodes(2, 4, 64))
    assert (known["gpu"].limit, known["gpu"].default) == (172800, 3600)
    assert (known["cpu"].limit, known["cpu"].default) == (None, None)


def test_axes_keep_names_apart():
    assert parse_axis("seeds=1,5") == ("seed_everything", ["1", "5"])
    names = [name for name, _ in points([parse_axis("model.path=a/b,c d")])]
    assert names == ["path=a_b", "path=c_d"]
    with pytest.raises(ValueError, match="same name"):
        points([parse_axis("model.path=a/b,a b")])


@pytest.mark.parametrize(("config", "code"), [("llm/pretrain", 0), ("llm/pretrian", 2)])
def test_it_is_quick_and_needs_no_torch(config, code, tmp_path):
    args = ["launch", "--config", config, "--gpus-per-node", "0", "--time", "30", "--dry-run"]
    start = time.perf_counter()
    assert execute(*args, cwd=tmp_path, PATH="/nowhere").code == code
    assert time.perf_counter() - start < 2.0
    script = (
        "import json, sys; from evolute.__main__ import main; code = main(json.loads(sys.argv[1]));"
        "print([m for m in ('torch', 'lightning', 'numpy') if m in sys.modules], code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(args)],
        cwd=tmp_path, env=os.environ | ENVIRONMENT | {"PATH": "/nowhere"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == f"[] {code}"
    assert not list(tmp_path.iterdir())

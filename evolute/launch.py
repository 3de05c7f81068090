"""``evolute launch``: check a request against the recipe and the cluster, and submit ``slurm/train.sbatch``.

Answers without torch.
"""

import argparse
import itertools
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from evolute.folders import next_free, take
from evolute.messages import fail
from evolute.partitions import Request, fitting, parse_time, partitions
from evolute.recipe_file import Recipe, overrides
from evolute.registry import nearest

SCRIPT = Path(__file__).parent / "slurm" / "train.sbatch"
EARLY = 60
"""Seconds that SLURM may send its warning ahead of time (``--signal`` in the manual of sbatch)."""
OTHER_KEYS = ("wandb", "tensorboard", "checkpoint_every", "seed_everything", "ckpt_path", "model", "data")
"""Arguments of ``fit`` without a dot, which are passed on."""

SETTLED = ("trainer.devices", "trainer.num_nodes", "trainer.accumulate_grad_batches", "data.batch_size")
"""Keys that follow from the request, without the ``init_args`` in them."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are exceptions."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise ValueError(message)


def parser() -> Parser:
    """Return the parser of launch's own arguments."""
    p = Parser(
        prog="evolute launch",
        description="Submit 'evolute fit' to SLURM, after checking that it can work. --any.key value goes to fit.",
        allow_abbrev=False,
    )
    p.add_argument("--config", action="append", required=True, metavar="RECIPE", help="packaged name or YAML file")
    p.add_argument("--nodes", type=_at_least(1), default=1, metavar="N")
    p.add_argument("--gpus-per-node", type=_at_least(0), required=True, metavar="G", help="0 trains on processors")
    p.add_argument("--ntasks-per-node", type=_at_least(1), metavar="T", help="ranks a node; one a GPU, or 1 without")
    p.add_argument("--cpus-per-task", type=_at_least(1), metavar="C", help="default: the recipe's loader workers + 1")
    p.add_argument("--time", help="limit of one start: minutes, H:M:S or D-H:M:S; a longer run is requeued")
    p.add_argument("--partition", default=os.environ.get("SBATCH_PARTITION", ""))
    p.add_argument("--account")
    p.add_argument("--qos")
    p.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="one more option: --sbatch=--mem=64G"
    )
    p.add_argument("--array", action="append", default=[], metavar="AXIS", help="seeds=0-4, or KEY=VALUE,VALUE,...")
    p.add_argument("--global-batch", type=_at_least(1), metavar="B", help="samples a step, default: the recipe's")
    p.add_argument("--run", type=Path, metavar="DIR", help="run folder; a new one under runs/ by default")
    p.add_argument("--resume", action="store_true", help="continue the run in --run")
    p.add_argument(
        "--startup", type=_at_least(0), default=120, metavar="S", help="seconds to the first step, %(default)s"
    )
    p.add_argument("--grace", type=_at_least(1), default=120, metavar="S", help="seconds left to save, %(default)s")
    p.add_argument("--dry-run", action="store_true", help="print the command; submit nothing")
    return p


def _at_least(least: int) -> Any:
    def number(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least {least}")
        return int(text)

    return number


def launch(args: list[str]) -> int:
    """Submit, or with ``--dry-run`` print the command; return 0, or 2 with one line on stderr."""
    try:
        options, rest = parser().parse_known_args(args)
        job = check(options, rest)
        return _show(job) if options.dry_run else _submit(job)
    except (ValueError, OSError) as error:
        return fail(str(error))


@dataclass
class Job:
    """A request that passed the checks.

    Attributes:
        options: launch's own arguments.
        arguments: those for ``fit``, but for the run folder.
        axes: of the array: pairs of key and values.
        notes: lines for the user.
    """

    options: argparse.Namespace
    arguments: list[str]
    axes: list[tuple[str, list[str]]]
    notes: list[str]

    @property
    def name(self) -> str:
        """Name of the recipe's file, which numbered folders begin with."""
        return Path(self.options.config[0]).stem

    def folders(self, folder: Path) -> list[Path]:
        """Return the run folder of each task: one below ``folder`` for each in an array."""
        return [folder / name for name, _ in points(self.axes)] if self.axes else [folder]

    def log(self, folder: Path) -> Path:
        """Return where the job writes, with SLURM's placeholders."""
        return folder / ("slurm-%A_%a.out" if self.axes else "slurm-%j.out")

    def environment(self, folder: Path) -> dict[str, str]:
        """Return the variables that ``train.sbatch`` reads."""
        found = {"EVOLUTE": os.environ.get("EVOLUTE") or executable()}
        if self.axes:
            lines = (["--run", str(folder / name), *flags] for name, flags in points(self.axes))
            found["EVOLUTE_ARRAY"] = "\n".join(map(shlex.join, lines))
        return found

    def command(self, folder: Path) -> list[str]:
        """Return the whole sbatch command."""
        o = self.options
        given: dict[str, Any] = {
            "job-name": folder.name,
            "nodes": o.nodes,
            "ntasks-per-node": o.ntasks_per_node,
            "cpus-per-task": o.cpus_per_task,
            "gpus-per-node": o.gpus_per_node or None,
            "time": o.time,
            "partition": o.partition or None,
            "account": o.account,
            "qos": o.qos,
            "signal": f"B:USR1@{o.grace}",
            "array": f"0-{len(points(self.axes)) - 1}" if self.axes else None,
            "output": self.log(folder),
        }
        named = [f"--{name}={value}" for name, value in given.items() if value is not None]
        run = [] if self.axes else ["--run", str(folder)]
        return ["sbatch", "--parsable", *named, *o.sbatch, str(SCRIPT), *self.arguments, *run, "--resume", "auto"]


def executable() -> str:
    """Return the ``evolute`` of this environment."""
    beside = Path(sys.executable).with_name("evolute")
    return str(beside) if beside.is_file() else f"{sys.executable} -m evolute"


def check(options: argparse.Namespace, rest: list[str]) -> Job:
    """Check everything that can be known before the job starts.

    Raises:
        ValueError: naming the value that does not fit.
    """
    given = overrides(rest)
    own = [action.option_strings[-1].lstrip("-") for action in parser()._actions]
    for key in given:
        if "." not in key and key not in OTHER_KEYS:
            raise ValueError(
                f"no option --{key}{nearest(key, [*own, *OTHER_KEYS])}; 'evolute launch --help' lists them"
            )
    recipe = Recipe(options.config, given)
    _complete(options, recipe)
    axes = [parse_axis(axis) for axis in options.array]
    for key, _ in axes:
        if key in SETTLED or key.replace(".init_args.", ".") in SETTLED:
            raise ValueError(f"--array {key}: launch settles it; launch once a value, with --nodes or --global-batch")
        if "." not in key and key not in OTHER_KEYS:
            raise ValueError(f"--array {key}: not a key of fit{nearest(key, ['seeds', *OTHER_KEYS])}")
    points(axes)
    ranks = options.nodes * options.ntasks_per_node
    unchecked = _check_cluster(options)
    arguments, batch = recipe.share(ranks, options.global_batch)
    notes = [
        f"{ranks} tasks on {options.nodes} nodes, "
        + (f"a GPU each, {options.gpus_per_node} a node" if options.gpus_per_node else "on processors"),
        *([batch] if batch else []),
        *unchecked,
    ]
    trainer = {
        "accelerator": "gpu" if options.gpus_per_node else "cpu",
        "num_nodes": options.nodes,
        "devices": options.ntasks_per_node,
    }
    settled = [word for key, value in trainer.items() for word in (f"--trainer.{key}", str(value))]
    configs = [word for config in options.config for word in ("--config", config)]
    job = Job(options, [*configs, *rest, *settled, *arguments], axes, notes)
    _check_folder(job)
    return job


def _complete(o: argparse.Namespace, recipe: Recipe) -> None:
    """Fill in what the request leaves open, and refuse what the recipe contradicts."""
    if o.gpus_per_node and o.ntasks_per_node not in (None, o.gpus_per_node):
        raise ValueError(f"--ntasks-per-node {o.ntasks_per_node}: must be --gpus-per-node {o.gpus_per_node}, one a GPU")
    o.ntasks_per_node = o.ntasks_per_node or o.gpus_per_node or 1
    o.cpus_per_task = o.cpus_per_task or recipe.workers + 1
    for key, flag in (("devices", "ntasks-per-node"), ("num_nodes", "nodes"), ("default_root_dir", "run")):
        if f"trainer.{key}" in recipe.given:
            raise ValueError(f"--trainer.{key}: launch sets it; say --{flag}")
    accelerator = recipe.value("trainer.accelerator", "auto")
    if accelerator == "cpu" and o.gpus_per_node:
        raise ValueError(f"--gpus-per-node {o.gpus_per_node}: the recipe has trainer.accelerator=cpu; say 0")
    if accelerator not in ("auto", "cpu") and not o.gpus_per_node:
        raise ValueError(f"--gpus-per-node 0: the recipe has trainer.accelerator={accelerator}")


def _check_cluster(o: argparse.Namespace) -> list[str]:
    """Check the time, and what is asked for against what ``sinfo`` offers; return what could not be checked."""
    seconds = parse_time(o.time) if o.time is not None else None
    _check_time(f"--time {o.time}", seconds, o)
    try:
        known, default = partitions()
    except OSError as error:
        return [f"not checked against the cluster: {error}"]
    request = Request(o.nodes, o.gpus_per_node, o.ntasks_per_node, o.cpus_per_task, seconds)
    partition = fitting(o.partition, request, known, default)
    if seconds is None:
        _check_time(f"the default time of partition {partition.name!r}", partition.default, o)
    return []


def _check_time(what: str, seconds: float | None, o: argparse.Namespace) -> None:
    least = o.startup + o.grace + EARLY
    if seconds is not None and seconds <= least:
        raise ValueError(
            f"{what} is {seconds:g} s, but a start takes --startup {o.startup} s and the warning comes "
            f"--grace {o.grace} s before the end, or {EARLY} s earlier: "
            f"ask for more than {math.ceil(least / 60)} minutes"
        )


def _check_folder(job: Job) -> None:
    o = job.options
    if o.resume and o.run is None:
        raise ValueError("--resume needs --run DIR, the run to continue")
    folder: Path = o.run or Path("runs")
    for run in job.folders(folder) if o.run else []:
        if (run / "config.yaml").exists() and not o.resume:
            raise ValueError(f"{run} holds a run already: add --resume to continue it, or choose another --run")
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--run {folder}: cannot write into {there}")


def parse_axis(text: str) -> tuple[str, list[str]]:
    """Return key and values of ``seeds=0-4``, ``seeds=1,5`` or ``KEY=VALUE,VALUE``.

    Raises:
        ValueError: if it is none of these, or a value comes twice.
    """
    key, _, listed = text.partition("=")
    if not key or not listed:
        raise ValueError(f"--array {text}: not seeds=0-4 or KEY=VALUE,VALUE")
    values = listed.split(",")
    if key == "seeds":
        key = "seed_everything"
        if span := re.fullmatch(r"(\d+)-(\d+)", listed):
            values = [str(seed) for seed in range(int(span[1]), int(span[2]) + 1)]
        if not values or not all(re.fullmatch(r"\d+", value) for value in values):
            raise ValueError(f"--array {text}: seeds are numbers, 0-4 or 1,5")
    if len(set(values)) < len(values):
        raise ValueError(f"--array {text}: a value comes twice")
    return key, values


def points(axes: list[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Return name and arguments of each task of an array: every combination of the axes' values.

    Raises:
        ValueError: if there are more than 1000, or two that one cannot tell apart.
    """
    size = math.prod(len(values) for _, values in axes)
    if size > 1000:
        raise ValueError(f"--array: {size} tasks; 1000 at most")
    short = {key: key.rpartition(".")[2] for key, _ in axes}
    found: list[tuple[str, list[str]]] = []
    for values in itertools.product(*(values for _, values in axes)):
        pairs = list(zip(short, values, strict=True))
        name = ",".join(f"{short[key].replace('seed_everything', 'seed')}={value}" for key, value in pairs)
        found.append((re.sub(r"[^\w.,=+-]", "_", name), [w for key, value in pairs for w in (f"--{key}", value)]))
    if len({name for name, _ in found}) < len(found):
        raise ValueError("--array: two tasks would have the same name")
    return found


def _show(job: Job) -> int:
    folder = job.options.run or next_free(Path("runs"), job.name)
    for note in job.notes:
        print(f"# {note}")
    variables = [f"{name}={shlex.quote(value)}" for name, value in job.environment(folder).items()]
    print(f"mkdir -p {shlex.quote(str(folder))} &&", *variables, shlex.join(job.command(folder)))
    return 0


def _submit(job: Job) -> int:
    if shutil.which("sbatch") is None:
        raise ValueError("sbatch not found: launch where SLURM is; --dry-run prints the command without it")
    wanted: Path = job.options.run or next_free(Path("runs"), job.name)
    missing = [p for p in (wanted.parent, *wanted.parent.parents) if not p.exists()]
    if job.options.run is None:
        folder = take(wanted)
    else:
        folder = wanted
        missing = [p for p in (wanted, *missing) if not p.exists()]
        wanted.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        job.command(folder), env=os.environ | job.environment(folder), capture_output=True, text=True, check=False
    )
    if done.returncode:
        for made in [folder, *missing] if job.options.run is None else missing:
            made.rmdir()
        raise ValueError("; ".join(done.stderr.strip().splitlines()) or "sbatch failed and said nothing")
    number = done.stdout.strip().partition(";")[0]
    log = str(job.log(folder)).replace("%A", number).replace("%j", number)
    print(f"job {number}")
    for note in job.notes:
        print(note)
    print(f"run folder: {folder}" + (f", one below it for each of {len(points(job.axes))} tasks" if job.axes else ""))
    print(f"log: {log}")
    print(f"follow: tail -F {shlex.quote(log).replace('%a', '0')}; squeue --job {number}; scancel {number} ends it")
    return 0

"""What a SLURM cluster offers, as ``sinfo`` tells it, and whether a request fits. Imports nothing heavy."""

import re
import shutil
import subprocess
from dataclasses import dataclass

from evolute.registry import nearest

FORMAT = "%P|%a|%D|%c|%G|%l|%L"


@dataclass(frozen=True)
class Nodes:
    """Nodes of one kind in a partition: how many, and with how many GPUs and processors each."""

    count: int
    gpus: int
    cpus: int


@dataclass(frozen=True)
class Partition:
    """One partition.

    Attributes:
        up: it takes jobs.
        limit: longest job in seconds, ``None`` without a limit.
        default: time of a job that asks for none, likewise.
        nodes: its nodes by kind.
    """

    name: str
    up: bool
    limit: float | None
    default: float | None
    nodes: tuple[Nodes, ...]


@dataclass(frozen=True)
class Request:
    """Nodes asked for, with GPUs, tasks and processors per node, and the seconds if any were named."""

    nodes: int
    gpus: int
    tasks: int
    cpus_per_task: int
    seconds: float | None


def parse_time(text: str) -> float:
    """Return the seconds of a SLURM time: minutes, ``M:S``, ``H:M:S``, ``D-H``, ``D-H:M`` or ``D-H:M:S``.

    Raises:
        ValueError: if it is none of these, or no time at all.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ValueError(f"--time {text}: not a time; minutes, H:M:S or D-H:M:S")
    days, *parts = (None if part is None else int(part) for part in match.groups())
    first, second, third = parts
    assert first is not None
    if days is not None:
        seconds = 86400 * days + 3600 * first + 60 * (second or 0) + (third or 0)
    elif third is not None:
        seconds = 3600 * first + 60 * (second or 0) + third
    else:
        seconds = 60 * first + (second or 0)
    if seconds == 0:
        raise ValueError(f"--time {text}: must be more than nothing")
    return seconds


def partitions() -> tuple[dict[str, Partition], str]:
    """Ask ``sinfo``; return the partitions by name, and the name of the default one (empty if there is none).

    Raises:
        OSError: if SLURM does not answer, with what it said in one line.
    """
    if shutil.which("sinfo") is None:
        raise OSError("sinfo not found")
    try:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format", FORMAT], capture_output=True, text=True, timeout=10, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise OSError("sinfo does not answer") from error
    if done.returncode:
        raise OSError((done.stderr.strip() or "sinfo failed").splitlines()[-1])
    return parse_sinfo(done.stdout)


def parse_sinfo(text: str) -> tuple[dict[str, Partition], str]:
    """Read what ``sinfo`` printed in :data:`FORMAT`: a line for each kind of node in a partition."""
    found: dict[str, Partition] = {}
    default = ""
    for line in text.splitlines():
        name, state, count, cpus, gres, limit, usual = line.split("|")
        if name.endswith("*"):
            name = default = name[:-1]
        kind = Nodes(int(count), gpus_of(gres), int(cpus.rstrip("+")))
        before = found[name].nodes if name in found else ()
        found[name] = Partition(name, state == "up", _limit(limit), _limit(usual) or _limit(limit), (*before, kind))
    return found, default


def gpus_of(gres: str) -> int:
    """Return the GPUs in a list of generic resources such as ``gpu:a100:8(S:0-1),shard:16``."""
    plain = re.sub(r"\([^)]*\)", "", gres)
    return sum(int(m[1]) for m in re.finditer(r"(?:^|,)gpu(?::[^:,]+)?:(\d+)(?=,|$)", plain))


def _limit(text: str) -> float | None:
    return None if text in ("infinite", "n/a", "UNLIMITED") else parse_time(text)


def fitting(wanted: str, request: Request, known: dict[str, Partition], default: str) -> Partition:
    """Return the first of the partitions named (comma-separated, or nothing for the default) that the request fits.

    Raises:
        ValueError: saying which value does not fit, for the last of them.
    """
    names = (wanted or default).split(",")
    for name in names:
        if not name:
            raise ValueError(f"this cluster has no default partition: name one with --partition, of {', '.join(known)}")
        if name not in known:
            raise ValueError(f"--partition {name}: there is none{nearest(name, known)}; there are {', '.join(known)}")
    reasons: list[str] = []
    for partition in map(known.__getitem__, names):
        reason = misfit(request, partition)
        if not reason:
            return partition
        reasons.append(reason)
    raise ValueError(reasons[-1])


def misfit(request: Request, partition: Partition) -> str:
    """Say why a request does not fit a partition; nothing if it does."""
    where = f"partition {partition.name!r}"
    if not partition.up:
        return f"--partition {partition.name}: it takes no jobs at present"
    most = max(kind.gpus for kind in partition.nodes)
    if request.gpus > most:
        return f"--gpus-per-node {request.gpus}: no node of {where} has more than {most} GPUs"
    enough = [kind for kind in partition.nodes if kind.gpus >= request.gpus]
    cpus, most = request.tasks * request.cpus_per_task, max(kind.cpus for kind in enough)
    if cpus > most:
        return (
            f"{request.tasks} tasks a node with --cpus-per-task {request.cpus_per_task} take {cpus} processors: "
            f"no such node of {where} has more than {most}"
        )
    there = sum(kind.count for kind in enough if kind.cpus >= cpus)
    if request.nodes > there:
        return f"--nodes {request.nodes}: {where} has {there} nodes that can take the tasks"
    if request.seconds is not None and partition.limit is not None and request.seconds > partition.limit:
        return f"--time: {request.seconds / 60:g} minutes, but {where} allows {partition.limit / 60:g}"
    return ""

"""What the benchmarks on scikit-learn's digits share: data, small networks, resumable runs and figures."""

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from evolute.reports import style

HERE = Path(__file__).parent


class Digits(NamedTuple):
    """Images [n, 64] in [0, 1], float32, and labels [n]."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def load(seed: int | None, classes: int = 10, test: float = 0.2) -> Digits:
    """Return the digits below ``classes``; a share ``test`` of each class, drawn by seed, is for testing.

    With ``seed=None`` the first images are for testing. They come from other writers than the last, so they are harder.
    """
    images, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(images[labels < classes]).float() / 16, torch.as_tensor(labels[labels < classes])
    if seed is None:
        first = int(test * len(x))
        return Digits(x[first:], y[first:], x[:first], y[:first])
    kept, held_out = train_test_split(torch.arange(len(x)), test_size=test, random_state=seed, stratify=y)
    return Digits(x[kept], y[kept], x[held_out], y[held_out])


def batches(data: Digits, size: int, steps: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return the batches of a run, epoch after epoch in a new order; the last of an epoch may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    picked: list[Tensor] = []
    while len(picked) < steps:
        picked += torch.randperm(len(data.x), generator=generator).split(size)
    return [(data.x[pick], data.y[pick]) for pick in picked[:steps]]


def mlp(*widths: int, activation: type[nn.Module] = nn.GELU, norm: bool = False) -> nn.Sequential:
    """Return a network of these widths, with a LayerNorm before each activation if asked for."""
    layers: list[nn.Module] = []
    for i, o in pairwise(widths[:-1]):
        layers += [nn.Linear(i, o), *([nn.LayerNorm(o)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


@torch.no_grad()
def judge(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return loss and accuracy in percent."""
    z = model(x)
    return F.cross_entropy(z, y).item(), 100 * (z.argmax(dim=1) == y).double().mean().item()


@dataclass(frozen=True)
class Run:
    """One run; its fields name its result."""

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())


class Bench:
    """Runs that are made once: each result is a JSON file, and one that is there is read.

    Args:
        name: folder of the results, under benchmarks/results/.
        work: makes a run; a function of a module, for runs may be made in other processes.
        jobs: processes.
    """

    def __init__(self, name: str, work: Callable[[Any], dict[str, Any]], jobs: int = 1) -> None:
        self.work, self.jobs, self.name = work, jobs, name
        self.folder = HERE / "results" / name

    def results(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """Return the results in the order of the runs."""
        if self.jobs == 1:
            return [self.result(run) for run in track(runs, self.name, console=console())]
        # Spawned, for a fork of a process that has used threads may hang.
        with ProcessPoolExecutor(self.jobs, mp_context=get_context("spawn")) as pool:
            return list(track(pool.map(self.result, runs), self.name, total=len(runs), console=console()))

    def result(self, run: Run) -> dict[str, Any]:
        path = self.folder / f"{run.name}.json"
        if path.exists():
            return json.loads(path.read_text())
        torch.set_num_threads(1)
        result = {**asdict(run), **self.work(run)}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result))
        partial.replace(path)
        return result


def console() -> Console:
    """Return where to print; a log should not fold a table."""
    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def verdict(bars: dict[str, bool]) -> int:
    """Print each bar; return 1 if one is missed."""
    for bar, met in bars.items():
        console().print(f"{'met   ' if met else 'MISSED'}  {bar}")
    return 0 if all(bars.values()) else 1


def median(values: Iterable[float]) -> float:
    """Return the median; what is not a number counts as infinite."""
    return statistics.median(math.inf if math.isnan(v) else v for v in values)


def figure(rows: int, columns: int, height: float) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure in the style of the reports, on white."""
    made, axes = style.new_figure(rows, columns, height)
    made.patch.set(facecolor="white", alpha=1)
    return made, axes


def save(made: Figure, name: str) -> Path:
    """Write benchmarks/figures/<name>.png, of few colours and so small, and return its path."""
    path = HERE / "figures" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    drawn = BytesIO()
    made.savefig(drawn, dpi=100)
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)
    return path

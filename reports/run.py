"""Read a run folder: metrics, configuration, environment and samples, as plain data."""

import csv
import io
import json
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml
from numpy.typing import NDArray

Array = NDArray[np.float64]
Series = tuple[NDArray[np.int64], Array]

_NOT_METRICS = ("step", "epoch")
NOT_LAYERS = ("time_ms", "nonfinite")  # recorded under the prefix of a callback beside its layers


@dataclass(frozen=True)
class Run:
    """What one run folder holds.

    Attributes:
        folder: where the run was read from.
        name: label of the run in figures and tables.
        metrics: name -> (optimizer steps [n], ascending and unique; values [n], non-finite ones included).
        config: the configuration of the latest start, parsed; empty if there is none.
        config_files: file name -> text of every configuration kept, in the order of the starts.
        environment: versions, machine, seed, command and whatever else the run noted about itself.
        samples: continuations written during training, each with ``step``, ``prompt`` and ``text``.
        completions: answers that were rewarded, each with ``step``, ``prompt``, ``tokens``, ``reward``, ``advantage``.
    """

    folder: Path
    name: str
    metrics: Mapping[str, Series]
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    config_files: Mapping[str, str] = field(default_factory=dict[str, str])
    environment: Mapping[str, Any] = field(default_factory=dict[str, Any])
    samples: Sequence[Mapping[str, Any]] = ()
    completions: Sequence[Mapping[str, Any]] = ()

    def series(self, name: str) -> Series:
        """Return the steps and the finite values of a metric; both empty if it was never recorded."""
        steps, values = self.metrics.get(name, (np.empty(0, np.int64), np.empty(0)))
        kept = np.isfinite(values)
        return steps[kept], values[kept]

    def has(self, name: str) -> bool:
        """Say whether the metric has at least one finite value."""
        return self.series(name)[0].size > 0

    def last(self, name: str) -> float | None:
        """Return the last finite value of a metric, or None."""
        values = self.series(name)[1]
        return float(values[-1]) if values.size else None

    def layers(self, prefix: str) -> dict[str, Series]:
        """Return the finite series of every metric called ``prefix/<layer>``, by layer, in the order of the model."""
        head = prefix.rstrip("/") + "/"
        names = [name.removeprefix(head) for name in self.metrics if name.startswith(head) and self.has(name)]
        return {name: self.series(head + name) for name in names if name not in NOT_LAYERS}

    def arrays(self, prefix: str) -> dict[int, dict[str, Array]]:
        """Return the arrays that the run recorded under a prefix, by step: read from the run folder, name -> array.

        A file that does not parse is left out: the run may have been killed while it wrote, or the folder moved.
        """
        found: dict[int, dict[str, Array]] = {}
        for path in sorted((self.folder / "arrays" / prefix).glob("*.npz")):
            try:
                with np.load(path, allow_pickle=False) as file:
                    found[int(path.stem)] = {name: np.asarray(file[name], np.float64) for name in file.files}
            except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
                continue
        return found

    @property
    def bigram_floor(self) -> float | None:
        """Bits per byte of the corpus's bigram model, if the run noted it."""
        value = self.environment.get("bigram_floor_bits_per_byte")
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def load_run(folder: str | Path) -> Run:
    """Read a run folder.

    Only ``metrics.csv`` is required. A last line cut short, a cell that is no number and a file that does not parse
    are left out: the run may have been killed while it wrote.

    Args:
        folder: a run folder, as ``evolute fit`` or Lightning's ``CSVLogger`` writes it.

    Raises:
        FileNotFoundError: if the folder or its ``metrics.csv`` is missing, or holds no recorded value.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such run folder")
    table = folder / "metrics.csv"
    if not table.is_file():
        raise FileNotFoundError(f"{folder}: not a run folder, it has no metrics.csv")
    metrics = _read_metrics(table)
    if not metrics:
        raise FileNotFoundError(f"{folder}: metrics.csv holds no value with a step")
    texts = {path.name: path.read_text("utf-8", errors="replace") for path in _config_paths(folder)}
    return Run(
        folder=folder,
        name=folder.resolve().name or str(folder),
        metrics=metrics,
        config=_parse_yaml(list(texts.values())[-1]) if texts else {},
        config_files=texts,
        environment=_read_json(folder / "environment.json"),
        samples=list(_read_json_lines(folder / "samples.jsonl")),
        completions=list(_read_json_lines(folder / "completions.jsonl")),
    )


def load_runs(runs: Sequence[Run | Path | str]) -> list[Run]:
    """Load every run that is not loaded yet and give runs of the same name different labels.

    Raises:
        ValueError: if there is no run.
        FileNotFoundError: if one of the folders is not a run folder.
    """
    if not runs:
        raise ValueError("no run given: name at least one run folder")
    loaded = [run if isinstance(run, Run) else load_run(run) for run in runs]
    names = [run.name for run in loaded]
    return [
        replace(run, name=f"{run.folder.resolve().parent.name}/{run.name}") if names.count(run.name) > 1 else run
        for run in loaded
    ]


def nonfinite(run: Run) -> dict[str, tuple[int, int]]:
    """Return metric or callback -> (count of NaN and infinite values, step of the first), where there are any."""
    found: dict[str, tuple[int, int]] = {}
    for name, (steps, values) in run.metrics.items():
        bad = steps[~np.isfinite(values)]
        if bad.size:
            found[name] = (int(bad.size), int(bad[0]))
        elif name.endswith("/nonfinite") and values.any():
            # A callback records each measurement it threw away; the recipe its running count of skipped steps.
            total = values.max() if name.startswith("train/") else values.sum()
            found[name.removesuffix("/nonfinite")] = (int(total), int(steps[values > 0][0]))
    return found


def _read_metrics(path: Path) -> dict[str, Series]:
    text = path.read_text("utf-8", errors="replace")
    # A line without its line end was cut while it was written: its last number may have lost digits.
    text = text[: text.rfind("\n") + 1].replace("\0", "")
    rows = csv.reader(io.StringIO(text))
    header = next(rows, [])
    if "step" not in header:
        return {}
    at = header.index("step")
    # step -> value: a step written again after a restart replaces the earlier row.
    columns: dict[str, dict[int, float]] = {name: {} for name in header if name not in _NOT_METRICS}
    for row in rows:
        step = _number(row[at]) if at < len(row) else None
        if step is None or not math.isfinite(step):
            continue
        for name, cell in zip(header, row, strict=False):
            if cell and name in columns and (value := _number(cell)) is not None:
                columns[name][int(step)] = value
    return {name: _as_series(cells) for name, cells in columns.items() if cells}


def _as_series(cells: dict[int, float]) -> Series:
    ordered = sorted(cells.items())
    return np.array([step for step, _ in ordered], np.int64), np.array([value for _, value in ordered], np.float64)


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _config_paths(folder: Path) -> list[Path]:
    """Return config.yaml, config.1.yaml, ... in the order of the starts."""
    later = [path for path in folder.glob("config.*.yaml") if path.name.split(".")[1].isdigit()]
    first = folder / "config.yaml"
    return [first] * first.is_file() + sorted(later, key=lambda path: int(path.name.split(".")[1]))


def _parse_yaml(text: str) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError:  # the page still shows the text
        return {}
    return cast("dict[str, Any]", loaded) if isinstance(loaded, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text("utf-8", errors="replace"))
    except (OSError, ValueError):
        return {}
    return cast("dict[str, Any]", loaded) if isinstance(loaded, dict) else {}


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            loaded = json.loads(line)
        except ValueError:
            continue
        if isinstance(loaded, dict):
            yield cast("dict[str, Any]", loaded)

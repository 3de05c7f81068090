"""One metrics.csv a run: one row a step, appended to on resume, never left half-written."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from typing_extensions import override


class MetricsCSV(Logger):
    """Log scalars to ``<folder>/metrics.csv``, one row per optimizer step.

    Unlike Lightning's ``CSVLogger`` it never deletes an earlier file: a resumed run continues it, after
    :meth:`rewind` has dropped the rows that the resumed run will write again. Values logged at one step share a row;
    new columns rewrite the file through a temporary one, so a killed process leaves the old file or the new, whole.

    Args:
        folder: the run folder.
        flush_every: rows held in memory before they are written.
    """

    FIRST = ("step", "epoch")

    def __init__(self, folder: str | os.PathLike[str], flush_every: int = 20) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.flush_every = flush_every
        self._columns: list[str] = []
        self._rows: list[dict[str, Any]] = []
        if self.path.exists():
            self._columns, _ = _read(self.path)

    @property
    @override
    def name(self) -> str:
        return "csv"

    @property
    @override
    def version(self) -> str:
        return ""

    @property
    @override
    def save_dir(self) -> str:
        return str(self.path.parent)

    @property
    @rank_zero_experiment
    def experiment(self) -> "MetricsCSV":
        """This logger itself: there is no client behind it."""
        return self

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run folder keeps the whole resolved configuration."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        values = {name: v.item() if isinstance(v, Tensor) else v for name, v in metrics.items()}
        step = int(values.pop("step", 0)) if step is None else step
        if self._rows and self._rows[-1]["step"] == step:
            self._rows[-1].update(values)
            return
        if len(self._rows) >= self.flush_every:
            self.flush()
        self._rows.append({"step": step, **values})

    @override
    @rank_zero_only
    def save(self) -> None:
        """Do nothing: Lightning calls this after every row; :meth:`flush` decides when to write."""

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.flush()

    @rank_zero_only
    def flush(self) -> None:
        """Write the rows held in memory."""
        if not self._rows:
            return
        known = set(self._columns)
        new = [name for row in self._rows for name in row if name not in known]
        rows, self._rows = self._rows, []
        if new or not self.path.exists():
            earlier = _read(self.path)[1] if self.path.exists() else []
            self._columns += list(dict.fromkeys(new))
            self._columns.sort(key=lambda name: self.FIRST.index(name) if name in self.FIRST else len(self.FIRST))
            self._replace([*earlier, *rows])
            return
        _drop_torn_line(self.path)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerows(rows)

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop every row of optimizer step ``step`` and later: the resumed run starts there and writes them again."""
        self._rows = []
        if self.path.exists():
            self._columns, rows = _read(self.path)
            self._replace([row for row in rows if int(row["step"]) < step])

    def _replace(self, rows: list[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".csv.tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)


def _drop_torn_line(path: Path) -> None:
    """Cut off a last line that a killed process left unfinished, so that the next row does not continue it."""
    with path.open("rb+") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def _read(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the columns and the whole rows of a file; a last line that a killed process left unfinished is no row."""
    with path.open(newline="") as file:
        text = file.read()
    text = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(text.splitlines())
    rows = [{name: value for name, value in row.items() if value != ""} for row in reader]
    return list(reader.fieldnames or []), rows

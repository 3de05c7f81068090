"""Weights & Biases in a job that may be told to stop."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from typing_extensions import override

from evolute.signals import told


class PatientWandbLogger(WandbLogger):
    """Keep what is logged after the process was told to stop, and send it at the next start.

    SLURM's SIGTERM reaches W&B's own process as well. It writes what it has and ends, and to log anything more raises.
    Scalars are kept; images and tables of that last moment are dropped.

    Args:
        kept: file for what could not be sent.
        options: of ``WandbLogger``.
    """

    def __init__(self, kept: Path, **options: Any) -> None:
        super().__init__(**options)
        self.kept = kept

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if told():
            self._keep(metrics, step)
            return
        try:
            if self.kept.exists():
                self._resend()
            super().log_metrics(metrics, step)
        except Exception:
            if not told():
                raise
            self._keep(metrics, step)

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        if status == "success" and self.kept.exists():  # told, but the run came to its end first
            with contextlib.suppress(Exception):
                self._resend()
        super().finalize(status)

    def _keep(self, metrics: Mapping[str, Any], step: int | None) -> None:
        values = {name: v.item() if isinstance(v, Tensor) else v for name, v in metrics.items()}
        scalars = {name: v for name, v in values.items() if isinstance(v, int | float)}
        if scalars:
            with self.kept.open("a") as file:
                file.write(json.dumps([scalars, step]) + "\n")

    def _resend(self) -> None:
        for line in self.kept.read_text().splitlines():
            scalars, step = json.loads(line)
            super().log_metrics(scalars, step)
        self.kept.unlink()

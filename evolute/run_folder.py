"""The folder of one run: its resolved configuration, its environment and command, and where the next one goes."""

import importlib.metadata
import json
import os
import platform
import secrets
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from evolute.callbacks import MetricsCSV
from evolute.callbacks.record import record
from evolute.folders import take

PACKAGES = (
    "evolute",
    "torch",
    "lightning",
    "torchmetrics",
    "transformers",
    "datasets",
    "numpy",
    "jsonargparse",
    "wandb",
)


MakeLogger = Callable[[Path], Logger]
"""Makes a logger that writes into the run folder given."""


class RunFolder(Callback):
    """Make the run folder when training starts: ``config.yaml``, ``environment.json``, the loggers that write there.

    A later start is kept beside the first (``config.1.yaml``). Nothing is written before training (or its sanity check)
    starts, so a run that is refused leaves no trace.

    Args:
        config: the resolved configuration.
        numbered: ``trainer.default_root_dir`` is a proposal, ``name-N``: the first number still free is taken, also
            when several runs start at once. Else it is the folder.
        resumed: the folder holds this run already.
        loggers: makers of loggers that write as soon as they exist (Weights & Biases, TensorBoard).
        on_start: called when the folder stands.
        every_n_steps: optimizer steps between two records of ``time/step_ms``.
    """

    def __init__(
        self,
        config: dict[str, Any],
        numbered: bool,
        resumed: bool,
        loggers: list[MakeLogger],
        on_start: Callable[[], None],
        every_n_steps: int = 10,
    ) -> None:
        self.config = {k: v for k, v in config.items() if k not in ("run", "resume", "ckpt_path", "config")}
        self.numbered = numbered
        self.resumed = resumed
        self.loggers = loggers
        self.every_n_steps = every_n_steps
        self.on_start = on_start
        self._begun = False
        self._since: tuple[int, float] | None = None

    @override
    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer)

    def _begin(self, trainer: L.Trainer) -> None:
        if self._begun:
            return
        self._begun = True
        folder = Path(trainer.default_root_dir)
        if self.numbered:
            taken = str(take(folder)) if trainer.is_global_zero else ""
            folder = Path(trainer.strategy.broadcast(taken))
            trainer._default_root_dir = str(folder)  # pyright: ignore[reportAttributeAccessIssue]
        if trainer.is_global_zero:
            self._write(folder, getattr(trainer, "datamodule", None))
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.path = folder / logger.path.name
                if trainer.global_step == 0:  # rows of a start that was killed before its first checkpoint
                    logger.rewind(0)
        for make in self.loggers:
            logger = make(folder)
            logger.log_hyperparams(self.config)
            trainer.loggers = [*trainer.loggers, logger]
        if trainer.is_global_zero:
            print(f"run folder: {folder}", flush=True)
        self.on_start()

    def _write(self, folder: Path, data: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        resolved = getattr(data, "resolved_hparams", None)
        found = cast("dict[str, Any]", resolved()) if callable(resolved) else {}
        config = dict(self.config)
        if found and isinstance(config.get("data"), dict):
            config["data"] = {**config["data"], "init_args": {**config["data"].get("init_args", {}), **found}}
        number = len(list(folder.glob("config.*yaml"))) if self.resumed else 0
        name = f"config.{number}.yaml" if number else "config.yaml"
        try:
            with (folder / name).open("x") as file:
                file.write(f"# {command()}\n" + yaml.safe_dump(config, sort_keys=False))
        except FileExistsError as error:
            raise MisconfigurationException(
                f"{folder} was taken by another run a moment ago: choose another"
            ) from error
        environment = {**environment_facts(), "seed": config.get("seed_everything"), "command": command(), **found}
        floor = getattr(data, "bigram_floor", None)
        if callable(floor):
            environment["bigram_floor_bits_per_byte"] = floor()
        (folder / "environment.json").write_text(json.dumps(environment, indent=2))

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record ``time/step_ms``, the mean wall-clock of an optimizer step since the last record."""
        step, now = trainer.global_step, time.perf_counter()
        if self._since is None:
            self._since = (step, now)
        elif step - self._since[0] >= self.every_n_steps:
            steps, seconds = step - self._since[0], now - self._since[1]
            record(trainer, "time", {"step_ms": 1e3 * seconds / steps}, step - 1)
            self._since = (step, now)


def wandb_logger(folder: Path) -> Logger:
    """Return a Weights & Biases logger, offline unless logged in, that goes on with the run the folder knows."""
    from evolute.wandb_logger import PatientWandbLogger

    id_file = folder / "wandb" / "run_id"
    run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
    mode = os.environ.get("WANDB_MODE") or ("online" if wandb_logged_in() else "offline")
    _keep(id_file, run_id)
    return PatientWandbLogger(
        id_file.with_name("unsent.jsonl"),
        name=folder.name,
        save_dir=folder,
        id=run_id,
        resume="allow",
        offline=mode == "offline",
        project="evolute",
    )


def wandb_logged_in() -> bool:
    """Say whether Weights & Biases knows who we are, without asking anybody."""
    netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    return bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "wandb" in netrc.read_text())


@rank_zero_only
def _keep(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)


def tensorboard_logger(folder: Path) -> Logger:
    """Return a TensorBoard logger that writes into ``tensorboard/``."""
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(folder, name="tensorboard", version="")


def command() -> str:
    """Return the command line of this process, as one would type it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def environment_facts() -> dict[str, Any]:
    """Return versions, machine and threads."""
    versions: dict[str, str] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }

"""The folder of one run: its resolved configuration, its environment and command, and where the next one goes."""

import importlib.metadata
import json
import os
import platform
import re
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
from typing_extensions import override

from evolute.callbacks.record import record

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


class RunFolder(Callback):
    """Write ``config.yaml`` and ``environment.json`` when training starts; a later start is kept beside the first.

    Nothing is written before training starts, so a run that is refused leaves no folder behind.

    Args:
        config: the resolved configuration.
        on_start: called then.
        every_n_steps: optimizer steps between two records of ``time/step_ms``.
    """

    def __init__(self, config: dict[str, Any], on_start: Callable[[], None], every_n_steps: int = 10) -> None:
        self.config = config
        self.every_n_steps = every_n_steps
        self.on_start = on_start
        self._since: tuple[int, float] | None = None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_start()
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        data = getattr(trainer, "datamodule", None)
        resolved = getattr(data, "resolved_hparams", None)
        found = cast("dict[str, Any]", resolved()) if callable(resolved) else {}
        config = {k: v for k, v in self.config.items() if k not in ("run", "resume", "ckpt_path", "config")}
        if found and isinstance(config.get("data"), dict):
            config["data"] = {**config["data"], "init_args": {**config["data"].get("init_args", {}), **found}}
        number = len(list(folder.glob("config*.yaml")))
        name = f"config.{number}.yaml" if number else "config.yaml"
        (folder / name).write_text(f"# {command()}\n" + yaml.safe_dump(config, sort_keys=False))
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


def next_free(parent: Path, name: str) -> Path:
    """Return ``parent/name-N`` with the lowest N above every folder there."""
    taken = [re.fullmatch(rf"{re.escape(name)}-(\d+)", p.name) for p in parent.glob(f"{name}-*")]
    return parent / f"{name}-{1 + max((int(m[1]) for m in taken if m), default=0)}"


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

"""Small runs that most tests of callbacks share."""

import os
from collections.abc import Callable
from typing import Any

for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[variable] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["OMP_NUM_THREADS"] = "1"

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader
from xdist.scheduler import LoadFileScheduling

from tests.modules import Regression, regression_data

torch.set_num_threads(1)


class Files(LoadFileScheduling):
    """With ``-n``, a file stays in one process, for its fixtures, and so do all files that need the cluster."""

    def _split_scope(self, nodeid: str) -> str:
        return "slurm" if nodeid.startswith("tests/slurm/") else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Files:
    return Files(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the cluster: its tests wait more than they work, and begun last they would be waited for alone."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/slurm/"))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def trainer_of(callbacks: list[Callback], **kwargs: Any) -> L.Trainer:
    """A quiet CPU trainer that writes nothing."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 8,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(callbacks=callbacks, **{**quiet, **kwargs})


def fit(
    callbacks: list[Callback],
    module: L.LightningModule | Callable[[], L.LightningModule] = Regression,
    data: Any = None,
    seed: int = 0,
    ckpt_path: str | None = None,
    **kwargs: Any,
) -> tuple[L.LightningModule, L.Trainer]:
    """Seed everything, build the module if a function is given, train it; return it and its trainer."""
    L.seed_everything(seed, verbose=False)
    module = module if isinstance(module, L.LightningModule) else module()
    data = data if data is not None else DataLoader(regression_data(), batch_size=4)
    trainer = trainer_of(callbacks, **kwargs)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return module, trainer

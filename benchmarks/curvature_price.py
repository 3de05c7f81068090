"""What each quantity of the curvature callbacks costs, in gradients of the probe batch.

The demo's network at half a hundred steps of training, batches of 4 sequences, all of them measured. A gradient is a
forward and a backward pass on the same batch under the same attention kernel. Times are of the process, one thread, so
that a shared machine counts less; medians over the measurements after the first, which starts cold and stands apart.

    python benchmarks/curvature_price.py          # a few minutes on one core
    python benchmarks/curvature_price.py --steps 200
"""

import argparse
import logging
import statistics
import time
import warnings
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from rich.console import Console
from rich.table import Table

from evolute.callbacks import CurvatureMonitor, SpectrumProbe, pace
from evolute.callbacks.access import backend_for, probing
from evolute.callbacks.curvature_presets import PRESETS, QUANTITIES
from evolute.data import TextDataModule
from evolute.geometry.curvature.engines import differentiable_twice, gradients
from evolute.recipes.llm import Pretrain
from evolute.registry import resolve

RECIPE = yaml.safe_load(resolve("llm/pretrain").read_text())
EVERY = 10


class Price(Callback):
    """The milliseconds that each measurement recorded."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.spent: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if self.metric in trainer.callback_metrics:
            self.spent.append(float(trainer.callback_metrics.pop(self.metric)))


class Unit(Callback):
    """The milliseconds of one gradient."""

    def __init__(self) -> None:
        self.spent: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        with probing(trainer, module, backend_for(trainer, "benchmark"), batch, index) as probe, differentiable_twice():
            begin = time.process_time()
            gradients(probe.loss(), list(probe.params.values()))
            self.spent.append(1e3 * (time.process_time() - begin))


def train(callbacks: list[Callback], steps: int) -> None:
    L.seed_everything(0, verbose=False)
    data = TextDataModule(**{**RECIPE["data"]["init_args"], "batch_size": 4})
    model = {**RECIPE["model"].get("init_args", RECIPE["model"]), "optimizer": "adamw", "lr": 5e-3, "samples": 0}
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=DummyLogger(),
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    trainer.fit(Pretrain(**model), data)


def arms() -> dict[str, tuple[Callback, str]]:
    every: dict[str, Any] = {"every_n_steps": EVERY, "samples": 4, "budget": None}
    monitors = {q: CurvatureMonitor(quantities=[q], **every) for q in QUANTITIES}
    monitors |= {f"preset {name}": CurvatureMonitor(preset=name, **every) for name in PRESETS}
    found: dict[str, tuple[Callback, str]] = {n: (m, "curvature/time_ms") for n, m in monitors.items()}
    found["SpectrumProbe"] = (SpectrumProbe(**every), "spectrum/time_ms")
    found["SpectrumProbe, split"] = (SpectrumProbe(split=True, **every), "spectrum/time_ms")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=51)
    parser.add_argument("--only", nargs="*", help="names of arms")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    pace.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[attr-defined]
    table = Table("quantity", "first", "later", title="Gradients of the probe batch")
    for name, (callback, metric) in arms().items():
        if options.only and name not in options.only:
            continue
        price, unit = Price(metric), Unit()
        train([unit, callback, price], options.steps)
        g = statistics.median(unit.spent)
        later = statistics.median(price.spent[1:]) / g
        table.add_row(name, f"{price.spent[0] / g:.1f}", f"{later:.1f}")
        print(f"{name}: first {price.spent[0] / g:.1f}, later {later:.1f} (g = {g:.1f} ms)", flush=True)
    Console().print(table)


if __name__ == "__main__":
    main()

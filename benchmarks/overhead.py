"""What the callbacks cost: wall-clock and memory of the demo's training run with and without them.

Arms: ``base`` (no callback), ``monitors`` (CurvatureMonitor, StepRadius and LayerMonitor at their defaults),
``noise`` (NoiseAdaptiveLR measuring every k-th step) and ``noise every step``. Arms alternate within a round, and the ratio to the
base is that of the medians over rounds; their spread is printed. Bars: monitors at most 3 % with at least 25 sharpness
points and 100 step ratios, noise at most 5 %, and at most one copy of the gradient of extra memory for it.

    python benchmarks/overhead.py                          # about 40 minutes on one core
    python benchmarks/overhead.py --steps 300 --rounds 2   # a rough look

The exit code is 1 if a bar is missed.
"""

import argparse
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table

from evolute.callbacks import CurvatureMonitor, LayerMonitor, NoiseAdaptiveLR, StepRadius
from evolute.callbacks.access import named_parameters
from evolute.data import TextDataModule
from evolute.recipes.llm import Pretrain
from evolute.registry import resolve

RECIPE = yaml.safe_load(resolve("llm/pretrain").read_text())
EVERY = 5
ARMS: dict[str, Callable[[], list[Callback]]] = {
    "base": list,
    "monitors": lambda: [CurvatureMonitor(), StepRadius(), LayerMonitor()],
    f"noise, every {EVERY}": lambda: [NoiseAdaptiveLR(every_n_steps=EVERY)],
    "noise, every step": lambda: [NoiseAdaptiveLR()],
}


class Stopwatch(Callback):
    """Time the training loop without its set-up; count what was recorded; find the most held between two steps."""

    def __init__(self) -> None:
        self.recorded: dict[str, int] = {}
        self.held = 0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.wall, self.cpu = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.seconds, self.cpu_seconds = time.perf_counter() - self.wall, time.process_time() - self.cpu
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            self.held = max(self.held, tensors_of(callback.state_dict()))


class Counter(L.pytorch.loggers.logger.DummyLogger):
    """Count measurements instead of writing them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        for name in metrics:
            self.counts[name] = self.counts.get(name, 0) + 1


def tensors_of(state: Any) -> int:
    """Bytes of the tensors in a state."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(tensors_of(v) for v in values)


def run(arm: str, steps: int, seed: int) -> dict[str, Any]:
    """Train the demo's model for some steps, without validation, and say what it took."""
    L.seed_everything(seed, verbose=False)
    module = Pretrain(**{**RECIPE["model"]["init_args"], "samples": 0})
    data = TextDataModule(**RECIPE["data"]["init_args"])
    watch, counter = Stopwatch(), Counter()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, limit_val_batches=0, logger=counter,
        gradient_clip_val=RECIPE["trainer"]["gradient_clip_val"], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*ARMS[arm](), watch],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    gradient = sum(p.numel() * p.element_size() for p in named_parameters(module).values())
    loss = float(trainer.callback_metrics["train/loss"])
    return {
        "arm": arm, "steps": steps, "seconds": watch.seconds, "cpu_seconds": watch.cpu_seconds, "loss": loss,
        "held_gradients": watch.held / gradient,
        "sharpness": counter.counts.get("curvature/sharpness", 0), "ratios": counter.counts.get("step/ghost_ratio", 0),
    }  # fmt: skip


def report(results: list[dict[str, Any]]) -> int:
    """Print the table; return how many bars were missed."""
    table = Table("arm", "wall s, median (range)", "ratio", "CPU ratio", "sharpness points", "step ratios",
                  "gradient copies held", "last loss", title="Cost of the callbacks on the demo model")  # fmt: skip
    by_arm = {arm: [r for r in results if r["arm"] == arm] for arm in ARMS}

    def median(arm: str, key: str) -> float:
        return statistics.median(r[key] for r in by_arm[arm])

    for arm, runs in by_arm.items():
        walls = [r["seconds"] for r in runs]
        table.add_row(
            arm, f"{median(arm, 'seconds'):.1f} ({min(walls):.1f}-{max(walls):.1f})",
            f"{median(arm, 'seconds') / median('base', 'seconds'):.3f}",
            f"{median(arm, 'cpu_seconds') / median('base', 'cpu_seconds'):.3f}", str(runs[0]["sharpness"]),
            str(runs[0]["ratios"]), f"{runs[0]['held_gradients']:.2f}", f"{median(arm, 'loss'):.3f}",
        )  # fmt: skip
    Console().print(table)
    noise = f"noise, every {EVERY}"
    bars = {
        "monitors cost at most 3 %": median("monitors", "seconds") <= 1.03 * median("base", "seconds"),
        "at least 25 sharpness points": by_arm["monitors"][0]["sharpness"] >= 25,
        "at least 100 step ratios": by_arm["monitors"][0]["ratios"] >= 100,
        "noise-adaptive rates cost at most 5 %": median(noise, "seconds") <= 1.05 * median("base", "seconds"),
        "noise-adaptive rates hold at most one gradient": by_arm[noise][0]["held_gradients"] <= 1.001,
    }
    for bar, met in bars.items():
        print(f"{'met   ' if met else 'MISSED'} {bar}")
    return sum(not met for met in bars.values())


def main() -> int:
    """Run all arms in alternation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write every run's numbers here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    run("monitors", 20, seed=0)  # imports, allocator and caches warm up
    results: list[dict[str, Any]] = []
    for round_ in range(args.rounds):
        arms = list(ARMS) if round_ % 2 == 0 else list(reversed(ARMS))
        for arm in arms:
            results.append(run(arm, args.steps, seed=round_))
            print(json.dumps(results[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return 1 if report(results) else 0


if __name__ == "__main__":
    sys.exit(main())

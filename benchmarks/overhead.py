"""What the callbacks cost: wall-clock and memory of the demo's training with and without them.

Arms: ``base`` (no callback), ``monitors`` (CurvatureMonitor, StepRadius and LayerMonitor at their defaults) and
``noise`` (NoiseAdaptiveLR measuring every k-th step). They train side by side in one process and take turns every
hundred steps, so that a machine that slows down slows them all; the ratio is that of the medians over these turns,
each of which holds every kind of measurement. Bars: monitors at most 3 % with at least 25 sharpness points and 100
step ratios, noise at most 5 % and at most one copy of the gradient held between steps.

    python benchmarks/overhead.py                # fifty minutes on one core
    python benchmarks/overhead.py --steps 600    # a rough look, too short for the counts

The exit code is 1 if a bar is missed.
"""

import argparse
import json
import logging
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from rich.console import Console
from rich.table import Table

from evolute.callbacks import CurvatureMonitor, LayerMonitor, NoiseAdaptiveLR, StepRadius
from evolute.callbacks.access import named_parameters
from evolute.data import TextDataModule
from evolute.recipes.llm import Pretrain
from evolute.registry import resolve

RECIPE = yaml.safe_load(resolve("llm/pretrain").read_text())
TURN = 150
EVERY = 5
ARMS: dict[str, Callable[[], list[Callback]]] = {
    "base": list,
    "monitors": lambda: [CurvatureMonitor(), StepRadius(), LayerMonitor()],
    "noise": lambda: [NoiseAdaptiveLR(every_n_steps=EVERY)],
}


class Turns:
    """Let one arm train at a time."""

    def __init__(self, arms: list[str]) -> None:
        self._changed = threading.Condition()
        self._waiting = list(arms)

    def wait_for(self, arm: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting[0] == arm)

    def pass_on(self, arm: str, done: bool = False) -> None:
        with self._changed:
            self._waiting.remove(arm)
            if not done:
                self._waiting.append(arm)
            self._changed.notify_all()


class Stopwatch(Callback):
    """Time an arm's turns and count what it recorded."""

    def __init__(self, arm: str, turns: Turns) -> None:
        self.arm, self.turns = arm, turns
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.held = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._start()

    def _start(self) -> None:
        self._began = time.perf_counter(), time.thread_time()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step % TURN:
            return
        self.wall.append(time.perf_counter() - self._began[0])
        self.cpu.append(time.thread_time() - self._began[1])
        held = [tensors_of(callback.state_dict().get("pairs")) for callback in trainer.callbacks]  # type: ignore[attr-defined]
        self.held = max(self.held, *held)
        if trainer.global_step < trainer.max_steps:
            self.turns.pass_on(self.arm)
            self.turns.wait_for(self.arm)
            self._start()


class Counter(DummyLogger):
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


def train(arm: str, steps: int, turns: Turns, results: dict[str, Any]) -> None:
    """Train one arm, in turns with the others."""
    turns.wait_for(arm)
    try:
        L.seed_everything(0, verbose=False)
        module = Pretrain(**{**RECIPE["model"]["init_args"], "samples": 0})
        watch, counter = Stopwatch(arm, turns), Counter()
        trainer = L.Trainer(
            accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, limit_val_batches=0, logger=counter,
            gradient_clip_val=RECIPE["trainer"]["gradient_clip_val"], enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[*ARMS[arm](), watch],
        )  # fmt: skip
        trainer.fit(module, datamodule=TextDataModule(**RECIPE["data"]["init_args"]))
        gradient = sum(p.numel() * p.element_size() for p in named_parameters(module).values())
        results[arm] = {
            "wall": watch.wall, "cpu": watch.cpu, "held_gradients": watch.held / gradient,
            "loss": float(trainer.callback_metrics["train/loss"]),
            "sharpness": counter.counts.get("curvature/sharpness", 0),
            "ratios": counter.counts.get("step/ghost_ratio", 0),
        }  # fmt: skip
    finally:
        turns.pass_on(arm, done=True)


def report(results: dict[str, Any]) -> int:
    """Print the table; return how many bars were missed."""
    table = Table("arm", "ms a step: median (range) over turns", "ratio of medians", "of thread CPU time",
                  "sharpness points", "step ratios", "gradient copies held", "last loss",
                  title="Cost of the callbacks on the demo's model")  # fmt: skip

    def ratio(arm: str, key: str = "wall") -> float:
        return statistics.median(results[arm][key]) / statistics.median(results["base"][key])

    for arm, run in results.items():
        steps = [1e3 * seconds / TURN for seconds in run["wall"]]
        table.add_row(
            arm, f"{statistics.median(steps):.1f} ({min(steps):.1f}-{max(steps):.1f})", f"{ratio(arm):.3f}",
            f"{ratio(arm, 'cpu'):.3f}", str(run["sharpness"]), str(run["ratios"]), f"{run['held_gradients']:.2f}",
            f"{run['loss']:.3f}",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    bars: dict[str, bool] = {}
    if "monitors" in results:
        bars[f"monitors cost at most 3 % ({ratio('monitors') - 1:+.1%})"] = ratio("monitors") <= 1.03
        bars["at least 25 sharpness points"] = results["monitors"]["sharpness"] >= 25
        bars["at least 100 step ratios"] = results["monitors"]["ratios"] >= 100
    if "noise" in results:
        bars[f"noise-adaptive rates, k = {EVERY}, cost at most 5 % ({ratio('noise') - 1:+.1%})"] = (
            ratio("noise") <= 1.05
        )
        bars["noise-adaptive rates hold at most one gradient"] = results["noise"]["held_gradients"] <= 1.001
    for bar, met in bars.items():
        print(f"{'met   ' if met else 'MISSED'} {bar}")
    return sum(not met for met in bars.values())


def main() -> int:
    """Train all arms in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3900, help=f"optimizer steps of each arm, a multiple of {TURN}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS)[1:], default=list(ARMS)[1:], help="beside the base")
    parser.add_argument("--json", type=Path, help="write every turn's numbers here")
    args = parser.parse_args()
    if args.steps < TURN or args.steps % TURN:
        parser.error(f"--steps {args.steps}: must be a multiple of {TURN}")
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    results: dict[str, Any] = {}
    arms = ["base", *args.arms]
    turns = Turns(arms)
    threads = [threading.Thread(target=train, args=(arm, args.steps, turns, results)) for arm in arms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if set(results) != set(arms):
        return 2  # an arm failed and has said why
    results = {arm: results[arm] for arm in arms}
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return 1 if report(results) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Does slowing the noisy layers help? A teacher-student network in which we know which layers are noisy.

Six tanh layers of 32 x 32 learn a teacher of the same shape from fresh data; Gaussian noise is added to the gradients
of layers 0 and 2. Three arms, all Muon-type steps along the exact polar factor: ``muon`` (one rate for all layers),
``lanton`` (noise-adaptive rates), ``lanton_5`` (the noise measured at every fifth step only) and ``reversed`` (the same
ratios on the wrong layers: the control). Each arm takes the
learning rate that is best for it on the selection seeds and is compared on fresh ones, paired by seed (same teacher,
start, data and noise).

    python benchmarks/lanton_mlp.py                    # through the Trainer and the callback NoiseAdaptiveLR
    python benchmarks/lanton_mlp.py --engine plain     # the bare formulas in a loop, a few minutes on one core

One JSON a run lands in benchmarks/results/lanton_mlp/; a run that is there is not repeated. The exit code
is 1 if a bar is missed.
"""

import argparse
import json
import logging
import math
import statistics
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from evolute.callbacks.noise_adaptive_lr import NoiseAdaptiveLR
from evolute.geometry import dual_norm, noise_ema, noise_ratios
from evolute.optim import Scion

WIDTH, DEPTH, BATCH, HELD_OUT = 32, 6, 64, 512
NOISY = (0, 2)
CLEAN = tuple(i for i in range(DEPTH) if i not in NOISY)
# Each grid brackets its arm's optimum (checked below).
GRID = {
    "muon": (0.007, 0.01, 0.014, 0.02),
    "lanton": (0.02, 0.03, 0.04, 0.06),
    "lanton_5": (0.02, 0.03, 0.04, 0.06),
    "reversed": (0.01, 0.014, 0.02, 0.03),
}
EVERY = {"lanton_5": 5}  # steps between two measurements, where it is not every step
RESULTS = Path(__file__).parent / "results" / "lanton_mlp"


@dataclass(frozen=True)
class Run:
    """One training run; its fields are the name of its result."""

    engine: Literal["plain", "lightning"]
    arm: Literal["muon", "lanton", "lanton_5", "reversed"]
    lr: float
    seed: int
    steps: int = 400
    noise: float = 8.0
    alpha: float | Literal["auto"] = 1.0
    power: float = 0.5
    decay: float = 0.9

    @property
    def path(self) -> Path:
        return RESULTS / ("-".join(str(value) for value in asdict(self).values()) + ".json")


class Problem:
    """Teacher, student, batches and gradient noise: all from the seed, the same for every arm."""

    def __init__(self, run: Run) -> None:
        self.noise_std = run.noise / WIDTH
        self.generator = torch.Generator().manual_seed(run.seed)
        self.teacher = self._network(1.3)
        self.student = self._network(1.0)
        self.held_out = self._normal(HELD_OUT, WIDTH)
        self.layers = [m for m in self.student if isinstance(m, nn.Linear)]

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def _network(self, gain: float) -> nn.Sequential:
        layers: list[nn.Module] = []
        for _ in range(DEPTH):
            layer = nn.Linear(WIDTH, WIDTH, bias=False)
            layer.weight.data = self._normal(WIDTH, WIDTH) * gain / math.sqrt(WIDTH)
            layers += [layer, nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    def loss(self) -> Tensor:
        """Half the squared error, summed over outputs, averaged over a fresh batch."""
        x = self._normal(BATCH, WIDTH)
        with torch.no_grad():
            y = self.teacher(x)
        return 0.5 * (self.student(x) - y).square().sum(1).mean()

    def add_noise(self) -> None:
        for i in NOISY:
            gradient = self.layers[i].weight.grad
            assert gradient is not None
            gradient += self.noise_std * self._normal(WIDTH, WIDTH)

    @torch.no_grad()
    def mse(self) -> float:
        return (self.student(self.held_out) - self.teacher(self.held_out)).square().mean().item()

    def optimizer(self, lr: float) -> Scion:
        groups = [{"params": [layer.weight]} for layer in self.layers]
        return Scion(groups, lr=lr, momentum=0.95, method="svd")


def train_plain(run: Run) -> dict[str, Any]:
    """The bare method, without a Trainer: the quickest way to the numbers."""
    problem = Problem(run)
    optimizer = problem.optimizer(run.lr)
    noise, ratios = torch.zeros(DEPTH), torch.ones(DEPTH)
    previous: Tensor | None = None
    every = EVERY.get(run.arm, 1)
    history = torch.ones(run.steps, DEPTH)
    for step in range(run.steps):
        optimizer.zero_grad()
        problem.loss().backward()
        problem.add_noise()
        if run.arm != "muon":
            gradient = torch.stack([layer.weight.grad for layer in problem.layers if layer.weight.grad is not None])
            if previous is not None and step % every == 0:
                noise = noise_ema(noise, dual_norm(gradient - previous, "spectral").square(), run.decay, every)
                ratios = noise_ratios(noise, run.alpha, run.power)
            previous = gradient
        history[step] = ratios
        applied = ratios.flip(0) if run.arm == "reversed" else ratios
        lr = run.lr * 0.5 * (1 + math.cos(math.pi * step / run.steps))
        for group, ratio in zip(optimizer.param_groups, applied.tolist(), strict=True):
            group["lr"] = lr * ratio
        optimizer.step()
    return summary(problem, history)


def summary(problem: Problem, history: Tensor) -> dict[str, Any]:
    """What a run is judged by; ``history`` [steps, layers] holds the measured (not the reversed) ratios."""
    mean = history.mean(0)
    return {
        "mse": problem.mse(),
        "ratio_noisy": mean[list(NOISY)].mean().item(),
        "ratio_clean": mean[list(CLEAN)].mean().item(),
        "ratios": mean.tolist(),
    }


class TeacherStudent(L.LightningModule):
    """The same problem as a LightningModule: noise is added after backward, before any callback sees the gradients."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run_settings = run
        self.problem = Problem(run)
        self.student = self.problem.student
        self.history = torch.ones(run.steps, DEPTH)

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(range(self.run_settings.steps))  # type: ignore[arg-type]  # the batches are the problem's own

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.problem.loss()

    def on_after_backward(self) -> None:
        self.problem.add_noise()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        recorded = self.trainer.callback_metrics
        names = [f"lr_ratio/student.{2 * i}.weight" for i in range(DEPTH)]
        if names[0] in recorded:
            self.history[batch_idx] = torch.stack([torch.as_tensor(recorded[name]) for name in names])

    def configure_optimizers(self) -> Any:
        optimizer = self.problem.optimizer(self.run_settings.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.run_settings.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class OnTheWrongLayers(NoiseAdaptiveLR):
    """The control: the first layer gets the ratio of the last, and so on."""

    def _scale(self, step: Any) -> Mapping[str, float] | None:
        ratios = super()._scale(step) or {}
        return dict(zip(ratios, reversed(ratios.values()), strict=True))


def train_lightning(run: Run) -> dict[str, Any]:
    """The method as users get it: the callback on a Trainer."""
    module = TeacherStudent(run)
    callback = {"muon": None, "reversed": OnTheWrongLayers}.get(run.arm, NoiseAdaptiveLR)
    arguments: dict[str, Any] = {"alpha": run.alpha, "power": run.power, "decay": run.decay}
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=run.steps,
        callbacks=[callback(**arguments, every_n_steps=EVERY.get(run.arm, 1))] if callback else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    return summary(module.problem, module.history)


def execute(run: Run) -> dict[str, Any]:
    """Return the result of a run, from its file if it is there."""
    if run.path.exists():
        return json.loads(run.path.read_text())
    start = time.perf_counter()
    result = {**asdict(run), **(train_plain if run.engine == "plain" else train_lightning)(run)}
    result["seconds"] = time.perf_counter() - start
    run.path.parent.mkdir(parents=True, exist_ok=True)
    partial = run.path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1))
    partial.replace(run.path)
    return result


def paired(a: list[float], b: list[float]) -> tuple[float, float, int]:
    """Mean of ``a - b``, its standard error, and how often ``a`` is smaller."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.mean(differences), error, sum(d < 0 for d in differences)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("lightning", "plain"), default="lightning", help="what carries the method")
    parser.add_argument("--seeds", type=int, default=8, help="fresh seeds for the comparison, at least 2")
    parser.add_argument("--select-seeds", type=int, default=4, help="other seeds, on which learning rates are chosen")
    parser.add_argument("--alpha", default="1.0", help="noise level of LANTON: a number, or 'auto'")
    parser.add_argument("--power", type=float, default=0.5, help="exponent of the ratio")
    args = parser.parse_args()
    if args.seeds < 2 or args.select_seeds < 1:
        parser.error(f"--seeds {args.seeds} --select-seeds {args.select_seeds}: need at least 2 and 1")
    alpha = args.alpha if args.alpha == "auto" else float(args.alpha)
    console = Console(width=None if sys.stdout.isatty() else 140)  # a log should not fold the table
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    torch.set_num_threads(1)  # matrices this small lose time to threads

    def run(arm: str, lr: float, seed: int) -> dict[str, Any]:
        return execute(Run(args.engine, arm, lr, seed, alpha=alpha, power=args.power))  # type: ignore[arg-type]

    selection = [(arm, lr, seed) for arm, grid in GRID.items() for lr in grid for seed in range(args.select_seeds)]
    chosen_on: dict[tuple[str, float], list[float]] = {}
    for arm, lr, seed in track(selection, "choosing learning rates", console=console):
        chosen_on.setdefault((arm, lr), []).append(run(arm, lr, seed)["mse"])
    best = {arm: min(grid, key=lambda lr: statistics.mean(chosen_on[arm, lr])) for arm, grid in GRID.items()}
    fresh = range(1000, 1000 + args.seeds)
    jobs = [(arm, seed) for arm in GRID for seed in fresh]
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in GRID}
    for arm, seed in track(jobs, "fresh seeds", console=console):
        results[arm].append(run(arm, best[arm], seed))
    return report(console, chosen_on, best, results)


def report(
    console: Console,
    chosen_on: dict[tuple[str, float], list[float]],
    best: dict[str, float],
    results: dict[str, list[dict[str, Any]]],
) -> int:
    """Print every number and the bars; return 1 if one is missed."""
    grid = Table(title="held-out MSE by learning rate, mean (standard deviation) over the selection seeds")
    for column in ("arm", "lr", "mse", "chosen", "optimum bracketed"):
        grid.add_column(column)
    for (arm, lr), mses in chosen_on.items():
        spread = statistics.stdev(mses) if len(mses) > 1 else math.nan
        inside = "yes" if best[arm] in GRID[arm][1:-1] else "NO"
        grid.add_row(
            arm,
            f"{lr:g}",
            f"{statistics.mean(mses):.4f} ({spread:.4f})",
            *(("*", inside) if lr == best[arm] else ("", "")),
        )
    console.print(grid)

    mse = {arm: [r["mse"] for r in rows] for arm, rows in results.items()}
    n = len(mse["muon"])
    fresh = Table(title=f"each arm at its own best rate, {n} fresh seeds, paired with muon")
    for column in (
        "arm",
        "lr",
        "mse",
        "of muon",
        "difference",
        "std. error",
        "seeds better",
        "ratio noisy",
        "ratio clean",
    ):
        fresh.add_column(column)
    compared = {arm: paired(mse[arm], mse["muon"]) for arm in mse}
    relative = {arm: statistics.mean(mse[arm]) / statistics.mean(mse["muon"]) for arm in mse}
    ratio = {arm: [statistics.mean(r[k] for r in results[arm]) for k in ("ratio_noisy", "ratio_clean")] for arm in mse}
    for arm, (difference, error, wins) in compared.items():
        fresh.add_row(
            arm, f"{best[arm]:g}", f"{statistics.mean(mse[arm]):.4f}", f"{relative[arm]:.3f}", f"{difference:+.4f}",
            f"{error:.4f}", f"{wins}/{n}", f"{ratio[arm][0]:.3f}", f"{ratio[arm][1]:.3f}",
        )  # fmt: skip
    console.print(fresh)

    bars = {
        "lanton <= 0.97 x muon": relative["lanton"] <= 0.97,
        "lanton better on >= 4 of 5 seeds": compared["lanton"][2] >= 0.8 * n,
        "reversed no better than muon": relative["reversed"] >= 1.0,
        "ratio of noisy layers < 0.6 x clean": ratio["lanton"][0] < 0.6 * ratio["lanton"][1],
        "every optimum inside its grid": all(best[arm] in GRID[arm][1:-1] for arm in GRID),
    }
    for bar, met in bars.items():
        console.print(f"{'met   ' if met else 'MISSED'}  {bar}")
    return 0 if all(bars.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())

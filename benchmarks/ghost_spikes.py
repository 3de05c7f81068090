"""Does a limit at the ghost radius survive a learning rate that jumps by up to 10,000x?

Digits and Adam; the learning rate jumps at step 50 of 200 ("Ghosts of Softmax", arXiv 2603.13552). Arms: ``adam``;
``clip``, the gradient clipped to norm 1; ``radius``, ``StepRadius(mode="clip")``, which shortens each step to the
radius within which the loss is analytic along it, measured on the batch. All run through the Trainer.

- grid: the three networks of the authors' code at a base rate of 0.015 on the full training set, 10x to 10,000x. The
  authors' code makes ONE step at the high rate.
- held: the same at 10,000x, but the rate stays high to the end, which is harder.
- mlp: an MLP on batches of 64 at three base rates, 1,000x to the end.

    python benchmarks/ghost_spikes.py --jobs 2

One JSON a run lands in benchmarks/results/ghost_spikes/; a run that is there is not repeated. The exit code is 1 if a
bar is missed.
"""

import argparse
import copy
import logging
import warnings
from dataclasses import dataclass
from typing import Any

import digits
import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from evolute.callbacks import StepRadius
from evolute.reports import style

STEPS, SPIKE_AT = 200, 50
ARMS = ("adam", "clip", "radius")
SPIKES = (10, 100, 1_000, 10_000)
BASE_RATES = (1e-4, 1e-3, 1e-2)
# Median final test accuracy at 10,000x in the paper, by arm.
PAPER = {"transformer": (31.8, 38.7, 95.3), "mlp_ln": (44.6, 51.5, 93.9), "cnn_bn": (13.4, 10.3, 71.6)}


@dataclass(frozen=True)
class Run(digits.Run):
    """``batch`` 0 is the whole training set; ``hold`` is the number of steps at the high rate."""

    network: str
    arm: str
    lr: float
    spike: int
    hold: int
    batch: int
    seed: int


class OneTokenTransformer(nn.Module):
    """The authors' block of width 32: an image is one token, so attention has nothing to choose from."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(64, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = digits.mlp(width, 4 * width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).unsqueeze(1)
        x = x + self.out(F.scaled_dot_product_attention(*self.qkv(self.norm1(x)).chunk(3, dim=-1)))
        return self.head((x + self.mlp(self.norm2(x))).squeeze(1))


def cnn_bn(width: int = 32) -> nn.Sequential:
    """Return two convolutions over the 64 pixels in a row, with BatchNorm, and a mean over places."""

    def block(channels: int) -> list[nn.Module]:
        return [nn.Conv1d(channels, width, 3, padding=1), nn.BatchNorm1d(width), nn.ReLU()]

    pool = [nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(nn.Unflatten(1, (1, 64)), *block(1), *block(width), *pool)


NETWORKS = {
    "transformer": OneTokenTransformer,
    "mlp_ln": lambda: digits.mlp(64, 64, 64, 64, 10, norm=True),
    "cnn_bn": cnn_bn,
    "mlp": lambda: digits.mlp(64, 128, 10, activation=nn.ReLU),
}


class Spiked(L.LightningModule):
    """A classifier whose learning rate jumps."""

    def __init__(self, run: Run, data: digits.Digits) -> None:
        super().__init__()
        self.run_settings, self.digits = run, data
        torch.manual_seed(run.seed)
        self.network = NETWORKS[run.network]()
        self.accuracy_before = 0.0

    def train_dataloader(self) -> DataLoader[Any]:
        run = self.run_settings
        batches = digits.batches(self.digits, run.batch or len(self.digits.x), STEPS, run.seed)
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is a data set

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.run_settings.lr)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        run = self.run_settings
        high = SPIKE_AT <= batch_idx < SPIKE_AT + run.hold
        self.trainer.optimizers[0].param_groups[0]["lr"] = run.lr * (run.spike if high else 1)
        if batch_idx == SPIKE_AT:
            self.accuracy_before = self.test(training=False)[1]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.network(x), y)

    def test(self, training: bool) -> tuple[float, float]:
        """Loss and accuracy on the test set, in training mode with the test set's own batch statistics."""
        return digits.judge(copy.deepcopy(self.network).train(training), self.digits.x_test, self.digits.y_test)


class Scales(Callback):
    """The factor on each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append(float(trainer.callback_metrics["step/clip_scale"]))


def work(run: Run) -> dict[str, Any]:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*(many workers|number of training batches|LeafSpec|srun).*")
    scales = Scales()
    # The authors' grid keeps the first fifth for testing, their MLP a random fifth.
    module = Spiked(run, digits.load(run.seed if run.network == "mlp" else None))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=1.0 if run.arm == "clip" else None,
        callbacks=[StepRadius(mode="clip"), scales] if run.arm == "radius" else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    loss, accuracy = module.test(training=False)
    return {
        "loss": loss,
        "accuracy": accuracy,
        "accuracy_batch_statistics": module.test(training=True)[1],
        "accuracy_before": module.accuracy_before,
        "scales": scales.seen,
    }


def grid(seeds: int) -> list[Run]:
    """Full batch, one step at the high rate; adam without a spike says what there is to lose. Largest spike first."""
    spikes = [(spike, arm) for spike in reversed(SPIKES) for arm in ARMS] + [(1, "adam")]
    return [Run(n, arm, 0.015, s, 1, 0, seed) for s, arm in spikes for n in PAPER for seed in range(seeds)]


def held(seeds: int) -> list[Run]:
    hold = STEPS - SPIKE_AT
    return [Run(n, arm, 0.015, SPIKES[-1], hold, 0, seed) for arm in ARMS for n in PAPER for seed in range(seeds)]


def mlp(seeds: int) -> list[Run]:
    hold = STEPS - SPIKE_AT
    return [Run("mlp", arm, lr, 1_000, hold, 64, seed) for lr in BASE_RATES for arm in ARMS for seed in range(seeds)]


def medians(results: list[dict[str, Any]], value: str, *fields: str) -> dict[tuple[Any, ...], float]:
    """Return the median of a value over the runs that share ``fields``."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for r in results:
        found.setdefault(tuple(r[field] for field in fields), []).append(r[value])
    return {key: digits.median(values) for key, values in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each kind")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    args = parser.parse_args()
    if args.seeds < 1 or args.jobs < 1:
        parser.error(f"--seeds {args.seeds} --jobs {args.jobs}: both must be at least 1")
    runs = [*mlp(args.seeds), *grid(args.seeds), *held(args.seeds)]
    runs.sort(key=lambda run: run.network == "cnn_bn")  # the slow ones last
    return report(digits.Bench("ghost_spikes", work, args.jobs).results(runs))


def report(results: list[dict[str, Any]]) -> int:
    """Print and draw every median and the bars; return 1 if one is missed."""
    on_mlp = [r for r in results if r["network"] == "mlp"]
    on_grid = [r for r in results if r["network"] != "mlp" and r["hold"] == 1]
    on_held = [r for r in results if r["network"] != "mlp" and r["hold"] > 1]
    # The authors test in training mode, on the test set's batch statistics: for BatchNorm that is another number.
    running = medians(on_grid, "accuracy", "network", "spike", "arm")
    batch = medians(on_grid, "accuracy_batch_statistics", "network", "spike", "arm")
    to_end = medians(on_held, "accuracy_batch_statistics", "network", "arm")
    diverged = {key: loss > 10 for key, loss in medians(on_grid, "loss", "network", "spike", "arm").items()}

    table = Table(
        title="median final test accuracy (batch statistics), one step at base rate 0.015 times the spike; ! loss > 10"
    )
    for column in (
        "network",
        "arm",
        "no spike",
        *(f"{spike:,}x" for spike in SPIKES),
        "paper at 10,000x",
        "held 10,000x",
    ):
        table.add_column(column)
    for network, paper in PAPER.items():
        for arm, theirs in zip(ARMS, paper, strict=True):
            values = [f"{batch[network, s, arm]:.1f}{' !' * diverged[network, s, arm]}" for s in SPIKES]
            plain = f"{batch[network, 1, arm]:.1f}" if arm == "adam" else ""
            table.add_row(network, arm, plain, *values, f"{theirs}", f"{to_end[network, arm]:.1f}")
    digits.console().print(table)
    in_use = ", ".join(f"{arm} {running['cnn_bn', SPIKES[-1], arm]:.1f}" for arm in ARMS)
    unspiked = running["cnn_bn", 1, "adam"]
    digits.console().print(f"cnn_bn with running statistics, at 10,000x: {in_use}; no spike {unspiked:.1f}")

    final = medians(on_mlp, "accuracy", "lr", "arm")
    before = medians(on_mlp, "accuracy_before", "lr", "arm")
    table = Table(title="MLP, batches of 64, 1,000x from step 50 to the end: median test accuracy")
    for column in ("base rate", "before the spike", *ARMS):
        table.add_column(column)
    for lr in BASE_RATES:
        table.add_row(f"{lr:g}", f"{before[lr, 'adam']:.1f}", *(f"{final[lr, arm]:.1f}" for arm in ARMS))
    digits.console().print(table)
    digits.save(draw(batch), "ghost_spikes")

    bars: dict[str, bool] = {}
    for network, (_, clip, radius) in PAPER.items():
        reached = {arm: batch[network, SPIKES[-1], arm] for arm in ARMS}
        bars[f"{network} at 10,000x: radius at most 2 points below the paper's {radius}"] = (
            reached["radius"] >= radius - 2
        )
        bars[f"{network} at 10,000x: ahead of clip by at least the paper's {radius - clip:.1f} less 10"] = (
            reached["radius"] - reached["clip"] >= radius - clip - 10
        )
    bars["cnn_bn at 10,000x, running statistics: radius at most 2 points below 71.6"] = (
        running["cnn_bn", SPIKES[-1], "radius"] >= 69.6
    )
    bars["mlp at 0.01: adam collapses to at most 20"] = final[1e-2, "adam"] <= 20
    bars["mlp: radius keeps 90 % of the accuracy before the spike at all rates"] = all(
        final[lr, "radius"] >= 0.9 * before[lr, "radius"] for lr in BASE_RATES
    )
    return digits.verdict(bars)


def draw(accuracy: dict[tuple[Any, ...], float]) -> Any:
    """Median final accuracy over the size of the spike, one panel a network; crosses are the paper's."""
    figure, [panels] = digits.figure(1, 3, 3.2)
    for axes, (network, paper) in zip(panels, PAPER.items(), strict=True):
        for i, arm in enumerate(ARMS):
            axes.plot(SPIKES, [accuracy[network, s, arm] for s in SPIKES], "o-", color=style.run_colour(i), label=arm)
            axes.plot(SPIKES[-1], paper[i], "x", color=style.run_colour(i), markersize=10)
        axes.axhline(
            accuracy[network, 1, "adam"], color=style.MUTED, linestyle="--", linewidth=1, label="adam, no spike"
        )
        axes.set_xscale("log")
        axes.set_ylim(0, 102)
        style.label(axes, "factor on the learning rate, one step", "median test accuracy (%)", network)
    style.legend(panels[0])
    return figure


if __name__ == "__main__":
    raise SystemExit(main())

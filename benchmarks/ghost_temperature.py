"""Does the ghost radius explain how far a step can go when the softmax is heated or cooled?

An MLP learns the digits; then one step is made along the descent direction of the loss cross_entropy(z / T), for T from
1/4 to 64. The length at which the loss doubles varies with T; divided by the radius pi T / (largest spread of the
logits' derivative) it should be nearly the same for all T ("Ghosts of Softmax", arXiv 2603.13552: standard deviation
0.992 raw, 0.164 divided, six times less). The MLP is trained on the loss at T, as in the authors' code, or always at
T = 1, so that nothing but the softmax differs.

    python benchmarks/ghost_temperature.py --jobs 2

One JSON a temperature and seed lands in benchmarks/results/ghost_temperature/; one that is there is not repeated. The
exit code is 1 if a bar is missed.
"""

import argparse
import math
import statistics
from dataclasses import dataclass
from typing import Any

import digits
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from rich.table import Table
from torch import Tensor
from torch.func import functional_call

from evolute.geometry import directional_logits, ghost_radius
from evolute.reports import style

TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
STEPS, BATCH, RATE = 120, 256, 0.01  # of the authors' code
LENGTHS = torch.logspace(-2, 2, 161)  # of the step, in ghost radii


@dataclass(frozen=True)
class Run(digits.Run):
    trained_at: float
    temperature: float
    seed: int


def work(run: Run) -> dict[str, Any]:
    data = digits.load(run.seed)
    torch.manual_seed(run.seed)
    model = digits.mlp(64, 128, 128, 10)

    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for x, y in digits.batches(data, BATCH, STEPS, run.seed):
        optimizer.zero_grad()
        F.cross_entropy(model(x) / run.trained_at, y).backward()
        optimizer.step()

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z / run.temperature, y)

    params = dict(model.named_parameters())
    gradient = torch.autograd.grad(loss(model(data.x), data.y), list(params.values()))
    length = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradient]))
    direction = {name: -g / length for name, g in zip(params, gradient, strict=True)}
    slopes = directional_logits(lambda p: functional_call(model, p, (data.x,)), params, direction)
    radius = float(ghost_radius(slopes / run.temperature))

    @torch.no_grad()
    def loss_after(r: float) -> float:
        stepped = {name: p + r * radius * direction[name] for name, p in params.items()}
        return float(loss(functional_call(model, stepped, (data.x,)), data.y))

    before = loss_after(0.0)
    ratio = [loss_after(r) / before for r in LENGTHS.tolist()]
    accuracy = digits.judge(model, data.x_test, data.y_test)[1]
    return {"loss": before, "accuracy": accuracy, "radius": radius, "ratio": ratio, "onset": onset(ratio)}


def onset(ratio: list[float]) -> float:
    """Return the r at which the loss ratio first reaches 2, on a log-log line between points; inf if it does not."""
    for i in range(1, len(ratio)):
        if ratio[i] >= 2:
            low, high, share = LENGTHS[i - 1].log(), LENGTHS[i].log(), math.log(2 / ratio[i - 1])
            return float(torch.exp(low + (high - low) * share / math.log(ratio[i] / ratio[i - 1])))
    return math.inf


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs at each temperature")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    args = parser.parse_args()
    if args.seeds < 1 or args.jobs < 1:
        parser.error(f"--seeds {args.seeds} --jobs {args.jobs}: both must be at least 1")
    at = [(t, t, seed) for t in TEMPERATURES for seed in range(args.seeds)]
    fixed = [(1.0, t, seed) for t in TEMPERATURES for seed in range(args.seeds)]
    results = digits.Bench("ghost_temperature", work, args.jobs).results([Run(*run) for run in at + fixed])
    return report({"trained at T": results[: len(at)], "trained at 1": results[len(at) :]})


def report(results: dict[str, list[dict[str, Any]]]) -> int:
    """Print and draw the onsets and the bars, for networks trained in both ways; return 1 if a bar is missed."""
    bars: dict[str, bool] = {}
    for trained, rows in results.items():
        digits.console().print(table(trained, rows))
        raw = statistics.stdev(math.log10(r["onset"] * r["radius"]) for r in rows)
        divided = statistics.stdev(math.log10(r["onset"]) for r in rows)
        digits.console().print(
            f"{trained}: standard deviation of log10(onset) {raw:.3f} as a length (paper 0.992), {divided:.3f} "
            f"in radii (paper 0.164); {raw / divided:.1f} times less (paper 6.0)"
        )
        bars[f"{trained}: the spread shrinks at least 6 times"] = raw >= 6 * divided
        bars[f"{trained}: no step below one radius doubles the loss"] = all(r["onset"] >= 1 for r in rows)
    digits.save(draw(results), "ghost_temperature")
    return digits.verdict(bars)


def table(trained: str, results: list[dict[str, Any]]) -> Table:
    made = Table(title=f"{trained}: median over seeds; the onset is the step at which the loss doubles")
    for column in ("T", "test accuracy", "loss", "radius", "onset, length", "onset, r", "range of r"):
        made.add_column(column)
    for temperature in TEMPERATURES:
        rows = [r for r in results if r["temperature"] == temperature]
        r_values = [r["onset"] for r in rows]
        mid = {name: digits.median(r[name] for r in rows) for name in ("accuracy", "loss", "radius", "onset")}
        length = digits.median(r["onset"] * r["radius"] for r in rows)
        made.add_row(
            f"{temperature:g}", f"{mid['accuracy']:.1f}", f"{mid['loss']:.3g}", f"{mid['radius']:.4g}",
            f"{length:.4g}", f"{mid['onset']:.2f}", f"{min(r_values):.2f} - {max(r_values):.2f}",
        )  # fmt: skip
    return made


def draw(results: dict[str, list[dict[str, Any]]]) -> Any:
    """Loss ratio over the step's length and over its length in radii; one colour a temperature, one line a seed."""
    figure, panels = digits.figure(2, 2, 6.0)
    for row, (trained, rows) in zip(panels, results.items(), strict=True):
        for r in rows:
            colour = colormaps["viridis"](TEMPERATURES.index(r["temperature"]) / len(TEMPERATURES))
            name = f"T = {r['temperature']:g}" if r["seed"] == 0 else None
            row[0].plot(LENGTHS * r["radius"], r["ratio"], color=colour, linewidth=0.9)
            row[1].plot(LENGTHS, r["ratio"], color=colour, linewidth=0.9, label=name)
        row[1].axvline(1, color=style.MUTED, linestyle="--", linewidth=1)
        for axes, x in zip(row, ("length of the step", "r, step in ghost radii"), strict=True):
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_ylim(0.3, 30)
            axes.axhline(2, color=style.MUTED, linewidth=0.8)
            style.label(axes, x, "loss after / before", trained)
    style.legend(panels[0][1], columns=2)
    return figure


if __name__ == "__main__":
    raise SystemExit(main())

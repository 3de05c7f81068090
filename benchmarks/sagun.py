"""Do the outliers of the Hessian's spectrum count the classes, while the network's width only scales the bulk?

A network of one hidden layer learns K classes until its loss is small: the first K digits, or K Gaussian clusters about
random unit vectors. The spectrum of the Hessian of the
training loss is estimated by stochastic Lanczos quadrature and its outliers counted (Sagun et al., arXiv 1706.04454):
K - 1 or so are expected, whatever the width. K goes from 2 to 10 at 32 hidden units, and these from 16 to 128 for ten
classes.

    python benchmarks/sagun.py --jobs 2

One JSON a run lands in benchmarks/results/sagun/; a run that is there is not repeated. The exit code is 1 if a bar is
missed.
"""

import argparse
from dataclasses import dataclass
from typing import Any

import digits
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from evolute.geometry import Hessian, HessianResidual, spectral_density, top_eigenpairs
from evolute.reports import style

CLASSES, WIDTHS = (2, 3, 4, 6, 8, 10), (16, 32, 64, 128)
WIDTH = 32  # where the number of classes varies
PER_CLASS, NOISE = 40, 0.25
STEPS, RATE, TARGET = 1_000, 0.01, 0.05  # full-batch Adam, to this loss


@dataclass(frozen=True)
class Run(digits.Run):
    data: str
    classes: int
    width: int
    seed: int


def images(classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """As many digits of each class: a class of few would make a small outlier."""
    data = digits.load(seed, classes=classes)
    kept = torch.cat([torch.nonzero(data.y == k)[:PER_CLASS, 0] for k in range(classes)])
    return data.x[kept], data.y[kept]


def clusters(classes: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(classes, 64, generator=generator), dim=1)
    y = torch.arange(classes).repeat_interleave(PER_CLASS)
    return centres[y] + NOISE * torch.randn(len(y), 64, generator=generator), y


SOURCES = {"digits": images, "clusters": clusters}


def work(run: Run) -> dict[str, Any]:
    x, y = SOURCES[run.data](run.classes, run.seed)
    x = x.double()
    torch.manual_seed(run.seed)
    model = digits.mlp(64, run.width, run.classes).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if loss.item() <= TARGET:
            break
        loss.backward()
        optimizer.step()

    params = dict(model.named_parameters())
    with Hessian(lambda: F.cross_entropy(model(x), y), params) as H:
        density = spectral_density(H, probes=4, steps=50)
        top = top_eigenpairs(H, k=run.classes + 5, tol=1e-2)
    with HessianResidual(lambda: model(x), lambda z: F.cross_entropy(z, y), params) as R:
        rest = float(spectral_density(R, probes=2, steps=30).nodes.abs().max())
    return {
        "loss": loss.item(),
        "parameters": density.size,
        "outliers": density.outliers().tolist(),
        "top": top.values.tolist(),
        "residual_norm": rest,
        "near_zero": float(density.near_zero_mass()[0]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each kind")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    args = parser.parse_args()
    if args.seeds < 1 or args.jobs < 1:
        parser.error(f"--seeds {args.seeds} --jobs {args.jobs}: both must be at least 1")
    kinds = dict.fromkeys([*((k, WIDTH) for k in CLASSES), *((CLASSES[-1], w) for w in WIDTHS)])  # one is in both
    runs = [Run(data, *kind, seed) for data in SOURCES for kind in kinds for seed in range(args.seeds)]
    return report(digits.Bench("sagun", work, args.jobs).results(runs))


def report(results: list[dict[str, Any]]) -> int:
    """Print and draw the counts and the bars; return 1 if one is missed."""
    table = Table(title="outliers of the Hessian's spectrum; medians over seeds")
    columns = (
        "data",
        "classes",
        "width",
        "parameters",
        "loss",
        "outliers",
        "each seed",
        "largest",
        "|H - G| / largest",
    )
    for column in (*columns, "beyond 1/1000"):
        table.add_column(column)
    counts: dict[tuple[str, int, int], list[int]] = {}
    for r in results:
        counts.setdefault((r["data"], r["classes"], r["width"]), []).append(len(r["outliers"]))
    for kind, found in counts.items():
        rows = [r for r in results if (r["data"], r["classes"], r["width"]) == kind]
        table.add_row(
            *map(str, kind), str(rows[0]["parameters"]), f"{digits.median(r['loss'] for r in rows):.3f}",
            f"{digits.median(found):g}", " ".join(map(str, found)), f"{digits.median(r['top'][0] for r in rows):.2f}",
            f"{digits.median(r['residual_norm'] / r['top'][0] for r in rows):.4f}",
            f"{digits.median((1 - r['near_zero']) * r['parameters'] for r in rows):.0f}",
        )  # fmt: skip
    digits.console().print(table)
    digits.console().print("beyond 1/1000: eigenvalues larger in size than a thousandth of the largest, their number")
    digits.save(draw(results), "sagun")

    typical = {kind: digits.median(found) for kind, found in counts.items()}
    bars: dict[str, bool] = {}
    for data in SOURCES:
        for k in CLASSES:
            bars[f"{data}, {k} classes: median count within [K - 1, K + 1]"] = k - 1 <= typical[data, k, WIDTH] <= k + 1
        by_width = [typical[data, CLASSES[-1], width] for width in WIDTHS]
        bars[f"{data}, every width: median count within [K - 1, K + 1]"] = all(9 <= count <= 11 for count in by_width)
    return digits.verdict(bars)


def draw(results: list[dict[str, Any]]) -> Any:
    """Left: the count over the number of classes. Right: the leading eigenvalues for ten digits, by width."""
    figure, [panels] = digits.figure(1, 2, 3.4)
    for i, data in enumerate(SOURCES):
        shown = [r for r in results if r["data"] == data and r["width"] == WIDTH]
        aside = [r["classes"] + 0.24 * i - 0.12 for r in shown]
        counts = [len(r["outliers"]) for r in shown]
        panels[0].plot(aside, counts, "o", color=style.run_colour(i), alpha=0.4, label=f"{data}, a seed")
    panels[0].plot(CLASSES, [k - 1 for k in CLASSES], "--", color=style.MUTED, label="K - 1")
    style.label(panels[0], "classes K", "outliers", f"{WIDTH} hidden units")
    for i, width in enumerate(WIDTHS):
        mine = [r for r in results if (r["data"], r["classes"], r["width"]) == ("digits", CLASSES[-1], width)]
        tops = torch.tensor([r["top"] for r in mine])
        values = (tops / tops[:, :1]).median(dim=0).values
        name = f"{width} hidden units"
        panels[1].plot(range(1, len(values) + 1), values, "o-", markersize=4, color=style.run_colour(i), label=name)
    panels[1].axvline(CLASSES[-1] - 0.5, color=style.MUTED, linestyle="--", linewidth=1)
    panels[1].set_yscale("log")
    style.label(panels[1], "rank", "eigenvalue / largest", f"{CLASSES[-1]} digits; the line is after K - 1")
    for axes in panels:
        style.legend(axes)
    return figure


if __name__ == "__main__":
    raise SystemExit(main())

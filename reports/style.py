"""How figures look: colours, axes, layer names, thinning. Nothing here touches matplotlib's global state."""

import re
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator
from numpy.typing import NDArray
from typing_extensions import override

from evolute.reports.run import Array, Series

# The page replaces these three by CSS variables, so figures follow light and dark mode: keep them unlike any other.
INK, MUTED, GRID = "#1f2431", "#6b7281", "#e4e7ec"
# Okabe & Ito (2008), "Color Universal Design", without its yellow and black: told apart by colour-blind readers,
# and strong enough on white and on near-black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
LIMIT = "#d55e00"
MISSING = "#9aa1ad40"
WIDTH = 10.0  # inches
STEP = "optimizer step"


def run_colour(index: int) -> str:
    """Return the colour of the run at a position; more runs than colours share them."""
    return COLOURS[index % len(COLOURS)]


def new_figure(rows: int, columns: int, height: float) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure of the page's width with a grid of styled axes; height in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        style_axes(axes)
    return figure, [list(row) for row in grid]


def style_axes(axes: Axes) -> None:
    """Give axes the house style: no box, faint grid, small legible text."""
    axes.set_facecolor("none")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(which="both", colors=MUTED, labelsize=8.5)
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def label(axes: Axes, x: str = "", y: str = "", title: str = "") -> None:
    """Set axis labels and a left-aligned title."""
    axes.set_xlabel(x, color=INK, fontsize=9)
    axes.set_ylabel(y, color=INK, fontsize=9)
    if x == STEP:
        axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10], integer=True))
    if title:
        axes.set_title(literal(title), color=INK, fontsize=10, loc="left")


class PlainLog(LogFormatter):
    """Tick labels of a logarithmic axis as a person writes them: 0.001, 50, 1e-6. Within a decade, minor ones too."""

    @override
    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}".replace("e-0", "e-").replace("e+0", "e") if super().__call__(x, pos) else ""


def log_labels(axis: Axis) -> None:
    """Give a logarithmic axis plain labels."""
    axis.set_major_formatter(PlainLog())
    axis.set_minor_formatter(PlainLog(minor_thresholds=(1.2, 0.5)))


def legend(axes: Axes, columns: int = 1, above: bool = False) -> None:
    """Draw a frameless legend if anything is labelled: where there is room, or above the axes."""
    if not any(axes.get_legend_handles_labels()[1]):
        return
    drawn = axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, ncols=columns)
    if above:
        drawn.set_loc("lower right")
        drawn.set_bbox_to_anchor((1.0, 1.0), transform=axes.transAxes)


def empty(axes: Axes, why: str) -> None:
    """Say in the middle of empty axes why they are empty."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.text(0.5, 0.5, literal(why), transform=axes.transAxes, ha="center", va="center", color=MUTED, fontsize=9)


def literal(text: str) -> str:
    """Return text that matplotlib draws as it stands, dollars included."""
    return text.replace("$", r"\$")


def short_names(names: Sequence[str]) -> list[str]:
    """Return parameter names without what tells none of them apart.

    ``model.layers.3.self_attn.q_proj.weight`` becomes ``3.q_proj``: block numbers, and as few of the last parts as
    keep the names different.
    """
    parts = [(name.removesuffix(".weight") or name).split(".") for name in names]
    # A bare number says too little: net.2, not 2.
    kept = [2 if split[-1].isdigit() and len(split) > 1 else 1 for split in parts]

    def shorten(split: list[str], tail: int) -> str:
        head = split[: len(split) - tail]
        return ".".join([part for part in head if part.isdigit()] + split[len(head) :])

    while True:
        short = [shorten(split, tail) for split, tail in zip(parts, kept, strict=True)]
        longer = [
            min(tail + (short.count(text) > 1), len(split))
            for split, tail, text in zip(parts, kept, short, strict=True)
        ]
        if longer == kept:
            return [text if len(text) <= 32 else "…" + text[-31:] for text in short]
        kept = longer


def natural(names: Sequence[str]) -> list[str]:
    """Return names in the order given, unless that is plain text order, where layer 10 would precede layer 2."""
    if list(names) != sorted(names):
        return list(names)
    return sorted(names, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])


def smooth(values: Array, windows: int = 30) -> Array:
    """Return a centred moving average over a ``windows``-th of the values; narrower towards both ends."""
    half = values.size // (2 * windows)
    if half < 1:
        return values
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(values.size)
    reach = np.minimum(half, np.minimum(at, values.size - 1 - at))
    return (total[at + reach + 1] - total[at - reach]) / (2 * reach + 1)


def thin(series: Series, limit: int = 1500) -> Series:
    """Return at most about ``limit`` points: the smallest and the largest value of each of ``limit / 2`` buckets."""
    steps, values = series
    if values.size <= limit:
        return series
    kept: set[int] = {0, values.size - 1}
    for bucket in np.array_split(np.arange(values.size), limit // 2):
        kept.update((int(bucket[values[bucket].argmin()]), int(bucket[values[bucket].argmax()])))
    index = np.array(sorted(kept))
    return steps[index], values[index]


def cell_edges(steps: NDArray[np.int64]) -> Array:
    """Return the [n + 1] borders of heat-map columns: half way between two measured steps."""
    if steps.size == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[1.5 * steps[0] - 0.5 * steps[1]], middle, [1.5 * steps[-1] - 0.5 * steps[-2]]])

"""Figures of the Hessian's spectrum and of curvature along the steps: pure functions from runs to a Figure."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evolute.reports import style
from evolute.reports.run import Array, Run

_SHOWN = 4  # densities of one run: the first, the last, and two between
_KERNEL = 0.03  # standard deviation of the smoothing, in decades
Drawn = tuple[str | tuple[float, ...], str, Mapping[str, Array], str]


def spectrum(runs: Sequence[Run]) -> Figure:
    """Density of the Hessian's eigenvalues as training goes on; outliers, edge of the bulk and lowest eigenvalue."""
    figure, [[density, ends]] = style.new_figure(1, 2, height=3.8)
    _draw_densities(density, list(_densities(runs)))
    for index, run in enumerate(runs):
        colour, of = style.run_colour(index), style.literal(f", {run.name}") if len(runs) > 1 else ""
        for step, arrays in run.arrays("spectrum").items() if len(runs) == 1 else ():
            ends.plot(np.full(arrays["outliers"].size, step), arrays["outliers"], ".", color=colour, markersize=4)
        ends.plot(*run.series("spectrum/lambda_max"), color=colour, linewidth=1.2, label=f"largest{of}")
        edge = style.MUTED if len(runs) == 1 else colour
        ends.plot(*run.series("spectrum/bulk_edge"), color=edge, linestyle="--", label=f"edge of the bulk{of}")
        lowest = style.LIMIT if len(runs) == 1 else colour
        ends.plot(*run.series("spectrum/lambda_min"), color=lowest, linestyle=":", label=f"lowest{of}")
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in ends.get_lines()] or [np.ones(1)])
    ends.set_yscale("symlog", linthresh=max(float(np.abs(values).max()) / 100, 1e-12))
    style.label(ends, style.STEP, "eigenvalue, outliers as points")
    style.legend(ends)
    return figure


def spectrum_split(runs: Sequence[Run]) -> Figure:
    """Last density of the Hessian beside those of its Gauss-Newton part and of the rest, one panel a run."""
    figure, grid = style.new_figure(1, len(runs), height=3.4)
    heads = {"": "Hessian", "ggn_": "Gauss-Newton", "residual_": "the rest"}
    for run, axes in zip(runs, grid[0], strict=True):
        split = [arrays for arrays in run.arrays("spectrum").values() if "ggn_nodes" in arrays]
        if not split:
            style.empty(axes, "no split spectrum in the run folder")
            continue
        parts = [(style.COLOURS[i], label, split[-1], head) for i, (head, label) in enumerate(heads.items())]
        _draw_densities(axes, parts)
        if len(runs) > 1:
            axes.set_title(style.literal(run.name), color=style.INK, fontsize=10, loc="left")
    return figure


def critical(runs: Sequence[Run]) -> Figure:
    """Critical sharpness, and the learning rate over the one at which the update would have raised the loss."""
    return _pair(
        runs,
        ("curvature/critical_sharpness", "critical sharpness", None, ""),
        ("curvature/critical_ratio", "rate / critical rate", 1.0, "above, the step raises the loss"),
    )


def agreement(runs: Sequence[Run]) -> Figure:
    """How much of each step the local models of loss and gradient explain."""
    return _pair(
        runs,
        ("curvature/model_agreement", "change of the loss / predicted", 1.0, "as predicted"),
        ("curvature/gns_ratio", "unexplained part of the gradient", 1.0, "above, Newton's model fails"),
    )


def _pair(runs: Sequence[Run], *panels: tuple[str, str, float | None, str]) -> Figure:
    figure, [row] = style.new_figure(1, len(panels), height=2.8)
    for axes, (metric, unit, limit, what) in zip(row, panels, strict=True):
        for index, run in enumerate(runs):
            label = style.literal(run.name) if len(runs) > 1 else ""
            series = style.thin(run.series(metric))
            axes.plot(*series, color=style.run_colour(index), marker=".", markersize=4, linewidth=1, label=label)
        values = np.concatenate([run.series(metric)[1] for run in runs])
        if not values.size:
            style.empty(axes, f"no {metric} recorded")
            continue
        if limit is not None:
            axes.axhline(limit, color=style.MUTED, linestyle="--", linewidth=1.2, label=what)
        if (values > 0).all():
            axes.set_yscale("log")
            style.log_labels(axes.yaxis)
        style.label(axes, style.STEP, unit)
        style.legend(axes)
    return figure


def _densities(runs: Sequence[Run]) -> Iterator[Drawn]:
    """Yield colour, label, arrays and their prefix: a few from first to last of one run, the last of several."""
    for index, run in enumerate(runs):
        found = run.arrays("spectrum")
        if not found:
            continue
        steps = list(found)
        if len(runs) > 1:
            yield style.run_colour(index), style.literal(f"{run.name}, step {steps[-1]:,}"), found[steps[-1]], ""
            continue
        picked = sorted({round(i) for i in np.linspace(0, len(steps) - 1, _SHOWN)})
        shades = colormaps["viridis"](np.linspace(0.85, 0.0, max(len(picked), 2)))
        for shade, place in zip(shades, picked, strict=False):
            yield tuple(shade), f"step {steps[place]:,}", found[steps[place]], ""


def _draw_densities(axes: Axes, drawn: Sequence[Drawn]) -> None:
    """Draw smoothed shares of eigenvalues on an axis that is linear about zero and logarithmic beyond.

    The kernel is as wide on that axis everywhere: on a linear one it would be as wide as a thousand bulks, for
    outliers set its range.
    """
    if not drawn:
        style.empty(axes, "no arrays/spectrum in the run folder")
        return
    largest = max(float(np.abs(arrays[f"{head}nodes"]).max()) for _, _, arrays, head in drawn)
    linear = (largest or 1.0) / 1000
    for colour, label, arrays, head in drawn:
        at = _decades(arrays[f"{head}nodes"].ravel(), linear)
        share = arrays[f"{head}weights"].ravel() / len(arrays[f"{head}weights"])
        points = np.linspace(at.min() - 5 * _KERNEL, at.max() + 5 * _KERNEL, 1000)
        bells = np.exp(-0.5 * ((points[:, None] - at) / _KERNEL) ** 2) / (_KERNEL * np.sqrt(2 * np.pi))
        density = bells @ share
        # Below a thousandth of one eigenvalue's peak there is only the tail of a kernel.
        floor = 1e-3 / (float(arrays[f"{head}size"]) * _KERNEL * np.sqrt(2 * np.pi))
        line = np.where(density > floor, density, np.nan)
        axes.plot(linear * np.sinh(points * np.log(10)), line, color=colour, linewidth=1.1, label=label)
    axes.set_yscale("log")
    style.log_labels(axes.yaxis)
    axes.set_xscale("asinh", linear_width=linear)
    low, high = axes.get_xlim()
    powers = 10.0 ** np.arange(np.ceil(np.log10(5 * linear)), np.floor(np.log10(1000 * linear)) + 1)
    ticks = [tick for tick in (*-powers[::-1], 0.0, *powers) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.axvline(0.0, color=style.MUTED, linewidth=0.8)
    style.label(axes, "eigenvalue", "share of eigenvalues per decade")
    style.legend(axes)


def _decades(values: Array, linear: float) -> Array:
    return np.arcsinh(values / linear) / np.log(10)

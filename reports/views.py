"""Rendered views beside the truth, and how good they became."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evolute.reports import style
from evolute.reports.run import Array, Run

_COLUMNS = ("truth", "render", "error", "depth error")


def views(runs: Sequence[Run]) -> Figure:
    """Draw held-out views of each run at its last validation: truth, render, error, and error of the depth.

    Errors of all runs share one scale a column.
    """
    rows = [(run.name, view, last) for run in runs for view, last in _last(run).items()]
    if not rows:
        figure, grid = style.new_figure(1, 1, height=2.4)
        style.empty(grid[0][0], "no views recorded")
        return figure
    figure, grid = style.new_figure(len(rows), len(_COLUMNS), height=2.1 * len(rows))
    color = max(float(last["error"].max()) for _, _, last in rows)
    finite = [np.abs(last["depth_error"][np.isfinite(last["depth_error"])]) for _, _, last in rows]
    metres = max((float(np.quantile(values, 0.98)) for values in finite if values.size), default=1.0)
    for (_, _, last), axes in zip(rows, grid, strict=True):
        _picture(axes[0], last["truth"])
        _picture(axes[1], last["image"])
        axes[2].imshow(last["error"], cmap="magma", vmin=0, vmax=max(color, 1e-9), interpolation="nearest")
        shown = np.ma.masked_invalid(last["depth_error"])
        axes[3].imshow(shown, cmap="RdBu", vmin=-metres, vmax=metres, interpolation="nearest")
    titles = (*_COLUMNS[:2], f"error, 0 to {color:.2f}", f"depth error, ± {metres:.2g}")
    for axes, title in zip(grid[0], titles, strict=True):
        style.label(axes, title=title)
    for (name, view, _), axes in zip(rows, grid, strict=True):
        axes[0].set_ylabel(f"{name} {view}" if len(runs) > 1 else f"view {view}", color=style.INK, fontsize=9)
    for axes in (a for row in grid for a in row):
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(False)
    return figure


def quality(runs: Sequence[Run]) -> Figure:
    """Draw PSNR and depth error of the held-out views, and the number of Gaussians, over the run."""
    panels = (("val/psnr", "PSNR, dB"), ("val/depth_mae", "depth error, mean"), ("train/gaussians", "Gaussians"))
    figure, grid = style.new_figure(1, len(panels), height=2.8)
    for (metric, unit), axes in zip(panels, grid[0], strict=True):
        for index, run in enumerate(runs):
            steps, values = run.series(metric)
            if steps.size:
                mark = "o" if metric.startswith("val/") else ""
                axes.plot(steps, values, marker=mark, markersize=4, color=style.run_colour(index), label=run.name)
        if not any(run.has(metric) for run in runs):
            style.empty(axes, f"no {metric} recorded")
        style.label(axes, x=style.STEP, y=unit)
    if len(runs) > 1:
        style.legend(grid[0][0])
    return figure


def _picture(axes: Axes, image: Array) -> None:
    axes.imshow(np.clip(image, 0, 1), interpolation="nearest")


def _last(run: Run) -> dict[str, dict[str, Array]]:
    """Return the arrays of the last step of each view that the run recorded."""
    folder = run.folder / "arrays" / "views"
    found: dict[str, dict[str, Array]] = {}
    for place in sorted(folder.iterdir(), key=lambda p: p.name.zfill(8)) if folder.is_dir() else []:
        steps = run.arrays(f"views/{place.name}")
        if steps:
            found[place.name] = steps[max(steps)]
    return found

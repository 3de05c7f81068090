"""Layers x steps heat maps, one panel a run, one colour scale for all of them."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure

from evolute.reports import style
from evolute.reports.run import Array, Run, Series


def layer_heatmap(
    runs: Sequence[Run], prefix: str, unit: str, *, log: bool = True, cmap: str = "viridis", mark: float | None = None
) -> Figure:
    """Draw every metric ``prefix/<layer>`` as a row of coloured cells.

    Args:
        runs: one panel each; a run without data gets a panel that says so.
        prefix: metric prefix, without the last slash.
        unit: label of the colour scale, with its unit.
        log: logarithmic colours; values that are not positive are then left grey, like missing ones.
        cmap: name of a matplotlib colour map.
        mark: value to mark on the colour scale.
    """
    tables = [_table(run.layers(prefix)) for run in runs]
    names = style.natural(list(dict.fromkeys(name for rows, _, _ in tables for name in rows)))
    norm = _norm([values for _, _, values in tables], log)
    colours = colormaps[cmap].with_extremes(bad=style.MISSING)
    figure, grid = style.new_figure(1, len(runs), height=max(2.4, 1.1 + 0.155 * len(names)))
    for index, (run, (rows, steps, values), axes) in enumerate(zip(runs, tables, grid[0], strict=True)):
        title = run.name if len(runs) > 1 else ""
        if not rows:
            style.empty(axes, f"no {prefix} recorded")
            style.label(axes, title=title)
            continue
        full = np.full((len(names), steps.size), np.nan)
        for name, row in zip(rows, values, strict=True):
            full[names.index(name)] = row
        _draw(axes, style.cell_edges(steps), full, norm, colours)
        _name_rows(axes, names if index == 0 or not tables[0][0] else [])
        style.label(axes, x=style.STEP, title=title)
    _colour_bar(figure, grid[0], norm, colours, unit, mark)
    return figure


def _table(layers: dict[str, Series]) -> tuple[list[str], "np.ndarray[tuple[int], np.dtype[np.int64]]", Array]:
    """Return layer names, the union of their steps [n] and the values [layers, n], NaN where not recorded."""
    if not layers:
        return [], np.empty(0, np.int64), np.empty((0, 0))
    steps = np.unique(np.concatenate([steps for steps, _ in layers.values()]))
    values = np.full((len(layers), steps.size), np.nan)
    for row, (at, recorded) in zip(values, layers.values(), strict=True):
        row[np.searchsorted(steps, at)] = recorded
    return list(layers), steps, values


def _norm(tables: Sequence[Array], log: bool) -> Normalize:
    """Return one colour scale for all tables, never of zero width."""
    values = np.concatenate([table.ravel() for table in tables])
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    low, high = (float(values.min()), float(values.max())) if values.size else (1.0, 1.0)
    if log:
        return LogNorm(low, high) if high > low * 1.001 else LogNorm(low / 1.5, low * 1.5)
    return Normalize(low, high) if high > low else Normalize(low - 0.5, low + 0.5)


def _draw(axes: Axes, edges: Array, values: Array, norm: Normalize, colours: Colormap) -> None:
    # Rasterized: a cell would otherwise cost the page some hundred bytes of path.
    masked = np.ma.masked_invalid(np.where(values > 0, values, np.nan) if isinstance(norm, LogNorm) else values)
    axes.pcolormesh(edges, np.arange(values.shape[0] + 1), masked, norm=norm, cmap=colours, rasterized=True)
    axes.invert_yaxis()
    axes.grid(False)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    shown = [style.literal(name) for name in style.short_names(names)]
    axes.set_yticks(np.arange(len(shown)) + 0.5, shown, fontsize=7.5)
    axes.tick_params(axis="y", length=0)


def _colour_bar(
    figure: Figure, panels: list[Axes], norm: Normalize, colours: Colormap, unit: str, mark: float | None
) -> None:
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=panels, pad=0.015, fraction=0.03, aspect=30)
    bar.set_label(unit, color=style.INK, fontsize=9)
    if isinstance(norm, LogNorm):
        style.log_labels(bar.ax.yaxis)
    bar.ax.tick_params(which="both", colors=style.MUTED, labelsize=8)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    if mark is not None and norm.vmin is not None and norm.vmax is not None and norm.vmin < mark < norm.vmax:
        bar.ax.axhline(mark, color=style.LIMIT, linewidth=2)

"""Figures of recommenders: geometry of the item vectors, rankings, a map of the items and who their neighbours are."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from evolute.reports import style
from evolute.reports.run import Run

PANELS = (
    ("norm_ratio", "longest item vector\nover shortest", True),
    ("mean_cos", "mean cosine of two items", False),
    ("eff_rank", "effective rank", False),
    ("kappa_hess", "condition number of the\nloss in the query", True),
    ("kappa_cov", "condition number of the\ncovariance of the items", True),
    ("tv_ratio", "total variation on the graph\n(1: unrelated)", False),
    ("loss_gap", "training loss less that of\nthe reference run", False),
)
GENRES = 6
SHOWN = 6


def geometry(runs: Sequence[Run]) -> Figure:
    """Norms, angles, spectrum and conditioning of the item vectors."""
    panels = [p for p in PANELS if any(run.has(f"item_geometry/{p[0]}") for run in runs)]
    rows = -(-len(panels) // 2)
    figure, axes = style.new_figure(rows, 2, height=2.2 * rows)
    flat = [a for row in axes for a in row]
    for place, (name, text, log) in zip(flat, panels, strict=False):
        for index, run in enumerate(runs):
            label = run.name if len(runs) > 1 else None
            place.plot(*run.series(f"item_geometry/{name}"), color=style.run_colour(index), marker=".", label=label)
        values = [run.series(f"item_geometry/{name}")[1] for run in runs if run.has(f"item_geometry/{name}")]
        low, high = min(v.min() for v in values), max(v.max() for v in values)
        if log and low > 0 and high / low > 1.05:
            place.set_yscale("log")
            style.log_labels(place.yaxis)
        elif log:
            place.set_ylim(0, 2 * high)
        style.label(place, style.STEP, text)
        style.legend(place)
    for place in flat[len(panels) :]:
        figure.delaxes(place)
    return figure


def ranking(runs: Sequence[Run]) -> Figure:
    """HR and NDCG at 10 of the validation targets among all items."""
    figure, [axes] = style.new_figure(1, 2, height=2.6)
    for place, name in zip(axes, ("hr@10", "ndcg@10"), strict=True):
        for index, run in enumerate(runs):
            label = run.name if len(runs) > 1 else None
            place.plot(*run.series(f"val/{name}"), color=style.run_colour(index), marker=".", label=label)
        style.label(place, style.STEP, f"validation {name.upper()}")
        place.set_ylim(bottom=0)
        style.legend(place)
    return figure


def item_map(runs: Sequence[Run]) -> Figure:
    """The item vectors on the two directions of their largest variance, at the first and the last measurement."""
    chosen = [run for run in runs if tables(run)]
    figure, grid = style.new_figure(max(len(chosen), 1), 2, height=3.6 * max(len(chosen), 1))
    for run, row in zip(chosen, grid, strict=False):
        names = item_names(run)
        for place, (step, table) in zip(row, tables(run).items(), strict=False):
            _scatter(place, table, names.get("genre"), run.name if len(runs) > 1 else "", step)
    return figure


def _scatter(place: Any, table: NDArray[Any], genres: list[str] | None, name: str, step: int) -> None:
    centred = table - table.mean(0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    at = centred @ vectors[:, ::-1][:, :2]
    style.label(place, "first direction", "second direction", f"{name} step {step}".strip())
    place.set_xticks([])
    place.set_yticks([])
    if not genres or len(genres) != len(at):
        place.scatter(*at.T, s=3, color=style.run_colour(0), linewidths=0)
        return
    kinds, counts = np.unique(genres, return_counts=True)
    common = kinds[np.argsort(-counts, kind="stable")][:GENRES]
    other = ~np.isin(genres, common)
    place.scatter(*at[other].T, s=3, color=style.MUTED, alpha=0.4, linewidths=0)
    for index, kind in enumerate(common):
        here = np.array(genres) == kind
        colour, label = style.run_colour(index), style.literal(str(kind))
        place.scatter(*at[here].T, s=5, color=colour, alpha=0.8, linewidths=0, label=label)
    place.legend(fontsize=6, markerscale=2, frameon=False, loc="best", ncols=2)


def neighbours(runs: Sequence[Run]) -> Figure:
    """The nearest items of a few well-known ones, by cosine, before and after training, a table a run."""
    chosen = [run for run in runs if tables(run) and item_names(run).get("title")]
    height = 0.3 * SHOWN + 0.6
    figure, grid = style.new_figure(max(len(chosen), 1), 1, height=height * max(len(chosen), 1))
    for [place] in grid:
        style.label(place, "nearest by cosine")
        place.set_axis_off()
    for run, [place] in zip(chosen, grid, strict=False):
        _neighbours(place, run, item_names(run), run.name if len(runs) > 1 else "")
    return figure


def _neighbours(place: Any, run: Run, names: dict[str, Any], label: str) -> None:
    titles, found = names["title"], tables(run)
    shown = _well_known(np.array(names.get("count", []), dtype=float), names.get("genre", []))
    lists = {step: nearest(table, shown) for step, table in found.items()}
    cells = [
        [_short(titles[item]), *("; ".join(_short(titles[j]) for j in lists[step][row]) for step in lists)]
        for row, item in enumerate(shown)
    ]
    table = place.table(
        [[style.literal(c) for c in row] for row in cells],
        colLabels=[style.literal(label or "item"), *(f"nearest at step {step}" for step in lists)],
        colWidths=[0.18, *[0.82 / len(lists)] * len(lists)],
        cellLoc="left",
        colLoc="left",
        bbox=(0, 0, 1, 1),
        edges="horizontal",
    )
    table.auto_set_font_size(False)
    table.set_fontsize(7)
    for (row, column), cell in table.get_celld().items():
        cell.PAD = 0.02
        cell.get_text().set_color(style.INK)
        cell.set_edgecolor(style.MUTED)
        cell.set_linewidth(0.5)
        if row == 0 or column == 0:
            cell.get_text().set_fontweight("bold")


def nearest(table: NDArray[Any], items: Sequence[int], k: int = 3) -> list[list[int]]:
    """Return the ``k`` items of highest cosine to each of ``items``, nearest first, themselves left out."""
    unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    cosine = unit[list(items)] @ unit.T
    cosine[np.arange(len(items)), list(items)] = -2
    return np.argsort(-cosine, axis=1, kind="stable")[:, :k].tolist()


def _well_known(counts: NDArray[Any], genres: list[str]) -> list[int]:
    """Return the most frequent item of each genre, up to six of them."""
    chosen: dict[str, int] = {}
    for item in np.argsort(-counts, kind="stable").tolist():
        chosen.setdefault(genres[item] if genres else str(item), item)
        if len(chosen) == SHOWN:
            break
    return list(chosen.values())


def _short(text: str, limit: int = 26) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def tables(run: Run) -> dict[int, NDArray[Any]]:
    """Return the item vectors kept at the first and the last measurement, by step."""
    found = {step: arrays["table"] for step, arrays in run.arrays("item_geometry").items() if "table" in arrays}
    steps = sorted(found)
    return {step: found[step] for step in steps[:1] + steps[1:][-1:]}


def item_names(run: Run) -> dict[str, Any]:
    """Return titles, genres and counts of the items, as lists, from ``items.json`` of the run folder."""
    try:
        return dict(json.loads((run.folder / "items.json").read_text("utf-8")))
    except (OSError, ValueError):
        return {}

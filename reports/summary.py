"""The five numbers that matter about a run, and how they are printed."""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from evolute.reports.run import Run


def callback_seconds(run: Run) -> dict[str, float]:
    """Return callback prefix -> total seconds it recorded as ``<prefix>/time_ms``, the most expensive first."""
    spent = {
        name.removesuffix("/time_ms"): float(run.series(name)[1].sum()) / 1000
        for name in run.metrics
        if name.endswith("/time_ms") and run.has(name)
    }
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def wall_seconds(run: Run) -> float | None:
    """Return the seconds training took, from ``time/step_ms``, or None.

    A value stands for all steps since the one recorded before it, so a logging interval above 1 is accounted for.
    """
    steps, values = run.series("time/step_ms")
    if not steps.size:
        return None
    # The first record covers the steps before it as far as the interval to the second one says.
    first = min(int(steps[0]) + 1, int(steps[1] - steps[0])) if steps.size > 1 else 1
    return float(values @ np.diff(steps, prepend=steps[0] - first)) / 1000


def threshold_metric(run: Run) -> str:
    """Return the name of the sharpness that the threshold is for.

    An optimizer that preconditions, or steps by a norm of its own, is stable up to a threshold on the preconditioned or
    the generalized sharpness. Of what was recorded, it is the one that explains the recorded ratio.
    """
    kinds = ("sharpness", "preconditioned_sharpness", "generalized_sharpness")
    names = [name for kind in kinds if run.has(name := f"curvature/{kind}")]
    limit, ratio = run.last("curvature/threshold"), run.last("curvature/eos_ratio")
    if not names or not limit or ratio is None:
        return "curvature/sharpness"
    return min(names, key=lambda name: abs((run.last(name) or 0.0) / limit - ratio))


def summary(run: Run) -> dict[str, float | None]:
    """Return the numbers that matter; None where the run did not record what a number needs.

    Keys: ``val_bits_per_byte`` (last), ``bigram_floor_bits_per_byte``, ``below_floor`` (fraction of the floor, positive
    when below it); ``sharpness`` (the kind its threshold is for), ``threshold`` and ``eos_ratio`` (last);
    ``max_step_ratio`` and ``max_step_ratio_at`` (its step); ``tokens_per_s`` (median); ``callback_seconds``,
    ``wall_seconds`` and ``callback_share``.
    """
    bits, floor = run.last("val/bits_per_byte"), run.bigram_floor
    sharpness, threshold = run.last(threshold_metric(run)), run.last("curvature/threshold")
    ratio_steps, ratios = run.series("step/ghost_ratio")
    speed = run.series("train/tokens_per_s")[1]
    spent, wall = callback_seconds(run), wall_seconds(run)
    total = sum(spent.values()) if spent else None
    eos = run.last("curvature/eos_ratio")
    if eos is None and sharpness is not None and threshold:
        eos = sharpness / threshold
    return {
        "val_bits_per_byte": bits,
        "bigram_floor_bits_per_byte": floor,
        "below_floor": 1 - bits / floor if bits is not None and floor else None,
        "sharpness": sharpness,
        "threshold": threshold,
        "eos_ratio": eos,
        "max_step_ratio": float(ratios.max()) if ratios.size else None,
        "max_step_ratio_at": float(ratio_steps[ratios.argmax()]) if ratios.size else None,
        "tokens_per_s": float(np.median(speed)) if speed.size else None,
        "callback_seconds": total,
        "wall_seconds": wall,
        "callback_share": total / wall if total is not None and wall else None,
    }


def headline(run: Run) -> list[tuple[str, str, str]]:
    """Return the five numbers as (label, value, note), formatted; a dash and the reason where one is missing."""
    s = summary(run)
    bits, floor, below = s["val_bits_per_byte"], s["bigram_floor_bits_per_byte"], s["below_floor"]
    if floor is None or below is None:
        floor_note = "bigram floor of the corpus not known"
    else:
        floor_note = f"{abs(below):.1%} {'below' if below >= 0 else 'ABOVE'} the bigram floor, {floor:.3f}"
    sharp, limit, eos = s["sharpness"], s["threshold"], s["eos_ratio"]
    limit_note = "threshold not recorded"
    if limit is not None and eos is not None:
        limit_note = f"{eos:.0%} of its threshold, {_three_digits(limit)}"
    ratio, at = s["max_step_ratio"], s["max_step_ratio_at"]
    speed, share, spent = s["tokens_per_s"], s["callback_share"], s["callback_seconds"]
    if spent is None:
        spent_note = "no callback recorded its time"
    elif s["wall_seconds"] is None:
        spent_note = f"{spent:.1f} s in all; time/step_ms not recorded"
    else:
        spent_note = f"{spent:.1f} s of {s['wall_seconds']:.0f} s"
    first = ("Validation, bits per byte", _show(bits, ".3f"), floor_note)
    pace = ("Tokens per second", _show(speed, ",.0f"), "median") if speed is not None else _step_time(run)
    if bits is None:
        first = next((_quality(run, *task) for task in _QUALITIES if run.has(task[1])), ("Validation", "–", "none yet"))
    return [
        first,
        (
            "Last sharpness",
            "–" if sharp is None else _three_digits(sharp),
            limit_note if sharp is not None else "needs CurvatureMonitor",
        ),
        ("Largest step ratio", _show(ratio, ".2f"), f"at step {at:.0f}" if at is not None else "needs StepRadius"),
        pace,
        ("Time in callbacks", _show(share, ".1%"), spent_note),
    ]


_QUALITIES = (
    ("PSNR in dB", "val/psnr", ".2f", {"SSIM": "val/ssim", "LPIPS": "val/lpips", "depth error": "val/depth_mae"}),
    ("pass@1", "val/pass@1", ".3f", {"greedy": "val/greedy", "reward": "reward"}),
    ("NDCG@10", "val/ndcg@10", ".4f", {"HR@10": "val/hr@10"}),
)
"""What stands in the first place where no bits per byte are recorded: name, metric, format, and metrics of the note."""


def _quality(run: Run, name: str, metric: str, spec: str, more: dict[str, str]) -> tuple[str, str, str]:
    note = ", ".join(f"{label} {run.last(key):.3f}" for label, key in more.items() if run.has(key))
    return f"Validation, {name}", _show(run.last(metric), spec), note


def _step_time(run: Run) -> tuple[str, str, str]:
    steps, count = run.series("time/step_ms")[1], run.last("train/gaussians")
    note = "median" if count is None else f"{count:,.0f} Gaussians"
    return "Seconds a step", _show(float(np.median(steps)) / 1000 if steps.size else None, ".3f"), note


def print_summary(run: Run, report: Path | None = None, console: Console | None = None) -> None:
    """Print the five numbers as a table, and where the report is.

    Args:
        run: the run.
        report: path of its page; None looks for ``report.html`` in the run folder.
        console: where to print; standard output by default.
    """
    console = console or Console()
    table = Table(title=Text(run.name), title_justify="left", title_style="bold", show_header=False, box=None)
    for label, value, note in headline(run):
        table.add_row(Text(label), Text(value, style="bold"), Text(note, style="dim"))
    console.print(table)
    page = report if report is not None else run.folder / "report.html"
    if page.is_file():
        console.print(Text(f"Report: {page.resolve()}"), soft_wrap=True)


def _show(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def _three_digits(value: float) -> str:
    """Return three significant digits, without an exponent where a person would not write one."""
    return f"{float(f'{value:.3g}'):,.6g}" if 1e-3 <= abs(value) < 1e6 else f"{value:.3g}"

"""The figures of a report: pure functions from runs to a matplotlib Figure.

Each takes a sequence of runs and draws what they recorded; with several runs, lines are overlaid with one colour a run
and heat maps stand side by side. None of them uses pyplot or changes matplotlib's settings.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evolute.reports import style
from evolute.reports.heatmaps import layer_heatmap
from evolute.reports.run import Run
from evolute.reports.summary import callback_seconds, threshold_metric, wall_seconds

STEP = style.STEP


def loss(runs: Sequence[Run]) -> Figure:
    """Training loss, raw (faint) and smoothed, and validation loss."""
    figure, [[axes]] = style.new_figure(1, 1, height=3.0)
    for index, run in enumerate(runs):
        _smoothed(axes, run, "train/loss", style.run_colour(index), f"train{_of(run, runs)}")
        _points(axes, run, "val/loss", _second(index, runs), f"validation{_of(run, runs)}")
    style.label(axes, STEP, "loss")
    style.legend(axes)
    return figure


def bits_per_byte(runs: Sequence[Run]) -> Figure:
    """Validation bits per byte against the bigram floor."""
    figure, [[axes]] = style.new_figure(1, 1, height=3.0)
    for index, run in enumerate(runs):
        _points(axes, run, "val/bits_per_byte", _second(index, runs), f"validation{_of(run, runs)}")
    # Runs on one corpus share their floor: one line for each different one.
    for floor in sorted({run.bigram_floor for run in runs if run.bigram_floor is not None}):
        axes.axhline(floor, color=style.MUTED, linestyle="--", linewidth=1.2, label=f"bigram floor {floor:.3f}")
    style.label(axes, STEP, "validation (bits per byte)")
    style.legend(axes)
    return figure


def reward(runs: Sequence[Run]) -> Figure:
    """Mean reward of the rollouts, raw (faint) and smoothed; accuracy on held-out problems."""
    figure, [[left, right]] = style.new_figure(1, 2, height=3.0)
    for index, run in enumerate(runs):
        _smoothed(left, run, "reward", style.run_colour(index), run.name if len(runs) > 1 else "")
        for name, line in (("val/pass@1", "-"), ("val/greedy", "--")):
            label = f"{name.removeprefix('val/')}{_of(run, runs)}"
            right.plot(*run.series(name), color=style.run_colour(index), linestyle=line, marker=".", label=label)
    style.label(left, STEP, "reward of the rollouts")
    style.label(right, STEP, "share of held-out problems solved")
    for axes in (left, right):
        style.legend(axes)
    return figure


def _smoothed(axes: Axes, run: Run, name: str, colour: str, label: str) -> None:
    steps, values = run.series(name)
    axes.plot(*style.thin((steps, values)), color=colour, alpha=0.25, linewidth=0.7)
    axes.plot(*style.thin((steps, style.smooth(values))), color=colour, linewidth=1.5, label=label)


def schedule(runs: Sequence[Run]) -> Figure:
    """Scheduled learning rate of each parameter group, before any per-layer ratio."""
    figure, [[axes]] = style.new_figure(1, 1, height=2.4)
    for index, run in enumerate(runs):
        for place, name in enumerate(name for name in run.metrics if is_schedule(name) and run.has(name)):
            colour = style.run_colour(index if len(runs) > 1 else place)
            axes.plot(*style.thin(run.series(name)), color=colour, label=style.literal(f"{name}{_of(run, runs)}"))
    style.label(axes, STEP, "scheduled learning rate")
    axes.set_ylim(bottom=0)
    style.legend(axes)
    return figure


def is_schedule(name: str) -> bool:
    """Say whether a metric is a scheduled learning rate, as logged by a recipe or by LearningRateMonitor."""
    return name == "lr" or name.startswith(("lr-", "lr/"))


def layer_lr(runs: Sequence[Run]) -> Figure:
    """Learning rate each layer was really stepped with."""
    return layer_heatmap(runs, "layer_lr", "learning rate used")


def lr_ratio(runs: Sequence[Run]) -> Figure:
    """Factor on the scheduled learning rate of each layer."""
    return layer_heatmap(runs, "lr_ratio", "factor on the scheduled rate", log=False, cmap="cividis")


def noise(runs: Sequence[Run]) -> Figure:
    """Running gradient noise of each layer, in the dual norm of its optimizer."""
    return layer_heatmap(runs, "noise", "gradient noise, dual norm", cmap="inferno")


def update_ratio(runs: Sequence[Run]) -> Figure:
    """Size of each layer's update relative to its weights."""
    return layer_heatmap(runs, "layer/update_ratio", "|update| / |weights|", mark=1e-3)


def snr(runs: Sequence[Run]) -> Figure:
    """Signal to noise ratio of each layer's gradient."""
    return layer_heatmap(runs, "layer/snr", "squared signal / squared noise", cmap="cividis")


def block_sharpness(runs: Sequence[Run]) -> Figure:
    """Largest eigenvalue of each diagonal block of the Hessian."""
    return layer_heatmap(runs, "curvature/block_sharpness", "sharpness (loss per squared weight)", cmap="inferno")


def block_trace(runs: Sequence[Run]) -> Figure:
    """Trace of each diagonal block of the Hessian."""
    return layer_heatmap(runs, "curvature/block_trace", "trace (loss per squared weight)", cmap="inferno")


def sharpness(runs: Sequence[Run]) -> Figure:
    """Largest Hessian eigenvalue against the optimizer's stability threshold, and their ratio."""
    figure, [[lines, ratios]] = style.new_figure(1, 2, height=3.4)
    for index, run in enumerate(runs):
        colour, of, tested = style.run_colour(index), _of(run, runs), threshold_metric(run)
        if tested != "curvature/sharpness":
            lines.plot(*run.series("curvature/sharpness"), color=colour, linewidth=0.8, label=f"sharpness{of}")
        name = tested.removeprefix("curvature/").replace("_", " ")
        lines.plot(*run.series(tested), color=colour, marker=".", markersize=4, label=f"{name}{of}")
        limit = style.LIMIT if len(runs) == 1 else colour
        lines.plot(*run.series("curvature/threshold"), color=limit, linestyle="--", label=f"threshold{of}")
        ratios.plot(*run.series("curvature/eos_ratio"), color=colour, marker=".", markersize=4)
        if run.has("curvature/generalized_ratio"):  # momentum in a norm: no theory says that 1 is its edge
            unclaimed = run.series("curvature/generalized_ratio")
            ratios.plot(*unclaimed, color=colour, linestyle=":", label=f"without momentum, no claim{of}")
    _log_if_positive(lines)
    _log_if_positive(ratios)
    _limit(ratios, 1.0, "edge of stability")
    style.label(lines, STEP, "curvature (loss per squared weight)")
    style.label(ratios, STEP, "sharpness / threshold")
    style.legend(lines)
    style.legend(ratios)
    return figure


def trace(runs: Sequence[Run]) -> Figure:
    """Trace of the Hessian with the standard error of its estimate."""
    figure, [[axes]] = style.new_figure(1, 1, height=2.8)
    for index, run in enumerate(runs):
        colour = style.run_colour(index)
        steps, values = run.series("curvature/trace")
        axes.plot(steps, values, color=colour, marker=".", markersize=4, label=run.name if len(runs) > 1 else "trace")
        at, error = run.series("curvature/trace_stderr")
        shared, mine, theirs = np.intersect1d(steps, at, return_indices=True)
        low, high = values[mine] - error[theirs], values[mine] + error[theirs]
        axes.fill_between(shared, low, high, color=colour, alpha=0.2, linewidth=0)
    style.label(axes, STEP, "trace (loss per squared weight)")
    style.legend(axes)
    return figure


def directional(runs: Sequence[Run]) -> Figure:
    """Curvature along the last update."""
    return _lines(runs, "curvature/directional", "curvature along the update")


def throughput(runs: Sequence[Run]) -> Figure:
    """Tokens per second."""
    figure = _lines(runs, "train/tokens_per_s", "tokens per second")
    figure.axes[0].set_ylim(bottom=0)
    return figure


def step_ratio(runs: Sequence[Run]) -> Figure:
    """Step size over the radius in which the local model of the loss holds; clipped steps are marked."""
    figure, [[axes]] = style.new_figure(1, 1, height=3.4)
    for index, run in enumerate(runs):
        colour, of = style.run_colour(index), _of(run, runs)
        tail = style.thin(run.series("step/ghost_ratio_p99"))
        if tail[0].size and len(runs) == 1:  # several runs: one line each is all that stays legible
            axes.plot(*tail, color=style.COLOURS[5], linewidth=0.9, label="99th percentile of the loss terms")
        axes.plot(*style.thin(run.series("step/ghost_ratio")), color=colour, linewidth=1, label=f"step ratio{of}")
        steps, scale = run.series("step/clip_scale")
        at = steps[scale < 1]
        if at.size:
            top, where = np.full(at.size, 0.97), axes.get_xaxis_transform()
            axes.plot(at, top, "v", color=colour, markersize=5, transform=where, label=f"clipped steps: {at.size}{of}")
    _log_if_positive(axes)
    _limit(axes, 1.0, "ghost radius")
    style.label(axes, STEP, "step / ghost radius")
    style.legend(axes, columns=4, above=True)
    return figure


def noise_scale(runs: Sequence[Run]) -> Figure:
    """Gradient noise scale: the batch size at which noise and signal of the gradient are equal."""
    figure, [[axes]] = style.new_figure(1, 1, height=2.8)
    for index, run in enumerate(runs):
        steps, values = run.series("layer/noise_scale")
        colour, positive = style.run_colour(index), values > 0  # an estimate below zero found no signal at all
        steps, values = steps[positive], values[positive]
        axes.plot(*style.thin((steps, values)), ".", color=colour, markersize=4, alpha=0.45)
        # In logarithms: an estimate that found next to no signal is orders of magnitude off.
        smoothed = style.thin((steps, np.exp(style.smooth(np.log(values), windows=8))))
        axes.plot(*smoothed, color=colour, label=_of(run, runs, bare=True))
    _log_if_positive(axes)
    style.label(axes, STEP, "gradient noise scale (samples)")
    style.legend(axes)
    return figure


def callback_time(runs: Sequence[Run]) -> Figure:
    """Seconds each callback spent over the whole run, with its share of wall-clock."""
    spent = [callback_seconds(run) for run in runs]
    names = list(dict.fromkeys(name for seconds in spent for name in seconds))
    figure, [[axes]] = style.new_figure(1, 1, height=max(1.6, 0.9 + 0.32 * len(names) * len(runs)))
    thickness = 0.8 / len(runs)
    for index, (run, seconds) in enumerate(zip(runs, spent, strict=True)):
        wall = wall_seconds(run)
        at = np.arange(len(names)) + (index - (len(runs) - 1) / 2) * thickness
        widths = [seconds.get(name, 0.0) for name in names]
        label = _of(run, runs, bare=True)
        bars = axes.barh(at, widths, height=0.85 * thickness, color=style.run_colour(index), label=label)
        texts = [_duration(width) + (f", {width / wall:.1%}" if wall else "") for width in widths]
        axes.bar_label(bars, texts, padding=4, color=style.INK, fontsize=8.5)
    axes.set_yticks(np.arange(len(names)), [style.literal(name) for name in names], fontsize=9, color=style.INK)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.grid(False, axis="y")
    style.label(axes, "seconds over the run (share of wall-clock)")
    style.legend(axes)
    return figure


def _lines(runs: Sequence[Run], metric: str, unit: str) -> Figure:
    figure, [[axes]] = style.new_figure(1, 1, height=2.4)
    for index, run in enumerate(runs):
        series = style.thin(run.series(metric))
        axes.plot(*series, color=style.run_colour(index), linewidth=1, label=_of(run, runs, bare=True))
    style.label(axes, STEP, unit)
    style.legend(axes)
    return figure


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def _of(run: Run, runs: Sequence[Run], bare: bool = False) -> str:
    """Return what a label adds to tell runs apart; nothing where there is only one."""
    if len(runs) == 1:
        return ""
    return style.literal(run.name if bare else f", {run.name}")


def _second(index: int, runs: Sequence[Run]) -> str:
    """Return the colour of validation: another one beside a single run's training line, else the run's."""
    return style.COLOURS[1] if len(runs) == 1 else style.run_colour(index)


def _points(axes: Axes, run: Run, name: str, colour: str, label: str) -> None:
    if run.has(name):
        axes.plot(*style.thin(run.series(name)), color=colour, marker="o", markersize=3.5, linewidth=1.2, label=label)


def _limit(axes: Axes, at: float, what: str) -> None:
    axes.axhline(at, color=style.MUTED, linestyle="--", linewidth=1.2, label=what)


def _log_if_positive(axes: Axes) -> None:
    """Use a logarithmic y axis where the data allow it; curvature may be negative early on."""
    drawn = [np.asarray(line.get_ydata(), float) for line in axes.get_lines() if line.get_transform() == axes.transData]
    values = np.concatenate(drawn) if drawn else np.empty(0)
    if values.size and (values > 0).all():
        axes.set_yscale("log")
        style.log_labels(axes.yaxis)
    elif (values > 0).any():
        positive = values[values > 0]
        axes.set_yscale("symlog", linthresh=float(np.quantile(positive, 0.1)))

"""Figures draw the numbers they are given: checked on the artists, and by reading the colours back."""

import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from evolute.reports import draw_figures, figures, load_run, load_runs, save_figures, spectra, style, write_report
from evolute.reports.heatmaps import layer_heatmap
from evolute.reports.spec import SECTIONS
from tests.reports.synthetic import LAYERS, OF_OTHER_TASKS, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return load_runs([write_run(root / "first"), write_run(root / "second", seed=1, speed=0.7)])


def small_run(folder):
    folder.mkdir()
    (folder / "metrics.csv").write_text("step,train/loss,noise/a,noise/time_ms\n0,2,1,3\n1,1,2,3\n")
    return folder


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def mesh(axes):
    return next(c for c in axes.collections if hasattr(c, "get_coordinates"))


def test_a_full_run_draws_every_section_it_recorded(runs):
    drawn = {key for key, _ in draw_figures(runs[:1])}
    assert drawn == {section.key for section in SECTIONS} - {"directional"} - OF_OTHER_TASKS


def test_loss_shows_raw_smoothed_validation_and_floor(runs):
    [left], [right] = figures.loss(runs[:1]).axes, figures.bits_per_byte(runs[:1]).axes
    raw, smoothed = left.get_lines()[:2]
    assert np.array_equal(lines(left)["validation"].get_ydata(), runs[0].series("val/loss")[1])
    assert np.array_equal(raw.get_ydata(), runs[0].series("train/loss")[1])
    assert np.std(np.diff(smoothed.get_ydata()[500:])) < 0.3 * np.std(np.diff(raw.get_ydata()[500:]))
    assert np.array_equal(lines(right)["validation"].get_ydata(), runs[0].series("val/bits_per_byte")[1])
    assert lines(right)["bigram floor 3.412"].get_ydata()[0] == 3.412


def test_reward_shows_the_rollouts_and_the_held_out_problems(runs):
    rollouts, held_out = figures.reward(runs).axes
    for run in runs:
        assert np.array_equal(lines(rollouts)[run.name].get_ydata(), style.smooth(run.series("reward")[1]))
    solved = [line.get_ydata() for label, line in lines(held_out).items() if label.startswith("pass@1")]
    assert all(np.array_equal(a, run.series("val/pass@1")[1]) for a, run in zip(solved, runs, strict=True))
    assert len(solved) == len(runs)


def test_heat_map_cells_are_the_recorded_rates(runs):
    figure = figures.layer_lr(runs[:1])
    cells = mesh(figure.axes[0]).get_array()
    assert cells.shape == (len(LAYERS), 50)
    assert np.allclose(cells[7], runs[0].series(f"layer_lr/{LAYERS[7]}")[1], rtol=0, atol=0)
    assert figure.axes[0].get_yticklabels()[1].get_text() == "0.q_proj"


def test_heat_maps_of_two_runs_share_their_scale_and_rows(runs):
    first, second, _bar = figures.noise(runs).axes
    assert mesh(first).norm is mesh(second).norm
    assert mesh(first).norm.vmax == max(values.max() for run in runs for _, values in run.layers("noise").values())
    assert [axes.get_title(loc="left") for axes in (first, second)] == ["first", "second"]


def test_a_layer_missing_at_a_step_leaves_a_gap_not_a_number(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,noise/a,noise/b\n0,1,2\n10,,4\n20,3,-1\n")
    cells = mesh(layer_heatmap([load_run(tmp_path)], "noise", "noise").axes[0]).get_array()
    assert np.array_equal(cells.mask, [[False, True, False], [False, False, True]])


def test_a_run_without_the_metric_gets_a_panel_that_says_so(runs, tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss\n0,1\n")
    figure = figures.noise([load_run(tmp_path), runs[0]])
    assert [text.get_text() for text in figure.axes[0].texts] == ["no noise recorded"]
    assert len(figure.axes[1].get_yticklabels()) == len(LAYERS)


def test_clipped_steps_are_marked_where_they_happened(runs):
    axes = figures.step_ratio(runs[:1]).axes[0]
    steps, scale = runs[0].series("step/clip_scale")
    clipped = steps[scale < 1]
    assert clipped.size
    assert np.array_equal(lines(axes)[f"clipped steps: {clipped.size}"].get_xdata(), clipped)
    assert axes.get_yscale() == "log"


def test_the_noise_scale_is_smoothed_in_logarithms(tmp_path):
    rows = "".join(f"{step},{1e9 if step == 16 else 100}\n" for step in range(33)) + "33,inf\n34,-5\n"
    (tmp_path / "metrics.csv").write_text("step,layer/noise_scale\n" + rows)
    points, line = figures.noise_scale([load_run(tmp_path)]).axes[0].get_lines()
    assert points.get_ydata().tolist().count(100) == 32
    assert max(line.get_ydata()) == pytest.approx(100 * 1e7 ** (1 / 5))  # a geometric mean over five
    assert line.get_xdata()[-1] == 32


def test_negative_curvature_is_drawn(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,curvature/sharpness,curvature/threshold\n0,-2,10\n1,5,10\n")
    axes = figures.sharpness([load_run(tmp_path)]).axes[0]
    assert axes.get_yscale() == "symlog"
    assert np.array_equal(lines(axes)["sharpness"].get_ydata(), [-2, 5])


def test_densities_hold_every_eigenvalue_and_peak_where_they_are(runs):
    density, ends = spectra.spectrum(runs[:1]).axes
    drawn = lines(density)
    assert [label for label in drawn if label.startswith("step")] == ["step 0", "step 300", "step 600", "step 900"]
    arrays = runs[0].arrays("spectrum")
    assert list(arrays) == list(range(0, 1000, 100))
    for step in (0, 900):
        x, y = (np.asarray(v, float) for v in drawn[f"step {step}"].get_data())
        largest = max(np.abs(arrays[s]["nodes"]).max() for s in (0, 300, 600, 900))
        decades = np.arcsinh(x / (largest / 1000)) / np.log(10)
        assert np.nansum(y) * np.diff(decades)[0] == pytest.approx(1.0, rel=1e-3)
        # An outlier of one eigenvalue in a million is a peak of its own, at its place.
        near = (x > 0.8 * 80 / (1 + step / 300)) & np.isfinite(y)
        assert x[near][np.argmax(y[near])] == pytest.approx(80 / (1 + step / 300), rel=2e-2)
    assert np.array_equal(lines(ends)["largest"].get_ydata(), runs[0].series("spectrum/lambda_max")[1])
    points = [line for line in ends.get_lines() if line.get_marker() == "."]
    assert [len(line.get_ydata()) for line in points] == [3] * 10


def test_the_parts_of_a_spectrum_are_told_apart(runs):
    figure = spectra.spectrum_split(runs[:1])
    drawn = lines(figure.axes[0])
    assert {"Hessian", "Gauss-Newton", "the rest"} <= drawn.keys()

    def leftmost(label):
        x, y = (np.asarray(v, float) for v in drawn[label].get_data())
        return x[np.isfinite(y)].min()

    assert leftmost("Hessian") < -0.9
    assert leftmost("Gauss-Newton") > -0.1
    assert [axes.get_title(loc="left") for axes in spectra.spectrum_split(runs).axes] == ["first", "second"]


def test_a_spectrum_without_its_arrays_and_one_cut_short_are_not_drawn(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,spectrum/lambda_max,spectrum/ggn_sharpness\n0,2,1\n1,3,1\n")
    run = load_run(tmp_path)
    assert "no arrays" in spectra.spectrum([run]).axes[0].texts[0].get_text()
    assert "no split" in spectra.spectrum_split([run]).axes[0].texts[0].get_text()
    folder = write_run(tmp_path / "full", steps=101) / "arrays" / "spectrum"
    whole = (folder / "00000100.npz").read_bytes()
    (folder / "00000100.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "00000200.npz").write_bytes(b"")
    assert list(load_run(tmp_path / "full").arrays("spectrum")) == [0]


def test_curvature_along_the_steps_is_drawn_against_its_limit(runs):
    for draw, metrics in (
        (spectra.critical, ("critical_sharpness", "critical_ratio")),
        (spectra.agreement, ("model_agreement", "gns_ratio")),
    ):
        for axes, metric in zip(draw(runs[:1]).axes, metrics, strict=True):
            assert np.array_equal(axes.get_lines()[0].get_ydata(), runs[0].series(f"curvature/{metric}")[1])
    assert "above, the step raises the loss" in lines(spectra.critical(runs[:1]).axes[1])


def test_a_ratio_without_a_theory_is_drawn_as_such(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,curvature/sharpness,curvature/generalized_ratio\n0,2,0.5\n1,5,0.7\n")
    ratios = figures.sharpness([load_run(tmp_path)]).axes[1]
    assert np.array_equal(lines(ratios)["without momentum, no claim"].get_ydata(), [0.5, 0.7])


def test_bars_are_total_seconds(runs):
    axes = figures.callback_time(runs[:1]).axes[0]
    assert [round(bar.get_width(), 6) for bar in axes.patches] == [2.75, 2.0, 0.9, 0.3]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["curvature", "noise", "step", "layer"]


def test_every_figure_has_labelled_axes(runs):
    for key, figure in draw_figures(runs):
        assert figure.axes[0].get_xlabel() != ""
        assert all(axes.get_xlabel() or axes.get_ylabel() for axes in figure.axes), key


def test_one_measurement_is_enough_for_every_figure(tmp_path):
    for key, figure in draw_figures([load_run(write_run(tmp_path / "short", steps=1))]):
        FigureCanvasAgg(figure).draw()
        assert figure.axes, key


def test_global_state_of_matplotlib_is_left_alone(runs, tmp_path):
    before = dict(mpl.rcParams)
    write_report([small_run(tmp_path / "small")], tmp_path / "r.html")
    assert dict(mpl.rcParams) == before
    code = "import sys, evolute.reports.page as p; p.write_report(sys.argv[1:2], sys.argv[2])\n"
    code += "assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, tmp_path / "small", tmp_path / "s.html"], check=True, timeout=60)


def test_saves_png_and_svg(tmp_path):
    paths = save_figures([small_run(tmp_path / "small")], tmp_path / "out")
    assert {path.suffix for path in paths} == {".png", ".svg"}
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert all(path.stat().st_size > 2000 for path in paths)


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["model.layers.3.self_attn.q_proj.weight", "lm_head.weight"], ["3.q_proj", "lm_head"]),
        (["h.0.attn.c_proj.weight", "h.0.mlp.c_proj.weight"], ["0.attn.c_proj", "0.mlp.c_proj"]),
        (["a.q.weight", "a.q.bias", "b.k.bias"], ["q", "q.bias", "k.bias"]),
        (["net.0.weight", "net.0.bias", "net.2.weight"], ["net.0", "0.bias", "net.2"]),
        (["same", "same"], ["same", "same"]),
    ],
)
def test_short_names_keep_what_tells_layers_apart(names, short):
    assert style.short_names(names) == short


def test_layer_ten_follows_layer_nine():
    assert style.natural(["l.1", "l.10", "l.9"]) == ["l.1", "l.9", "l.10"]
    assert style.natural(["z", "a"]) == ["z", "a"]


def test_smoothing_keeps_a_straight_line_and_thinning_keeps_extremes():
    line = np.linspace(0, 5, 301)
    assert np.allclose(style.smooth(line), line, atol=1e-12)
    values = np.random.default_rng(0).standard_normal(20_000)
    steps, kept = style.thin((np.arange(20_000), values), 1000)
    assert steps.size <= 1002
    assert (kept.min(), kept.max()) == (values.min(), values.max())
    assert np.array_equal(values[steps], kept)

"""Reading a run folder: exact values from whole files, and what is left of damaged ones."""

import math

import numpy as np
import pytest

from evolute.reports import load_run, load_runs, summary
from evolute.reports.run import nonfinite
from evolute.reports.summary import callback_seconds, headline, threshold_metric, wall_seconds


def write(folder, text, **files):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.csv").write_text(text)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def series(run, name):
    steps, values = run.series(name)
    return list(zip(steps.tolist(), values.tolist(), strict=True))


def test_reads_sparse_columns_at_their_steps(tmp_path):
    run = load_run(write(tmp_path / "a", "step,epoch,loss,noise/w\n0,0,2.5,\n1,0,2.25,0.5\n2,1,,0.25\n"))
    assert series(run, "loss") == [(0, 2.5), (1, 2.25)]
    assert series(run, "noise/w") == [(1, 0.5), (2, 0.25)]
    assert set(run.metrics) == {"loss", "noise/w"}
    assert run.name == "a"


def test_a_line_cut_short_is_no_row(tmp_path):
    # 12 would have been 1234 had the process lived.
    run = load_run(write(tmp_path, "step,loss\n0,3\n1,2\n2,12"))
    assert series(run, "loss") == [(0, 3.0), (1, 2.0)]


def test_a_row_with_too_few_cells_keeps_what_it_has(tmp_path):
    run = load_run(write(tmp_path, "step,loss,lr\n0,3,1\n1,2\n"))
    assert series(run, "loss") == [(0, 3.0), (1, 2.0)]
    assert series(run, "lr") == [(0, 1.0)]


def test_a_step_written_again_after_a_restart_replaces_the_earlier_row(tmp_path):
    run = load_run(write(tmp_path, "step,loss\n0,3\n1,2\n2,9\n1,2.5\n2,1\n"))
    assert series(run, "loss") == [(0, 3.0), (1, 2.5), (2, 1.0)]


def test_nonfinite_cells_are_counted_and_kept_out_of_the_series(tmp_path):
    run = load_run(write(tmp_path, "step,loss,noise/nonfinite\n0,3,\n1,nan,\n2,inf,1\n3,oops,\n4,1,1\n"))
    assert series(run, "loss") == [(0, 3.0), (4, 1.0)]
    assert nonfinite(run) == {"loss": (2, 1), "noise": (2, 2)}


def test_what_a_callback_cost_is_not_a_layer(tmp_path):
    run = load_run(write(tmp_path, "step,noise/a.weight,noise/time_ms,noise/nonfinite,noisette/b\n0,1,5,1,2\n"))
    assert list(run.layers("noise")) == ["a.weight"]


def test_the_latest_start_gives_the_configuration_and_all_are_kept(tmp_path):
    files = {f"config{i}__yaml": f"lr: {n}\n" for n, i in enumerate(("", "__1", "__10", "__2"))}
    run = load_run(write(tmp_path, "step,loss\n0,1\n", **files))
    assert list(run.config_files) == ["config.yaml", "config.1.yaml", "config.2.yaml", "config.10.yaml"]
    assert run.config == {"lr": 2}


def test_damaged_side_files_are_left_out(tmp_path):
    run = load_run(
        write(
            tmp_path,
            "step,loss\n0,1\n",
            config__yaml="a: [",
            environment__json="{",
            samples__jsonl='{"step": 1, "prompt": "p", "text": "c"}\n{"step": 2, "pro',
        )
    )
    assert run.config == {}
    assert run.config_files == {"config.yaml": "a: ["}
    assert run.environment == {}
    assert [sample["step"] for sample in run.samples] == [1]


@pytest.mark.parametrize("text", ["", "step,loss\n", "loss,lr\n1,2\n", "step,loss\n0,\n"])
def test_metrics_without_a_value_are_refused(tmp_path, text):
    with pytest.raises(FileNotFoundError, match=r"metrics\.csv holds no value with a step"):
        load_run(write(tmp_path / "r", text))


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such run folder"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"it has no metrics\.csv"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match="no run given"):
        load_runs([])


def test_runs_of_one_name_get_labels_that_differ(tmp_path):
    folders = [write(tmp_path / parent / "run", "step,loss\n0,1\n") for parent in ("a", "b")]
    assert [run.name for run in load_runs(folders)] == ["a/run", "b/run"]


def test_the_numbers_that_matter(tmp_path):
    text = (
        "step,val/bits_per_byte,curvature/sharpness,curvature/threshold,curvature/eos_ratio,step/ghost_ratio,"
        "train/tokens_per_s,curvature/time_ms,step/time_ms,time/step_ms\n"
        "9,4,10,40,0.25,0.5,100,200,,100\n"
        "19,3,30,40,0.75,2.5,300,,300,100\n"
        "29,2.7,,,,nan,200,,,200\n"
    )
    numbers = summary(load_run(write(tmp_path, text, environment__json='{"bigram_floor_bits_per_byte": 3.0}')))
    # 10 steps of 100 ms, 10 of 100 ms, 10 of 200 ms; half a second in callbacks.
    assert numbers == pytest.approx(
        {
            "val_bits_per_byte": 2.7,
            "bigram_floor_bits_per_byte": 3.0,
            "below_floor": 0.1,
            "sharpness": 30.0,
            "threshold": 40.0,
            "eos_ratio": 0.75,
            "max_step_ratio": 2.5,
            "max_step_ratio_at": 19,
            "tokens_per_s": 200.0,
            "callback_seconds": 0.5,
            "wall_seconds": 4.0,
            "callback_share": 0.125,
        }
    )


def test_numbers_without_their_columns_are_none(tmp_path):
    run = load_run(write(tmp_path, "step,loss\n0,1\n"))
    assert set(summary(run).values()) == {None}
    assert callback_seconds(run) == {}
    assert wall_seconds(run) is None


def test_the_threshold_belongs_to_the_sharpness_that_explains_the_ratio(tmp_path):
    header = "step,curvature/sharpness,curvature/preconditioned_sharpness,curvature/threshold,curvature/eos_ratio\n"
    run = load_run(write(tmp_path, header + "0,7,3000,3800,0.79\n"))
    assert threshold_metric(run) == "curvature/preconditioned_sharpness"
    assert summary(run)["sharpness"] == 3000.0


def test_values_survive_with_full_precision(tmp_path):
    values = np.random.default_rng(0).standard_normal(50)
    run = load_run(write(tmp_path, "step,x\n" + "".join(f"{i},{v!r}\n" for i, v in enumerate(values.tolist()))))
    assert np.array_equal(run.series("x")[1], values)
    assert math.isclose(run.last("x") or 0.0, values[-1])


def test_the_first_number_is_that_of_the_task_once_it_was_validated(tmp_path):
    early = load_run(write(tmp_path / "early", "step,train/loss\n0,2\n"))
    assert headline(early)[0] == ("Validation", "–", "none yet")
    splat = load_run(write(tmp_path / "splat", "step,train/loss,val/psnr,val/ssim\n0,2,,\n9,1,27.912,.8\n"))
    assert headline(splat)[0] == ("Validation, PSNR in dB", "27.91", "SSIM 0.800")
    text = load_run(write(tmp_path / "text", "step,val/bits_per_byte\n9,1.5\n"))
    assert headline(text)[0] == ("Validation, bits per byte", "1.500", "bigram floor of the corpus not known")

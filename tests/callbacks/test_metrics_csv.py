"""The log of a run: one row a step, appended to, rewound, never torn."""

import csv

import pytest
import torch

from evolute.callbacks import MetricsCSV


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_values_of_one_step_share_a_row_and_columns_come_as_they_are_named(tmp_path):
    log = MetricsCSV(tmp_path)
    log.log_metrics({"loss": torch.tensor(1.5), "epoch": 0}, step=0)
    log.log_metrics({"acc": 0.5}, step=0)
    log.log_metrics({"loss": 1.0}, step=1)
    log.finalize("success")
    assert rows(tmp_path) == [
        {"step": "0", "epoch": "0", "loss": "1.5", "acc": "0.5"},
        {"step": "1", "epoch": "", "loss": "1.0", "acc": ""},
    ]
    assert next(iter(csv.reader(open(tmp_path / "metrics.csv")))) == ["step", "epoch", "loss", "acc"]  # noqa: SIM115


def test_rows_wait_for_a_flush_and_a_new_column_keeps_the_earlier_ones(tmp_path):
    log = MetricsCSV(tmp_path, flush_every=2)
    log.log_metrics({"a": 1}, step=0)
    assert not log.path.exists()
    for step in (1, 2, 3):
        log.log_metrics({"a": step}, step=step)
    assert [r["step"] for r in rows(tmp_path)] == ["0", "1"]
    log.log_metrics({"b": 7}, step=4)
    log.flush()
    assert [(r["step"], r["a"], r["b"]) for r in rows(tmp_path)] == [
        ("0", "1", ""),
        ("1", "1", ""),
        ("2", "2", ""),
        ("3", "3", ""),
        ("4", "", "7"),
    ]


def test_a_second_logger_appends_and_rewinding_drops_what_will_be_written_again(tmp_path):
    first = MetricsCSV(tmp_path)
    for step in range(5):
        first.log_metrics({"a": step, "name, odd": 0.1}, step=step)
    first.finalize("success")
    second = MetricsCSV(tmp_path)
    second.rewind(3)
    for step in (3, 4):
        second.log_metrics({"a": 10 * step}, step=step)
    second.finalize("success")
    assert [r["a"] for r in rows(tmp_path)] == ["0", "1", "2", "30", "40"]
    assert rows(tmp_path)[1]["name, odd"] == "0.1"


def test_a_line_that_a_killed_process_left_unfinished_is_no_row(tmp_path):
    log = MetricsCSV(tmp_path)
    log.log_metrics({"a": 1.25}, step=0)
    log.flush()
    with open(log.path, "a") as file:
        file.write("1,7.")
    again = MetricsCSV(tmp_path)
    again.log_metrics({"a": 2.5}, step=1)
    again.flush()
    assert [(r["step"], r["a"]) for r in rows(tmp_path)] == [("0", "1.25"), ("1", "2.5")]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_kept(tmp_path, value):
    log = MetricsCSV(tmp_path)
    log.log_metrics({"a": value}, step=0)
    log.flush()
    assert rows(tmp_path)[0]["a"] == str(value)

"""What makes the comparison with RecBole fair: its order of events is ours, and other targets are refused."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from evolute.data import InteractionDataModule


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("recbole_compare")


@pytest.fixture
def data(tmp_path):
    """Six users, two items at each moment, the later row of the file the smaller item."""
    rows = ["user_id,item_id,timestamp"]
    rows += [
        f"{user},{(7 * t + user) % 5 * 2 + 1 - late},{t}" for user in range(6) for t in range(3) for late in (0, 1)
    ]
    path = tmp_path / "events.csv"
    path.write_text("\n".join(rows))
    module = InteractionDataModule(str(path))
    module.setup("fit")
    return module


def targets_of(loader):
    return torch.cat([batch["target"] for batch in loader]).tolist()


def test_sorting_by_user_and_time_gives_back_our_order_whatever_the_sort(benchmark, data, tmp_path):
    benchmark.write_ordered(data, tmp_path / "some-data")
    path = tmp_path / "some-data" / "some-data.inter"
    assert path.read_text().splitlines()[0] == "user_id:token\titem_id:token\ttimestamp:float"
    rows = np.loadtxt(path, int, skiprows=1)
    rows = rows[np.random.default_rng(0).permutation(len(rows))]
    rows = rows[np.lexsort((rows[:, 2], rows[:, 0]))]
    assert len(np.unique(rows[:, [0, 2]], axis=0)) == len(rows)
    assert rows[:, 1].tolist() == data.log.items.tolist()


def test_other_targets_are_refused_and_metrics_compared(benchmark, data):
    stages = {"val": data.val_dataloader(), "test": data.test_dataloader()}
    row = {
        stage: {"users": list(range(6)), "targets": targets_of(loader), "ranks": [1] * 6, "own": {"ndcg@10": 0.75}}
        for stage, loader in stages.items()
    }
    peer = {"model": "SASRec", "epochs": [row]}
    assert benchmark.check(peer, data) == pytest.approx(0.25)
    row["test"]["targets"][3] += 1
    with pytest.raises(ValueError, match="test targets are not ours"):
        benchmark.check(peer, data)


def test_what_is_reached_within_a_time_is_chosen_by_validation(benchmark):
    def epoch(rank, own):
        return {"cpu_s": 2.0, "val": {"ranks": [rank]}, "test": {"ranks": [own]}}

    rows = [epoch(3, 1), epoch(1, 2), epoch(2, 1)]
    assert benchmark.within(rows, 3) is rows[0]
    assert benchmark.within(rows, 6) is rows[1]
    assert benchmark.until(rows, benchmark.ndcg(rows[2], "val")) == 4
    assert benchmark.until(rows[:1], 0.9) == float("inf")

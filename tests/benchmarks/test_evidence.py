"""The core of the benchmarks on digits: small runs of what they measure, and the machinery that they share."""

import importlib
import math
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Import a benchmark as its script would."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_the_split_is_by_class_and_leaves_no_image_out(load):
    data = load("digits").load(seed=3, classes=4)
    assert len(data.x) + len(data.x_test) == 720
    shares = [float((data.y_test == k).sum() / ((data.y == k).sum() + (data.y_test == k).sum())) for k in range(4)]
    assert shares == pytest.approx([0.2] * 4, abs=0.005)
    assert data.x.max() == 1
    whole = load("digits").load(seed=None)
    assert torch.equal(whole.y_test[:10], torch.arange(10))  # the file starts with the digits in order


def test_batches_are_epochs_without_repetition(load):
    digits = load("digits")
    numbers = torch.arange(10.0)
    epoch = digits.batches(digits.Digits(numbers, numbers, numbers, numbers), size=4, steps=5, seed=0)
    assert [len(x) for x, _ in epoch] == [4, 4, 2, 4, 4]
    assert torch.equal(torch.cat([x for x, _ in epoch[:3]]).sort().values, numbers)


def test_a_result_that_is_there_is_not_made_again(load, tmp_path):
    digits = load("digits")
    made = []

    def work(run):
        made.append(run)
        return {"value": 7}

    bench = digits.Bench("any", work)
    bench.folder = tmp_path
    first, second = (bench.results([load("sagun").Run("digits", 3, 16, 0)]) for _ in range(2))
    assert first == second == [{"data": "digits", "classes": 3, "width": 16, "seed": 0, "value": 7}]
    assert len(made) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["digits-3-16-0.json"]


def test_a_missed_bar_is_the_exit_code(load, capsys):
    digits = load("digits")
    assert digits.verdict({"a": True}) == 0
    assert digits.verdict({"a": True, "b": False}) == 1
    assert "MISSED  b" in capsys.readouterr().out


def test_a_thousandfold_rate_ruins_adam_and_not_the_limited_step(load):
    spikes = load("ghost_spikes")
    adam, radius = (spikes.work(spikes.Run("mlp", arm, 1e-2, 1_000, 150, 64, seed=0)) for arm in ("adam", "radius"))
    assert adam["accuracy_before"] > 85
    assert adam["accuracy"] < 30
    assert radius["accuracy"] > 0.9 * radius["accuracy_before"]
    assert min(radius["scales"][: spikes.SPIKE_AT]) > max(radius["scales"][spikes.SPIKE_AT :])


def test_steps_of_a_linear_model_keep_to_the_radius(load):
    transition = load("ghost_transition")
    data = load("digits").load(0)
    torch.manual_seed(0)
    model = nn.Linear(64, 10)
    before = load("digits").judge(model, data.x[: transition.SAMPLES], data.y[: transition.SAMPLES])[0]
    curves = transition.measure(model, data, seed=0)
    assert len(curves["random"]) == 20
    assert 1 <= transition.onset(transition.FAILURES["loss +10 %"](curves["descent"])) <= 10
    # Its logits are linear, so at r the largest change of a logit difference, and with it of a term, is pi r.
    for curve in curves["random"]:
        growth = (torch.tensor(curve["loss_ratio"]) - 1) * before
        assert bool((growth < torch.pi * transition.RADII).all())
        assert growth[-1] > 0.1 * torch.pi * transition.RADII[-1]
    assert transition.onset(torch.zeros(len(transition.RADII), dtype=torch.bool)) == math.inf


def test_the_onset_is_found_between_grid_points(load):
    temperature = load("ghost_temperature")
    ratio = [0.5 * r for r in temperature.LENGTHS.tolist()]
    assert temperature.onset(ratio) == pytest.approx(4, rel=1e-5)
    assert temperature.onset([1.0] * len(ratio)) == math.inf


@pytest.mark.parametrize("data", ["digits", "clusters"])
def test_six_classes_make_five_outliers(load, data):
    sagun = load("sagun")
    found = sagun.work(sagun.Run(data, classes=6, width=16, seed=0))
    assert found["loss"] <= sagun.TARGET
    assert len(found["outliers"]) == 5
    assert found["outliers"] == pytest.approx(found["top"][:5], rel=0.02)
    assert found["residual_norm"] < 0.2 * found["top"][0]  # they come from the Gauss-Newton part

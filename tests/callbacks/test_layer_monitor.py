"""Norms and update ratios by hand; signal, noise and noise scale against gradients of known noise."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from evolute.callbacks import LayerMonitor
from tests.conftest import fit
from tests.modules import Classifier, Net, Recorder, Snapshots, classification_data


class Gradients(Callback):
    """The gradient of each step, and that of each micro-batch as Lightning scales it."""

    def __init__(self):
        self.steps, self.parts, self._sum = [], [[]], {}

    def on_after_backward(self, trainer, pl_module):
        now = {n: p.grad.double().clone() for n, p in pl_module.named_parameters()}
        self.parts[-1].append({n: g - self._sum.get(n, 0.0) for n, g in now.items()})
        self._sum = now

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append({n: p.grad.double().clone() for n, p in pl_module.named_parameters()})
        self.parts.append([])
        self._sum = {}


def watched(steps=7, module=None, data=None, accumulate=1, **arguments):
    recorder, snapshots, gradients = Recorder(), Snapshots(), Gradients()
    fit(
        [LayerMonitor(**{"every_n_steps": 3, "budget": None, **arguments}), snapshots, gradients],
        module or (lambda: Classifier("sgd", lr=0.1, messy=False)),
        data or DataLoader(classification_data(), batch_size=8),
        logger=recorder,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        log_every_n_steps=1000,
    )
    return recorder, snapshots, gradients


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_norms_and_update_ratios_by_hand(clip):
    recorder, snapshots, gradients = Recorder(), Snapshots(), Gradients()
    fit(
        [LayerMonitor(every_n_steps=3, budget=None, layers=".*weight"), gradients, snapshots],
        lambda: Classifier("adamw", messy=False),
        DataLoader(classification_data(), batch_size=8),
        logger=recorder,
        max_steps=7,
        gradient_clip_val=clip,
    )
    for step in (0, 3, 6):
        row, names = recorder.rows[step], [n for n in snapshots.weights[0] if n.endswith("weight")]
        for name in names:
            before, after = snapshots.weights[step][name], snapshots.weights[step + 1][name]
            assert row[f"layer/grad_norm/{name}"] == pytest.approx(gradients.steps[step][name].norm().item(), rel=1e-5)
            assert row[f"layer/weight_norm/{name}"] == pytest.approx(before.norm().item(), rel=1e-5)
            moved = ((after - before).norm() / before.norm()).item()
            assert row[f"layer/update_ratio/{name}"] == pytest.approx(moved, rel=1e-5)
        total = sum(gradients.steps[step][name].square().sum() for name in names) ** 0.5
        assert row["layer/grad_norm"] == pytest.approx(float(total), rel=1e-5)
        assert "layer/grad_norm/net.0.bias" not in row


def test_consecutive_estimates_by_hand():
    recorder, _, gradients = watched(noise="consecutive", memory=1)
    assert "layer/noise_scale" not in recorder.rows[0]  # nothing came before the first step
    for step in (3, 6):
        a, b = gradients.steps[step - 1], gradients.steps[step]
        signal = {n: (a[n] * b[n]).sum().item() for n in a}
        noise = {n: ((a[n] - b[n]).square().sum() / 2).item() for n in a}
        row = recorder.rows[step]
        for name in a:
            assert row[f"layer/snr/{name}"] == pytest.approx(max(signal[name], 0) / noise[name], rel=1e-3, abs=1e-6)
        expect_noise_scale(row, 8 * sum(noise.values()) / sum(signal.values()))


def expect_noise_scale(row, expected):
    """It is left out where the estimate of the squared signal is not positive."""
    if expected > 0:
        assert row["layer/noise_scale"] == pytest.approx(expected, rel=1e-3)
    else:
        assert "layer/noise_scale" not in row


@pytest.mark.parametrize("accumulate", [2, 3, 5])
def test_split_estimates_by_hand(accumulate):
    recorder, _, gradients = watched(noise="split", memory=1, accumulate=accumulate)
    for step in (0, 3, 6):
        parts, cut = gradients.parts[step], accumulate // 2
        # Lightning has divided each part by their number: back to means of the two halves.
        first = {n: sum(p[n] for p in parts[:cut]) * accumulate / cut for n in parts[0]}
        second = {n: sum(p[n] for p in parts[cut:]) * accumulate / (accumulate - cut) for n in parts[0]}
        signal = {n: (first[n] * second[n]).sum().item() for n in first}
        # Var(first - second) = s/cut + s/rest for micro-batches of variance s; the step's gradient has s/accumulate.
        share = (1 / accumulate) / (1 / cut + 1 / (accumulate - cut))
        noise = {n: share * (first[n] - second[n]).square().sum().item() for n in first}
        row = recorder.rows[step]
        for name in first:
            assert row[f"layer/snr/{name}"] == pytest.approx(max(signal[name], 0) / noise[name], rel=1e-3, abs=1e-6)
        expected = 8 * accumulate * sum(noise.values()) / sum(signal.values())
        expect_noise_scale(row, expected)


def test_running_means_remember_as_told():
    recorder, _, gradients = watched(steps=13, noise="consecutive", memory=4)
    signal = noise = 0.0
    for step in (3, 6, 9, 12):
        a, b = gradients.steps[step - 1], gradients.steps[step]
        signal += (sum((a[n] * b[n]).sum().item() for n in a) - signal) / 4
        noise += (sum(((a[n] - b[n]).square().sum() / 2).item() for n in a) - noise) / 4
        expect_noise_scale(recorder.rows[step], 8 * noise / signal)


class Known(Net):
    """``w . x`` averaged: its gradient is the mean of the samples, whatever the weights."""

    def __init__(self):
        super().__init__(torch.nn.Linear(20, 1, bias=False), make=lambda m: torch.optim.SGD(m.parameters(), lr=1e-3))

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).mean()


@pytest.mark.parametrize(
    ("noise", "accumulate"), [("consecutive", 1), ("split", 2), ("split", 3), ("auto", 1), ("auto", 4)]
)
def test_the_noise_scale_is_trace_over_squared_gradient_of_known_noise(noise, accumulate):
    generator = torch.Generator().manual_seed(7)
    mean, sigma = torch.ones(20), 2.5
    x = mean + sigma * torch.randn(400 * accumulate * 8, 20, generator=generator)
    data = DataLoader(TensorDataset(x), batch_size=8)
    recorder, _, _ = watched(400, Known, data, accumulate, noise=noise, memory=400, every_n_steps=1)
    exact = 20 * sigma**2 / 20  # tr Sigma / |G|^2, in samples
    assert recorder.rows[399]["layer/noise_scale"] == pytest.approx(exact, rel=0.08)
    assert recorder.rows[399]["layer/snr/net.weight"] == pytest.approx(8 * accumulate / exact, rel=0.08)


def test_half_a_gradient_copy_is_all_that_is_held_and_nothing_without_need():
    monitor = LayerMonitor(every_n_steps=5, budget=None, noise="consecutive")
    held = {}

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            held[batch_idx] = sum(t.numel() for t in monitor.state_dict()["pairs"]["held"].values())

    module, _ = fit([monitor, Look()], Classifier, DataLoader(classification_data(), batch_size=8), max_steps=12)
    total = sum(p.numel() for p in module.parameters())
    assert {i for i, n in held.items() if n} == {4, 9}
    assert held[4] == total


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"layers": "nothing"}, "matches no trainable"), ({"noise": "split"}, "accumulate"), ({"noise": "ranks"}, "auto")],
)
def test_refusals(arguments, words):
    with pytest.raises(MisconfigurationException, match=words):
        watched(**arguments)

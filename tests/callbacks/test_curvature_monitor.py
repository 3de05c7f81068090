"""Curvature through a real Trainer, against dense matrices."""

import itertools

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from evolute.callbacks import CurvatureMonitor
from tests.callbacks.watched import blob, dense_hessian, sgd, tanh_net, watched
from tests.conftest import fit
from tests.modules import Net, Quadratic, Recorder


@pytest.mark.parametrize("fixed", [True, False])
def test_every_quantity_equals_the_dense_one_at_the_weights_after_the_step(fixed):
    recorder, snapshots, module, _ = watched(sgd, fixed_batch=fixed, trace_samples=300, blocks="(.*weight)")
    for step in (0, 3, 5):
        row, batch = recorder.rows[step], snapshots.batches[step]
        H, g = dense_hessian(module, snapshots.weights[step + 1], batch)
        p = torch.cat([(snapshots.weights[step + 1][n] - w).flatten() for n, w in snapshots.weights[step].items()])
        exact = torch.linalg.eigvalsh(H)[-1].item()
        assert row["curvature/sharpness"] == pytest.approx(exact, rel=1e-9)
        assert row["curvature/residual"] < 1e-8
        assert row["curvature/directional"] == pytest.approx((p @ H @ p / (p @ p)).item(), rel=1e-8)
        quadratic = (p @ H @ p).abs() / (2 * (g @ p).abs())
        assert row["curvature/step_quadratic"] == pytest.approx(quadratic.item(), rel=1e-8)
        assert abs(row["curvature/trace"] - H.trace().item()) < 4 * row["curvature/trace_stderr"]
        assert row["curvature/trace_stderr"] < 0.1 * H.trace().item()
        start = 0
        for name, w in snapshots.weights[0].items():
            block = H[start : start + w.numel(), start : start + w.numel()]
            start += w.numel()
            found = row.get(f"curvature/block_sharpness/{name}")
            if name.endswith("weight"):
                assert found == pytest.approx(torch.linalg.eigvalsh(block)[-1].item(), rel=1e-8)
            else:
                assert found is None


def test_a_gradient_that_misses_the_sharpest_direction_does_not_hide_it():
    recorder = Recorder()
    module = Quadratic(
        torch.diag(torch.tensor([10.0, 1.0, 0.5])),
        lambda p: torch.optim.SGD(p, lr=0.01),
        start=torch.tensor([0.0, 1.0, 0.0]),
    )
    fit([CurvatureMonitor(every_n_steps=1, budget=None)], module, logger=recorder, max_steps=1)
    assert recorder.rows[0]["curvature/sharpness"] == pytest.approx(10.0, rel=1e-2)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(5, 4), nn.Linear(4, 3), reentrant

    def forward(self, x):
        hidden = checkpoint(lambda h: torch.tanh(self.first(h)), x.requires_grad_(), use_reentrant=self.reentrant)
        return self.second(hidden)


def test_non_reentrant_checkpointing_is_measured_exactly():
    recorder, snapshots, module, _ = watched(sgd, steps=2, net=lambda: Checkpointed(False))
    H, _ = dense_hessian_of(module, snapshots.weights[2], snapshots.batches[1])
    assert recorder.rows[1]["curvature/sharpness"] == pytest.approx(torch.linalg.eigvalsh(H)[-1].item(), rel=1e-8)


def dense_hessian_of(module, weights, batch):
    plain = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    renamed = {n.replace("first", "0").replace("second", "2"): w for n, w in weights.items()}
    return dense_hessian(Net(plain), renamed, batch)


def test_reentrant_checkpointing_is_refused_before_the_first_step():
    module = Net(Checkpointed(True))
    with pytest.raises(MisconfigurationException, match="use_reentrant=False"):
        fit(
            [CurvatureMonitor(budget=None)],
            module,
            DataLoader(
                TensorDataset(*(t.float() if t.is_floating_point() else t for t in blob().tensors)), batch_size=8
            ),
        )
    assert module.trainer.global_step == 0


class Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = tanh_net()

    def forward(self, x):
        return Rounding.apply(self.net(x))


def test_a_kernel_without_second_derivative_is_measured_by_differences():
    with pytest.warns(UserWarning, match="finite differences"):
        recorder, snapshots, _, _ = watched(sgd, steps=2, net=Custom, tol=1e-4)
    weights = {n.removeprefix("net."): w for n, w in snapshots.weights[2].items()}
    H, _ = dense_hessian(Net(tanh_net().double()), weights, snapshots.batches[1])
    assert recorder.rows[1]["curvature/sharpness"] == pytest.approx(torch.linalg.eigvalsh(H)[-1].item(), rel=1e-5)


def test_the_probe_batch_is_the_first_samples_of_the_first_batch():
    data = blob(48)
    recorder, snapshots, module, _ = watched(sgd, steps=3, data=data, samples=7)
    for step in range(3):
        first = [t[:7] for t in data.tensors]
        value = F.cross_entropy(
            functional_call(
                module.net, {n.removeprefix("net."): w for n, w in snapshots.weights[step + 1].items()}, (first[0],)
            ),
            first[1],
        )
        assert recorder.rows[step]["curvature/loss"] == pytest.approx(value.item(), rel=1e-12)


def test_a_direction_that_overtakes_the_warm_one_is_found():
    """A quadratic whose sharpest direction changes between two measurements, each an exact eigenvector."""

    class Turning(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.full((40,), 0.1))

        def loss_on(self, batch):
            curvature = torch.linspace(0.1, 1.0, 40)
            curvature[0] = 5.0
            curvature[1] = 4.0 if self.global_step < 4 else 8.0
            return 0.5 * (curvature * self.w**2).sum()

        def training_step(self, batch, batch_idx):
            return self.loss_on(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-4)

    recorder = Recorder()
    monitor = CurvatureMonitor(every_n_steps=2, budget=None, tol=1e-3, max_products=40)
    fit([monitor], Turning, max_steps=8, logger=recorder)
    found = {step: row["curvature/sharpness"] for step, row in recorder.rows.items() if "curvature/sharpness" in row}
    assert found == pytest.approx({0: 5.0, 2: 5.0, 4: 8.0, 6: 8.0}, rel=1e-3)


def flat(weights):
    return torch.cat([w.flatten() for w in weights.values()])


def test_the_full_preset_equals_the_dense_quantities_and_hand_calculation():
    recorder, snapshots, module, _ = watched(sgd, preset="full", eigenpairs=3, trace_samples=400)
    for step in (0, 4):
        row, batch = recorder.rows[step], snapshots.batches[step]
        before, after = snapshots.weights[step : step + 2]
        H, g = dense_hessian(module, after, batch)
        p = flat(after) - flat(before)
        values, vectors = torch.linalg.eigh(H)
        assert [row[f"curvature/lambda/{k}"] for k in (1, 2, 3)] == pytest.approx(values.flip(0)[:3].tolist(), rel=1e-8)
        assert row["curvature/lambda_min"] == pytest.approx(values[0].item(), rel=1e-8)
        overlap = (vectors[:, -3:].T @ g).square().sum() / g.square().sum()
        assert row["curvature/grad_overlap"] == pytest.approx(overlap.item(), rel=1e-6)
        assert row["curvature/grad_rayleigh"] == pytest.approx((g @ H @ g / (g @ g)).item(), rel=1e-9)
        assert row["curvature/frobenius"] == pytest.approx(H.norm().item(), rel=0.1)

        old, new = (dense_loss(module, w, batch) for w in (before, after))
        assert row["curvature/loss_change"] == pytest.approx(new - old, rel=1e-9)
        assert row["curvature/model_agreement"] == pytest.approx((new - old) / (g @ p - p @ H @ p / 2).item(), rel=1e-6)
        _, g_old = dense_hessian(module, before, batch)
        ratio = ((g - g_old - H @ p).norm() / g.norm()).item()
        assert row["curvature/gns_ratio"] == pytest.approx(ratio, rel=1e-6)
        assert row["curvature/gns_radius"] == pytest.approx(p.norm().item() / ratio, rel=1e-6)

        start = 0
        for layer in ("net.0", "net.2"):
            size = sum(w.numel() for n, w in after.items() if n.startswith(layer))
            block = H[start : start + size, start : start + size]
            start += size
            assert row[f"curvature/block_sharpness/{layer}"] == pytest.approx(torch.linalg.eigvalsh(block)[-1].item())
            assert row[f"curvature/block_trace/{layer}"] == pytest.approx(block.trace().item(), rel=0.2)


def dense_loss(module, weights, batch):
    params = {n.removeprefix("net."): w for n, w in weights.items()}
    return module.loss(functional_call(module.net, params, (batch[0],)), batch[1]).item()


@pytest.mark.parametrize("preset", ["cheap", "full"])
def test_critical_sharpness_of_descent_on_a_quadratic_is_the_rayleigh_quotient_of_the_gradient(preset):
    """The loss is back at its value after a step of 2 g^T g / g^T A g, whatever the rate that was used."""
    dense = torch.diag(torch.tensor([4.0, 1.0, 0.3], dtype=torch.float64))
    start = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    g = dense @ start
    exact = (g @ dense @ g / (g @ g)).item()
    for lr in (0.03, 0.3, 0.9):
        recorder = Recorder()
        module = Quadratic(dense, lambda p, lr=lr: torch.optim.SGD(p, lr=lr), start=start)
        monitor = CurvatureMonitor(every_n_steps=1, preset=preset, eigenpairs=1, budget=None)
        fit([monitor], module, logger=recorder, max_steps=1, precision="64-true")
        row = recorder.rows[0]
        assert abs(row["curvature/critical_sharpness"] / exact - 1) <= row["curvature/critical_error"] * 1.001
        assert row["curvature/critical_ratio"] == pytest.approx(row["curvature/critical_sharpness"] * lr / 2)
        assert (row["curvature/critical_ratio"] > 1) == (row["curvature/loss_change"] > 0) == (lr > 2 / exact)
        if preset == "full":
            assert row["curvature/model_agreement"] == pytest.approx(1.0, rel=1e-10)
            assert row["curvature/gns_ratio"] < 1e-10
            assert row["curvature/block_sharpness/x"] == pytest.approx(4.0, rel=1e-3)


class Counting(Net):
    forwards = 0

    def training_step(self, batch, batch_idx):
        self.forwards += 1
        return super().training_step(batch, batch_idx)


def test_the_cheap_preset_takes_under_ten_forward_passes_and_no_second_derivative():
    class NoDerivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1.0

        @staticmethod
        def backward(ctx, g):
            assert not torch.is_grad_enabled(), "a second derivative was asked for"
            return g.clone()

    class Fragile(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tanh_net()

        def forward(self, x):
            return NoDerivative.apply(self.net(x))

    seen, counts = Recorder(), []

    class Count(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            counts.append(pl_module.forwards)

    data = DataLoader(TensorDataset(*(t.float() if t.is_floating_point() else t for t in blob().tensors)), 24)
    monitor = CurvatureMonitor(every_n_steps=1, preset="cheap", samples=24, budget=None)
    fit([Count(), monitor], lambda: Counting(Fragile(), make=sgd), data, logger=seen, max_steps=8)
    taken = [b - a - 1 for a, b in itertools.pairwise(counts)]  # one forward is the step's own
    assert max(taken[1:]) < 10
    assert sorted(taken[1:])[3] <= 8
    assert all("curvature/critical_sharpness" in row for row in seen.rows.values())
    assert not any("curvature/sharpness" in row for row in seen.rows.values())


def test_the_critical_step_is_where_the_loss_of_a_network_crosses():
    recorder, snapshots, module, _ = watched(sgd, preset="cheap")
    for step in range(6):
        row, batch = recorder.rows[step], snapshots.batches[step]
        before, after = snapshots.weights[step : step + 2]

        def at(s, before=before, after=after, batch=batch):
            return dense_loss(module, {n: w + s * (after[n] - w) for n, w in before.items()}, batch)

        step_c, error = 1 / row["curvature/critical_ratio"], row["curvature/critical_error"] * 1.001
        assert at(step_c / (1 + error)) <= at(0.0) < at(step_c * (1 + error))
        assert row["curvature/critical_sharpness"] == pytest.approx(2 / (0.3 * step_c))


def test_reentrant_checkpointing_is_measured_by_forward_passes_where_products_are_refused():
    data = DataLoader(TensorDataset(*(t.float() if t.is_floating_point() else t for t in blob().tensors)), 24)
    with pytest.raises(MisconfigurationException, match='preset="cheap"'):
        fit([CurvatureMonitor(budget=None)], Net(Checkpointed(True)), data)
    recorder = Recorder()
    monitor = CurvatureMonitor(every_n_steps=1, preset="cheap", samples=24, budget=None)
    fit([monitor], Net(Checkpointed(True)), data, logger=recorder, max_steps=3)
    assert all("curvature/critical_ratio" in row for row in recorder.rows.values())


def test_blocks_by_layer_by_class_and_by_pattern():
    found = {}
    for by in ("layer", "Linear", "Sequential", r"net\.(\d)\..*", r".*\.weight"):
        recorder, _, _, _ = watched(sgd, steps=1, blocks=by)
        head = "curvature/block_sharpness/"
        found[by] = {n.removeprefix(head): v for n, v in recorder.rows[0].items() if n.startswith(head)}
    assert (
        found["layer"]
        == found["Linear"]
        == pytest.approx({f"net.{n}": v for n, v in found[r"net\.(\d)\..*"].items()}, rel=1e-9)
    )
    assert found["Sequential"] == pytest.approx({"net": recorder_sharpness(sgd)}, rel=1e-8)
    assert found[r".*\.weight"].keys() == {r".*\.weight"}


def recorder_sharpness(make):
    return watched(make, steps=1)[0].rows[0]["curvature/sharpness"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": "nothing.*"}, "matches no trainable parameter"),
        ({"blocks": "(net"}, "blocks='\\(net'"),
        ({"eigenpairs": 40, "max_products": 50}, "has 39 parameters"),
    ],
)
def test_what_the_module_cannot_give_is_refused_before_training(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        watched(sgd, **options)


def test_as_many_eigenpairs_as_parameters():
    recorder, snapshots, module, _ = watched(sgd, steps=1, eigenpairs=39, max_products=400)
    H, _ = dense_hessian(module, snapshots.weights[1], snapshots.batches[0])
    exact = torch.linalg.eigvalsh(H).flip(0)
    found = torch.tensor([recorder.rows[0][f"curvature/lambda/{k}"] for k in range(1, 40)])
    assert torch.allclose(found.double(), exact, atol=1e-10)


def test_explicit_arguments_win_over_the_preset():
    monitor = CurvatureMonitor(preset="full", eigenpairs=2, trace_samples=0, quantities=["trace", "critical"])
    assert monitor.eigenpairs == 2
    assert monitor.quantities == {"critical"}
    assert CurvatureMonitor(preset="cheap", blocks="layer").quantities == {"critical", "blocks"}
    assert CurvatureMonitor().quantities == {"sharpness", "edge", "directional", "trace"}


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3))

    def forward(self, x):
        return self.layers(x)


def test_batch_norm_in_train_mode_measures_the_loss_that_is_trained_and_keeps_its_buffers():
    class Undropped(Normed):
        def __init__(self):
            super().__init__()
            self.layers[3] = nn.Identity()

    rows = {}
    for mode in ("eval", "train"):
        recorder, snapshots, module, _ = watched(sgd, steps=3, net=Undropped, batch_norm=mode)
        rows[mode] = recorder.rows[2]
        assert int(module.net.layers[1].num_batches_tracked) == 3
    # What the next step would be trained on: the same batch, the weights after the third step.
    module.train()
    weights = {n.removeprefix("net."): w for n, w in snapshots.weights[3].items()}
    trained = module.loss(functional_call(module.net, weights, (snapshots.batches[2][0],)), snapshots.batches[2][1])
    assert rows["train"]["curvature/loss"] == pytest.approx(trained.item(), rel=1e-12)
    assert rows["eval"]["curvature/loss"] != pytest.approx(trained.item(), rel=1e-3)


def test_batch_norm_over_a_single_sample_is_refused():
    with pytest.raises(MisconfigurationException, match="pass samples"):
        watched(sgd, net=Normed, batch_norm="train", samples=1)


def test_random_losses_are_frozen_and_it_is_said(monkeypatch):
    class Noisy(Net):
        def training_step(self, batch, batch_idx):
            return self.loss(self.net(batch[0] + 0.3 * torch.randn_like(batch[0])), batch[1])

    said = []
    monkeypatch.setattr("evolute.callbacks.probe_batch.rank_zero_info", said.append)
    recorder = Recorder()
    # Differences of losses along a step of length zero: only fresh noise could make them differ.
    monitor = CurvatureMonitor(every_n_steps=1, preset="full", eigenpairs=1, samples=24, budget=None)
    module = Noisy(Normed(), make=lambda m: torch.optim.SGD(m.parameters(), lr=1e-12))
    fit([monitor], module, DataLoader(blob(), 24), logger=recorder, max_steps=2, precision="64-true")
    assert abs(recorder.rows[1]["curvature/loss_change"]) < 1e-9
    assert recorder.rows[1]["curvature/gns_ratio"] < 1e-9
    assert len(said) == 1
    for part in ("without dropout", "running statistics", "one draw of the random numbers"):
        assert part in said[0]


def test_products_that_are_not_finite_are_reported_and_training_goes_on():
    class Breaking(Net):
        """Its second derivative is infinite wherever a weight is zero: |w|^1.5."""

        def training_step(self, batch, batch_idx):
            first = next(iter(self.net.parameters()))
            return super().training_step(batch, batch_idx) + (first * 0.0).abs().sqrt().sum().nan_to_num() * 0.0

    recorder = Recorder()
    module = Breaking(tanh_net(), make=sgd)
    monitor = CurvatureMonitor(every_n_steps=1, preset="full", eigenpairs=1, budget=None)
    fit([monitor], module, DataLoader(blob(), 24), logger=recorder, max_steps=2, precision="64-true")
    assert all(row["curvature/nonfinite"] == 1.0 for row in recorder.rows.values())
    assert monitor.state_dict()["warm"] == {}

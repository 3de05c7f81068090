"""Spectra through a real Trainer, against dense matrices and quadratics whose eigenvalues are known."""

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from evolute.callbacks import MetricsCSV, SpectrumProbe
from tests.conftest import fit
from tests.modules import Net, Quadratic, Recorder, Snapshots, Validated, classification_data


def blob(n=24, features=5, classes=3):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, features, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(classes, (n,), generator=generator))


def tanh_net():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def smoothed(logits, targets):
    return F.cross_entropy(logits, targets, label_smoothing=0.1)


def watched(folder, steps=3, loss=smoothed, net=tanh_net, **kwargs):
    snapshots = Snapshots()
    arguments = {"every_n_steps": 1, "vectors": 3, "lanczos_steps": 60, "samples": 1000, "budget": None, **kwargs}
    recorder = Recorder()
    module, _ = fit(
        [SpectrumProbe(**arguments), snapshots],
        lambda: Net(net(), loss),
        DataLoader(blob(), batch_size=24),
        precision="64-true",
        logger=[MetricsCSV(folder), recorder],
        max_steps=steps,
    )
    return recorder, snapshots, module


def dense(module, weights, batch):
    """Hessian and Gauss-Newton matrix [P, P] of the loss at ``weights``."""
    names, sizes = list(weights), [w.numel() for w in weights.values()]

    def logits(flat):
        parts = flat.split(sizes)
        params = {n.removeprefix("net."): p.view_as(weights[n]) for n, p in zip(names, parts, strict=True)}
        return functional_call(module.net, params, (batch[0],))

    flat = torch.cat([w.flatten() for w in weights.values()])
    H = torch.autograd.functional.hessian(lambda w: module.loss(logits(w), batch[1]), flat)
    J = torch.autograd.functional.jacobian(logits, flat).reshape(-1, len(flat))
    z = logits(flat).detach()
    Hz = torch.autograd.functional.hessian(lambda o: module.loss(o.view_as(z), batch[1]), z.flatten())
    return H, J.T @ Hz @ J


def signs(count, size):
    """The random sign vectors [count, size] that the quadrature starts from, always the same ones."""
    source = torch.Generator().manual_seed(0)
    return torch.stack([torch.randint(0, 2, (size,), generator=source) * 2.0 - 1 for _ in range(count)])


def test_the_quadrature_is_the_dense_spectrum_seen_by_its_vectors(tmp_path):
    recorder, snapshots, module = watched(tmp_path, split=True)
    for step in (0, 2):
        H, G = dense(module, snapshots.weights[step + 1], snapshots.batches[step])
        row, arrays = recorder.rows[step], np.load(tmp_path / "arrays" / "spectrum" / f"{step:08d}.npz")
        z = signs(3, len(H)).double()
        parts = {"": H, "ggn_": G, "residual_": H - G}
        for head, matrix in parts.items():
            nodes, weights = arrays[f"{head}nodes"], arrays[f"{head}weights"]
            for power in (0, 1, 2, 3):
                exact = torch.einsum("ni,ij,nj->n", z, torch.linalg.matrix_power(matrix, power), z) / len(H)
                assert (weights * nodes**power).sum(1) == pytest.approx(exact.numpy(), rel=1e-6, abs=1e-12)
            assert int(arrays[f"{head}size"]) == len(H)
        values = torch.linalg.eigvalsh(H)
        assert row["spectrum/lambda_max"] == pytest.approx(values[-1].item(), rel=1e-8)
        assert row["spectrum/lambda_min"] == pytest.approx(values[0].item(), rel=1e-8)
        assert row["spectrum/ggn_sharpness"] == pytest.approx(torch.linalg.eigvalsh(G)[-1].item(), rel=1e-8)
        ratio = (((H - G) @ z.T).square().sum() / (H @ z.T).square().sum()).sqrt()
        assert row["spectrum/residual_ratio"] == pytest.approx(ratio.item(), rel=1e-6)
        seen = (torch.linalg.eigh(H)[1].T @ z.T).square().mean(1) / len(H)
        for name, chosen in (
            ("near_zero_mass", values.abs() <= 1e-3 * values.abs().max()),
            ("neg_mass", values < -1e-3 * values.abs().max()),
        ):
            assert row[f"spectrum/{name}"] == pytest.approx(seen[chosen].sum().item(), abs=1e-8)
        step_of = np.diff(arrays["grid"])[0]
        assert arrays["density"].sum() * step_of == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("classes", [None, 3])
def test_the_outliers_of_a_known_spectrum_are_counted(classes, tmp_path):
    bulk = torch.linspace(-0.02, 0.05, 57)
    spectrum = torch.cat([bulk, torch.tensor([10.0, 14.0, 20.0])])
    rotation = torch.linalg.qr(torch.randn(60, 60, generator=torch.Generator().manual_seed(0))).Q
    recorder = Recorder()
    module = Quadratic(rotation @ torch.diag(spectrum) @ rotation.T, lambda p: torch.optim.SGD(p, lr=1e-3))
    probe = SpectrumProbe(every_n_steps=1, vectors=4, classes=classes, budget=None)
    fit([probe], module, logger=[recorder, MetricsCSV(tmp_path)], max_steps=1)
    row = recorder.rows[0]
    assert row["spectrum/outliers"] == 3
    assert 0.0 < row["spectrum/bulk_edge"] < 10.0 * (1 + 1e-5)
    assert row["spectrum/lambda_max"] == pytest.approx(20.0, rel=1e-5)
    assert row["spectrum/lambda_min"] == pytest.approx(-0.02, rel=1e-2)
    found = np.load(next((tmp_path / "arrays" / "spectrum").iterdir()))["outliers"]
    assert found == pytest.approx([20.0, 14.0, 10.0], rel=1e-4)


def test_it_measures_when_a_validation_ends_and_only_once_a_step(tmp_path):
    def measured(folder, **kwargs):
        recorder = Recorder()
        probe = SpectrumProbe(samples=8, lanczos_steps=6, budget=None, on_validation_end=True, **kwargs)
        fit(
            [probe],
            Validated,
            DataLoader(classification_data(), batch_size=8),
            logger=[MetricsCSV(folder), recorder],
            max_steps=20,
            val_check_interval=5,
        )
        times = [s for s, row in recorder.rows.items() if "spectrum/lambda_max" in row]
        assert sorted(int(p.stem) for p in (folder / "arrays" / "spectrum").iterdir()) == sorted(times)
        return sorted(times), probe

    # 12 batches an epoch: validation after 5 and 10 of each.
    only, _ = measured(tmp_path / "only", every_n_steps=None)
    assert only == [4, 9, 16]
    both, _ = measured(tmp_path / "both", every_n_steps=8)
    assert both == [0, 4, 8, 9, 16]


def test_a_budget_that_is_spent_puts_a_validation_off(tmp_path):
    recorder = Recorder()
    probe = SpectrumProbe(None, True, samples=8, lanczos_steps=30, budget=1e-6)
    fit(
        [probe],
        Validated,
        DataLoader(classification_data(), batch_size=8),
        logger=recorder,
        max_steps=20,
        val_check_interval=5,
    )
    assert [s for s, row in recorder.rows.items() if "spectrum/lambda_max" in row] == [4]


class Regularised(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + sum(p.square().sum() for p in self.parameters())


def test_losses_that_cannot_be_split_are_refused_before_training():
    def start(module, **kwargs):
        data = DataLoader(TensorDataset(*(t.float() if t.is_floating_point() else t for t in blob().tensors)), 24)
        fit([SpectrumProbe(split=True, budget=None, **kwargs)], module, data)

    with pytest.raises(MisconfigurationException, match="parts beside its cross-entropy"):
        start(Regularised(tanh_net()))
    with pytest.raises(MisconfigurationException, match="calls neither"):
        start(Net(tanh_net(), lambda z, y: z.square().mean()))
    with pytest.raises(MisconfigurationException, match="39 parameters"):
        start(Net(tanh_net()), classes=20)


def test_binary_losses_and_dropped_logits_are_split_too(tmp_path):
    def binary(logits, targets):
        return F.binary_cross_entropy_with_logits(input=logits[:, 0], target=(targets > 0).to(logits))

    recorder, snapshots, module = watched(tmp_path, steps=1, loss=binary, split=True)
    _, G = dense(module, snapshots.weights[1], snapshots.batches[0])
    assert recorder.rows[0]["spectrum/ggn_sharpness"] == pytest.approx(torch.linalg.eigvalsh(G)[-1].item(), rel=1e-8)


def test_a_loss_that_is_not_finite_is_reported_and_training_goes_on(tmp_path):
    class Poisoned(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.global_step == 2 and torch.is_grad_enabled() else loss

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            for p in self.parameters():
                p.grad = None if p.grad is None else p.grad.nan_to_num()

    recorder = Recorder()
    probe = SpectrumProbe(every_n_steps=1, lanczos_steps=5, budget=None)
    fit(
        [probe],
        Poisoned(tanh_net()),
        DataLoader(blob(), 24),
        logger=[MetricsCSV(tmp_path), recorder],
        max_steps=4,
        precision="64-true",
    )
    assert "spectrum/lambda_max" in recorder.rows[0]
    assert any(row.get("spectrum/nonfinite") == 1.0 for row in recorder.rows.values())
    assert len(list((tmp_path / "arrays" / "spectrum").iterdir())) < 4


def test_no_file_is_left_without_a_logger(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit([SpectrumProbe(every_n_steps=1, lanczos_steps=5, budget=None)], max_steps=2)
    assert list(tmp_path.iterdir()) == []


def test_the_attention_of_a_transformer_is_differentiated_twice():
    class Attending(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
            self.head = nn.Linear(8, 4)

        def training_step(self, batch, batch_idx):
            hidden = self.net(batch[0].unsqueeze(1).expand(-1, 3, -1))
            return F.cross_entropy(self.head(hidden.mean(1)), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    recorder = Recorder()
    probe = SpectrumProbe(every_n_steps=1, lanczos_steps=8, split=True, samples=8, budget=None)
    fit([probe], Attending, DataLoader(classification_data(), 8), logger=recorder, max_steps=2)
    assert recorder.rows[1]["spectrum/lambda_max"] > 0

"""Edges of stability, against divergence itself, recursions and enumeration."""

import itertools

import lightning as L
import pytest
import torch
from torch import nn

from evolute.callbacks import CurvatureMonitor
from evolute.geometry import nuclear_norm
from evolute.optim import MuonAdamW, Scion
from tests.callbacks.watched import dense_hessian, linear_net, watched
from tests.conftest import fit
from tests.modules import Quadratic, Recorder, Snapshots


def adam(decay=0.0, coupled=False, lrs=(0.01, 0.01)):
    kind = torch.optim.Adam if coupled else torch.optim.AdamW

    def make(module):
        params = list(module.parameters())
        groups = [{"params": params[:1], "lr": lrs[0]}, {"params": params[1:], "lr": lrs[1]}]
        return kind(groups, weight_decay=decay)

    return make


def adam_diagonal(snapshots, step, beta1=0.9, beta2=0.999, eps=1e-8):
    t = step + 1
    return torch.cat(
        [
            ((1 - beta1**t) * ((state["exp_avg_sq"] / (1 - beta2**t)).sqrt() + eps)).flatten()
            for state in snapshots.states[step]
        ]
    )


@pytest.mark.parametrize(
    ("decay", "coupled", "lrs"),
    [(0.0, False, (0.01, 0.01)), (0.5, False, (0.01, 0.01)), (0.5, True, (0.01, 0.01)), (0.0, False, (0.01, 0.03))],
)
def test_adam_edge_is_where_the_recursion_with_its_own_state_turns_unstable(decay, coupled, lrs):
    step = 11
    recorder, snapshots, module, _ = watched(adam(decay, coupled, lrs), steps=step + 1, net=linear_net)
    H, _ = dense_hessian(module, snapshots.weights[step + 1], snapshots.batches[step])
    D = adam_diagonal(snapshots, step)
    sizes = [w.numel() for w in snapshots.weights[0].values()]
    rates = torch.cat([torch.full((sum(part),), lr) for part, lr in zip((sizes[:1], sizes[1:]), lrs, strict=True)])
    added = decay * torch.eye(len(H)) if coupled else 0.0

    def radius(scale):
        """Spectral radius of (m, x) -> (m', x') with H scaled."""
        b1, eye = 0.9, torch.eye(len(H))
        gradient = (1 - b1) * (scale * H + added)
        step_of = torch.diag(rates / D)
        shrink = torch.diag(1 - rates * (0.0 if coupled else decay))
        rows = [torch.cat([b1 * eye, gradient], 1), torch.cat([-b1 * step_of, shrink - step_of @ gradient], 1)]
        return torch.linalg.eigvals(torch.cat(rows)).abs().max().item()

    ratio = recorder.rows[step]["curvature/eos_ratio"]
    if coupled:  # the decay counts as curvature: only its sum with H can be scaled
        scaled = torch.linalg.eigvalsh((H + added) / D.sqrt().outer(D.sqrt()))[-1]
        assert ratio == pytest.approx(scaled.item() / (38 / 0.01), rel=3e-2)
        assert scaled > 1.01 * torch.linalg.eigvalsh(H / D.sqrt().outer(D.sqrt()))[-1]
    else:
        # Scaled to just below the edge the recursion is stable, just above it is not.
        assert radius(0.95 / ratio) < 1.0 + 1e-7
        assert radius(1.05 / ratio) > 1.0 + 1e-3


def test_preconditioned_sharpness_is_adams_own():
    recorder, snapshots, module, _ = watched(adam(), steps=8, net=linear_net)
    H, _ = dense_hessian(module, snapshots.weights[8], snapshots.batches[7])
    root = adam_diagonal(snapshots, 7).sqrt()
    exact = torch.linalg.eigvalsh(H / root.outer(root))[-1].item()
    found = recorder.rows[7]["curvature/preconditioned_sharpness"]
    assert 0.97 * exact < found < exact * (1 + 1e-9)
    assert recorder.rows[7]["curvature/threshold"] == pytest.approx(38 / 0.01)


A = torch.diag(torch.tensor([4.0, 1.0, 0.3]))
FAMILIES = {
    "gd": (2 / 4.0, {}),
    "heavy_ball": (2 * 1.9 / 4.0, {"momentum": 0.9}),
    "moving_average": (2 * 1.9 / (4.0 * 0.1), {"momentum": 0.9, "dampening": 0.9}),
    "nesterov": (2 * 1.9 / (4.0 * 2.8), {"momentum": 0.9, "nesterov": True}),
    "weight_decay": (2 / 5.0, {"weight_decay": 1.0}),
}


@pytest.mark.parametrize("side", [0.97, 1.03])
@pytest.mark.parametrize("family", FAMILIES)
def test_descent_on_a_quadratic_diverges_if_and_only_if_the_ratio_is_above_one(family, side):
    critical, options = FAMILIES[family]
    recorder, snapshots = Recorder(), Snapshots()
    module = Quadratic(A, lambda p: torch.optim.SGD(p, lr=side * critical, **options))
    fit([CurvatureMonitor(every_n_steps=1000, budget=None), snapshots], module, logger=recorder, max_steps=300)
    sizes = [torch.cat(list(w.values())).norm().item() for w in snapshots.weights]
    ratio = recorder.rows[0]["curvature/eos_ratio"]
    assert (ratio > 1) == (not sizes[300] < sizes[200]) == (side > 1)
    # With decay the threshold of H itself moves by the decay, so the ratio is not quite the side.
    assert ratio == pytest.approx(side, rel=1e-2 if "weight_decay" not in options else 2e-2)


@pytest.mark.parametrize("side", [0.97, 1.03])
def test_the_edge_of_layers_with_rates_of_their_own(side):
    dense = torch.tensor([[3.0, 1.0], [1.0, 2.0]])
    rates = torch.tensor([1.0, 0.2])
    root = rates.sqrt()
    lr = side * 2 / torch.linalg.eigvalsh(dense * root.outer(root))[-1].item()
    recorder, snapshots = Recorder(), Snapshots()

    def make(p):
        return torch.optim.SGD([{"params": p[:1], "lr": lr}, {"params": p[1:], "lr": 0.2 * lr}])

    module = Quadratic(dense, make, (1, 1))
    fit([CurvatureMonitor(every_n_steps=1000, budget=None), snapshots], module, logger=recorder, max_steps=300)
    sizes = [torch.cat(list(w.values())).norm().item() for w in snapshots.weights]
    ratio = recorder.rows[0]["curvature/eos_ratio"]
    assert ratio == pytest.approx(side, rel=1e-3)
    assert (ratio > 1) == (not sizes[300] < sizes[200])


@pytest.mark.parametrize("norm", ["sign", "rms"])
def test_the_edge_of_steps_of_fixed_size_by_enumeration(norm):
    generator = torch.Generator().manual_seed(4)
    # Positive entries: the climb, which in general ends at a local maximum, ends at the global one.
    root = torch.randn(8, 8, generator=generator).abs()
    dense, lr = root @ root.T / 8, 0.05
    recorder, snapshots = Recorder(), Snapshots()
    module = Quadratic(dense, lambda p: Scion([{"params": p, "norm": norm, "scale": 2.0}], lr=lr))
    fit([CurvatureMonitor(every_n_steps=1, budget=None), snapshots], module, logger=recorder, max_steps=8)
    x = snapshots.weights[8]["x.0"]
    g = dense @ x
    if norm == "sign":  # a vector: no width enters; the maximum of a convex form lies at a vertex of the cube
        corners = 2.0 * torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8)))
        exact = torch.einsum("ni,ij,nj->n", corners, dense, corners).max().item()
        dual = 2.0 * g.abs().sum().item()
    else:  # a ball of radius 2 sqrt(8)
        exact = 4.0 * 8 * torch.linalg.eigvalsh(dense)[-1].item()
        dual = 2.0 * 8**0.5 * g.norm().item()
    row = recorder.rows[7]
    assert row["curvature/threshold"] == pytest.approx(2 * dual / lr, rel=1e-4)
    assert row["curvature/generalized_sharpness"] == pytest.approx(exact, rel=1e-2)
    assert row["curvature/generalized_sharpness"] <= exact * (1 + 1e-5)
    # The edge: along its worst direction a step of this size gains as much as it loses.
    assert row["curvature/eos_ratio"] == pytest.approx(0.5 * lr**2 * exact / (lr * dual), rel=1e-2)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.RMSprop(p, lr=0.01),
        lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.0),
        lambda p: torch.optim.SGD([{"params": p[:1], "momentum": 0.9}, {"params": p[1:]}], lr=0.1),
    ],
)
def test_no_threshold_where_theory_has_none(make):
    recorder = Recorder()
    module = Quadratic(A, make, (1, 2))
    fit([CurvatureMonitor(every_n_steps=1, budget=None)], module, logger=recorder, max_steps=2)
    assert "curvature/sharpness" in recorder.rows[1]
    assert not {"curvature/threshold", "curvature/eos_ratio"} & recorder.rows[1].keys()


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_muon_is_compared_in_the_balls_of_its_own_steps_and_without_a_claim(adjust):
    class TwoLayers(L.LightningModule):
        """``sum_i c_i x_i^2 / 2`` over a matrix and a vector: the maxima over both balls are known."""

        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.diag(torch.tensor([1.0, 0.5, 0.25, 0.125])))
            self.vector = nn.Parameter(torch.tensor([0.5, -1.0]))

        def training_step(self, batch, batch_idx):
            return 0.5 * (3.0 * self.matrix.square().sum() + 2.0 * self.vector.square().sum())

        def configure_optimizers(self):
            groups = [
                {"params": [self.matrix], "algorithm": "muon", "lr": 0.02},
                {"params": [self.vector], "algorithm": "adamw", "lr": 0.01},
            ]
            return MuonAdamW(groups, weight_decay=0.0, adjust_lr_fn=adjust)

    recorder, snapshots = Recorder(), Snapshots()
    monitor = CurvatureMonitor(every_n_steps=1, budget=None)
    fit([monitor, snapshots], TwoLayers(), logger=recorder, max_steps=2)
    row, weights = recorder.rows[1], snapshots.weights[2]
    radius = 0.2 * 2.0 if adjust == "match_rms_adamw" else 1.0
    # An orthogonal matrix has squared norm 4, a vertex of the cube of half the rate 2 * 0.25.
    exact = 3.0 * radius**2 * 4 + 2.0 * 0.5
    matrix, vector = 3.0 * weights["matrix"], 2.0 * weights["vector"]
    # Newton-Schulz finds orthogonal factors, and with them nuclear norms, to a tenth or two.
    dual = radius * nuclear_norm(matrix, "newton_schulz").item() + 0.5 * vector.abs().sum().item()
    assert row["curvature/generalized_sharpness"] == pytest.approx(exact, rel=0.25)
    ratio = row["curvature/generalized_sharpness"] / (2 * dual / 0.02)
    assert row["curvature/generalized_ratio"] == pytest.approx(ratio, rel=1e-4)
    assert not {"curvature/threshold", "curvature/eos_ratio"} & row.keys()
    assert "curvature/generalized_ratio" in recorder.rows[0]

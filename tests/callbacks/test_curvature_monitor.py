"""Curvature through a real Trainer, against dense matrices; edges of stability, against divergence itself."""

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
from evolute.optim import Scion
from tests.conftest import fit
from tests.modules import Net, Quadratic, Recorder, Snapshots


def blob(n=24, features=5, classes=3):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, features, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(classes, (n,), generator=generator))


def tanh_net():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def linear_net():
    """Softmax regression: its Hessian has no negative eigenvalue, so instability is the step's doing alone."""
    return nn.Sequential(nn.Linear(5, 3))


def dense_hessian(module, weights, batch):
    """The Hessian [P, P] and gradient [P] of the training loss at ``weights``, by nested autograd."""
    names, sizes = list(weights), [w.numel() for w in weights.values()]

    def loss(flat):
        parts = flat.split(sizes)
        params = {n.removeprefix("net."): p.view_as(weights[n]) for n, p in zip(names, parts, strict=True)}
        return module.loss(functional_call(module.net, params, (batch[0],)), batch[1])

    flat = torch.cat([w.flatten() for w in weights.values()])
    H = torch.autograd.functional.hessian(loss, flat)
    assert isinstance(H, torch.Tensor)
    return H, torch.autograd.functional.jacobian(loss, flat)


def watched(make, steps=6, net=tanh_net, data=None, **kwargs):
    """Train in double on the full batch, measuring every step; return records, snapshots, module, trainer."""
    arguments = {"every_n_steps": 1, "samples": 1000, "budget": None, "tol": 1e-9, "max_products": 80, **kwargs}
    recorder, snapshots = Recorder(), Snapshots()
    module, trainer = fit(
        [CurvatureMonitor(**arguments), snapshots],
        lambda: Net(net(), make=make),
        DataLoader(data or blob(), batch_size=24),
        precision="64-true",
        logger=recorder,
        max_steps=steps,
    )
    return recorder, snapshots, module, trainer


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.3)


@pytest.mark.parametrize("fixed", [True, False])
def test_every_quantity_equals_the_dense_one_at_the_weights_after_the_step(fixed):
    recorder, snapshots, module, _ = watched(sgd, fixed_batch=fixed, trace_samples=300, layers=".*weight")
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
            found = row.get(f"curvature/layer_sharpness/{name}")
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

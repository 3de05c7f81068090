"""Preconditioned and generalised sharpness against dense algebra and enumeration."""

import itertools

import pytest
import torch

from evolute.geometry import (
    Hessian,
    adam_diagonal,
    adam_preconditioner,
    generalized_sharpness,
    preconditioned,
    top_eigenpairs,
)
from tests.geometry.networks import mlp


def positive(size, seed=0):
    a = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a @ a.T


def test_preconditioned_has_the_eigenvalues_of_the_unsymmetric_product():
    matrix, diagonal = positive(20), torch.rand(20, dtype=torch.float64) + 0.01
    operator = preconditioned(matrix, diagonal)
    found = top_eigenpairs(operator, 3, tol=1e-9)
    exact = torch.linalg.eigvals(matrix / diagonal[:, None]).real.sort(descending=True).values[:3]
    torch.testing.assert_close(found.values, exact, rtol=1e-8, atol=0)
    dense = diagonal.rsqrt()[:, None] * matrix * diagonal.rsqrt()
    torch.testing.assert_close(operator @ torch.eye(20, dtype=torch.float64), dense)
    direction = found.vectors[:, 0] / diagonal.sqrt()
    torch.testing.assert_close(matrix @ direction / diagonal, found.values[0] * direction, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [0.0, -1.0, torch.nan, torch.inf])
def test_preconditioner_must_be_positive(bad):
    diagonal = torch.ones(3, dtype=torch.float64)
    diagonal[1] = bad
    with pytest.raises(ValueError, match="positive and finite"):
        preconditioned(positive(3), diagonal)
    with pytest.raises(ValueError, match="expected"):
        preconditioned(positive(3), torch.ones(2))


ADAMS = {
    "adam": (torch.optim.Adam, {}),
    "decayed": (torch.optim.Adam, {"weight_decay": 0.1}),
    "decoupled": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "fused": (torch.optim.AdamW, {"fused": True, "betas": (0.5, 0.9), "eps": 1e-2}),
    "tensor rate": (torch.optim.Adam, {"lr": torch.tensor(0.01, dtype=torch.float64), "foreach": False}),
}


@pytest.mark.parametrize("name", ADAMS)
def test_the_preconditioner_is_what_the_step_just_made_was_divided_by(name):
    kind, options = ADAMS[name]
    problem = mlp()
    groups = [{"params": list(problem.params.values())[::2]},
              {"params": list(problem.params.values())[1::2], "betas": (0.8, 0.95), "eps": 1e-3}]  # fmt: skip
    optimizer = kind(groups, **{"lr": 0.01, **options})
    for step in range(4):
        optimizer.zero_grad()
        (problem.loss() * (10.0 if step == 1 else 1.0)).backward()  # a peak, which amsgrad remembers
        before = problem.flat()
        optimizer.step()
        decay = 0.01 * optimizer.param_groups[0]["weight_decay"] if kind is torch.optim.AdamW else 0.0
        first = torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in problem.params.values()])
        moved = problem.flat() - before * (1 - decay)
        D = adam_preconditioner(optimizer, problem.params)
        assert D.dtype == torch.float64
        torch.testing.assert_close(moved, -0.01 * first / D, rtol=1e-9, atol=1e-15)


def test_adams_sharpness_is_that_of_the_dense_product_whole_and_by_blocks():
    problem = mlp()
    optimizer = torch.optim.AdamW(problem.module.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        problem.loss().backward()
        optimizer.step()
    dense = problem.dense_hessian()
    v = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in problem.params.values()])
    expected = (1 - 0.9**5) * ((v / (1 - 0.999**5)).sqrt() + 1e-8)
    with Hessian(problem.loss, problem.params) as H:
        D = adam_preconditioner(optimizer, problem.params)
        torch.testing.assert_close(D, expected, rtol=1e-12, atol=0)
        scaled = preconditioned(H, D) @ torch.eye(len(D), dtype=torch.float64)
        torch.testing.assert_close(scaled, expected.rsqrt()[:, None] * dense * expected.rsqrt(), rtol=1e-9, atol=1e-9)
        sharpness = top_eigenpairs(preconditioned(H, D), tol=1e-8, which="largest").values[0]
        assert sharpness.item() == pytest.approx(torch.linalg.eigvals(dense / expected[:, None]).real.max().item())
        part = {"2.weight": problem.params["2.weight"]}
        block = preconditioned(H.block(part), adam_preconditioner(optimizer, part))
        torch.testing.assert_close(block @ torch.eye(42).double(), scaled[42:84, 42:84], rtol=1e-9, atol=1e-9)


def test_the_preconditioner_is_wide_and_names_what_is_missing():
    w, other = (torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = torch.optim.Adam([w])
    with pytest.raises(ValueError, match="'w' has not been stepped"):
        adam_preconditioner(optimizer, {"w": w})
    w.grad = torch.ones_like(w)
    optimizer.step()
    torch.testing.assert_close(adam_preconditioner(optimizer, {"w": w}), torch.full((3,), 0.1), rtol=1e-2, atol=0)
    with pytest.raises(ValueError, match="'other' is not among"):
        adam_preconditioner(optimizer, {"w": w, "other": other})
    with pytest.raises(ValueError, match="empty"):
        adam_preconditioner(optimizer, {})
    with pytest.raises(ValueError, match="SGD is neither Adam nor AdamW"):
        adam_preconditioner(torch.optim.SGD([w]), {"w": w})
    assert adam_diagonal(torch.zeros(2), 1, (0.9, 0.999), 0.5).tolist() == pytest.approx([0.05, 0.05])


def test_in_the_l2_norm_it_is_the_largest_eigenvalue():
    matrix = positive(15)
    found = generalized_sharpness(matrix, lambda m: m / m.norm(), torch.ones(15).double() / 15**0.5, 300)
    assert found.value.item() == pytest.approx(torch.linalg.eigvalsh(matrix).max().item(), rel=1e-6)
    assert (found.history.diff() > -1e-9).all()


def test_in_the_sign_norm_it_is_a_lower_estimate_that_restarts_make_exact():
    matrix = positive(8)
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8)), dtype=torch.float64)
    exact = (corners @ matrix * corners).sum(dim=1).max().item()
    generator = torch.Generator().manual_seed(0)
    starts = torch.randn(20, 8, dtype=torch.float64, generator=generator).sign()
    found = [generalized_sharpness(matrix, torch.sign, start) for start in starts]
    assert all(f.value <= exact + 1e-9 for f in found)
    assert max(f.value.item() for f in found) == pytest.approx(exact)
    for f in found:
        assert f.value.item() == pytest.approx((f.direction @ matrix @ f.direction).item())
        assert (f.history.diff() > -1e-9).all()  # a convex form climbs
        assert len(f.history) < 15  # and stops where the corner repeats


def test_the_best_iterate_is_kept_on_an_indefinite_form():
    matrix = torch.diag(torch.tensor([1.0, -3.0], dtype=torch.float64))
    found = generalized_sharpness(matrix, lambda m: m / m.norm(), torch.tensor([0.8, 0.6]).double(), 20)
    assert found.value == found.history.max() == found.history[0]
    assert found.history[-1] < -2.9


def test_refuses_no_iterations_and_non_finite_products():
    with pytest.raises(ValueError, match="iterations=0"):
        generalized_sharpness(positive(3), torch.sign, torch.ones(3).double(), 0)
    with pytest.raises(FloatingPointError, match="iteration 0"):
        generalized_sharpness(positive(3) * torch.nan, torch.sign, torch.ones(3).double())

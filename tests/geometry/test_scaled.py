"""Preconditioned and generalised sharpness against dense algebra and enumeration."""

import itertools

import pytest
import torch

from evolute.geometry import generalized_sharpness, preconditioned, top_eigenpairs


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

"""Random estimates: exact where they must be, within their own error elsewhere."""

import pytest
import torch

from evolute.geometry import Hessian, hutch_plus_plus, hutchinson_diagonal, hutchinson_trace, trace_samples
from tests.geometry.networks import mlp


def symmetric(size=30):
    a = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return a + a.T


def test_diagonal_matrices_are_exact_from_one_vector():
    d = torch.arange(7.0, dtype=torch.float64) - 2
    assert hutchinson_trace(torch.diag(d), samples=1).item() == pytest.approx(d.sum().item(), rel=1e-14)


def test_mean_and_spread_are_those_of_the_formula():
    matrix = symmetric()
    found = trace_samples(matrix, 2000)
    assert abs(found.trace - matrix.trace()) < 3 * found.stderr
    variance = 2 * (matrix.square().sum() - matrix.diagonal().square().sum())
    assert found.quadratic.var().item() == pytest.approx(variance.item(), rel=0.15)
    assert found.stderr.item() == pytest.approx((variance / 2000).sqrt().item(), rel=0.1)
    assert found.frobenius.item() == pytest.approx(matrix.norm().item(), rel=0.03)
    assert torch.equal(hutchinson_trace(matrix, 2000), found.trace)


def test_a_network():
    problem = mlp()
    with Hessian(problem.loss, problem.params) as H:
        found = trace_samples(H, 200)
        assert H.products == 200
    assert abs(found.trace - problem.dense_hessian().trace()) < 3 * found.stderr


def test_one_sample_has_no_error_estimate_and_none_is_refused():
    assert trace_samples(torch.eye(3), 1).stderr.isnan()
    with pytest.raises(ValueError, match="samples=0"):
        hutchinson_trace(torch.eye(3), 0)


def test_random_numbers_are_private():
    state = torch.get_rng_state()
    matrix = symmetric()
    assert torch.equal(hutchinson_trace(matrix, 3), hutchinson_trace(matrix, 3))
    assert torch.equal(torch.get_rng_state(), state)
    other = torch.Generator().manual_seed(9)
    assert not torch.equal(hutchinson_trace(matrix, 3), hutchinson_trace(matrix, 3, other))


def low_rank(rank, size=60):
    a = torch.randn(size, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return a @ torch.diag(torch.arange(1.0, rank + 1).double() * (-1) ** torch.arange(rank)) @ a.T


def test_hutch_plus_plus_is_exact_for_low_rank():
    matrix = low_rank(5)
    found = hutch_plus_plus(matrix, products=15)
    assert found.trace.item() == pytest.approx(matrix.trace().item(), rel=1e-10)
    assert found.stderr < 1e-8
    assert found.products == 15
    missed = hutch_plus_plus(matrix, products=12)
    assert abs(missed.trace - matrix.trace()) > 1e-3  # one vector short


def test_hutch_plus_plus_is_unbiased_and_beats_hutchinson_on_a_decaying_spectrum():
    generator = torch.Generator().manual_seed(4)
    basis, _ = torch.linalg.qr(torch.randn(100, 100, dtype=torch.float64, generator=generator))
    matrix = (basis * torch.arange(1, 101).double().pow(-1.5)) @ basis.T
    plain = torch.stack([hutchinson_trace(matrix, 30, generator) for _ in range(200)])
    found = [hutch_plus_plus(matrix, 30, generator) for _ in range(200)]
    values = torch.stack([f.trace for f in found])
    assert abs(values.mean() - matrix.trace()) < 4 * values.std() / 200**0.5
    assert values.var() < plain.var() / 10
    # The error each run claims is the error there is.
    claimed = torch.stack([f.stderr for f in found]).square().mean().sqrt()
    assert claimed.item() == pytest.approx(values.std().item(), rel=0.2)


def test_the_diagonal_is_unbiased_with_the_variance_of_the_formula():
    matrix = symmetric()
    found = hutchinson_diagonal(matrix, 3000)
    variance = matrix.square().sum(dim=1) - matrix.diagonal().square()
    torch.testing.assert_close(found.stderr, (variance / 3000).sqrt(), rtol=0.1, atol=0)
    assert ((found.values - matrix.diagonal()).abs() < 4 * found.stderr).all()
    assert hutchinson_diagonal(matrix, 1).stderr.isnan().all()


def test_the_diagonal_of_a_diagonal_matrix_is_exact():
    d = torch.arange(7.0, dtype=torch.float64) - 2
    found = hutchinson_diagonal(torch.diag(d), samples=2)
    torch.testing.assert_close(found.values, d, rtol=1e-14, atol=0)
    assert found.stderr.max() < 1e-14


def test_the_other_estimates_of_a_network_and_their_refusals():
    problem = mlp()
    dense = problem.dense_hessian()
    with Hessian(problem.loss, problem.params) as H:
        sketched = hutch_plus_plus(H, 60)
        diagonal = hutchinson_diagonal(H, 300)
        assert H.products == 360
    assert abs(sketched.trace - dense.trace()) < 4 * sketched.stderr
    assert ((diagonal.values - dense.diagonal()).abs() < 5 * diagonal.stderr + 1e-12).all()
    assert hutch_plus_plus(torch.eye(2), 30).trace.item() == pytest.approx(2.0)  # more products than dimensions
    with pytest.raises(ValueError, match="products=2"):
        hutch_plus_plus(dense, 2)
    with pytest.raises(ValueError, match="samples=0"):
        hutchinson_diagonal(dense, 0)

"""Hutchinson's estimates: exact where they must be, within their own error elsewhere."""

import pytest
import torch

from evolute.geometry import Hessian, hutchinson_trace, trace_samples
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

"""Eigenpairs against dense ones on spectra that break careless Lanczos."""

import pytest
import torch

from evolute.geometry import Hessian, top_eigenpairs
from tests.geometry.networks import convnet, mlp


def with_spectrum(top, size=300, bulk=0.3, seed=0):
    """A random symmetric matrix with the given outliers over a normal bulk, and all its eigenvalues."""
    generator = torch.Generator().manual_seed(1000 + seed)  # not the solver's own seed
    noise = bulk * torch.randn(size - len(top), dtype=torch.float64, generator=generator).clamp(-3, 3)
    values = torch.cat([torch.tensor(top, dtype=torch.float64), noise])
    basis, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return (basis * values) @ basis.T, values


def expected(values, k, which):
    key = {"magnitude": values.abs(), "largest": values, "smallest": -values}[which]
    return values[key.argsort(descending=True)][:k]


SPECTRA = {
    "separate": [9.0, 5, 4, 3, 2, 1.5],
    "negative top": [-9.0, 5, -4.1, 4, 3, 2],
    "cluster": [5.0, 4.999, 4.998, 4, 3, 2.5],
    "double": [5.0, 5, 4, 4, 3, 3],
    "triple": [5.0, 5, 5, 3, 3, 1.5],
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("which", ["magnitude", "largest", "smallest"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_values_equal_the_dense_ones(spectrum, which, k):
    matrix, values = with_spectrum(SPECTRA[spectrum])
    found = top_eigenpairs(matrix, k, tol=1e-8, which=which, max_products=300)
    assert found.converged
    torch.testing.assert_close(found.values, expected(values, k, which), rtol=1e-8, atol=0)
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-10)
    residuals = (matrix @ found.vectors - found.vectors * found.values).norm(dim=0) / found.values.abs()
    torch.testing.assert_close(found.residuals, residuals, rtol=1e-3, atol=1e-13)
    assert (found.residuals <= 1e-8).all()


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_default_tolerance_bounds_the_true_residual_and_misses_no_copy(spectrum):
    for seed in range(12):
        matrix, values = with_spectrum(SPECTRA[spectrum], seed=seed)
        found = top_eigenpairs(matrix, 4)
        assert found.converged
        assert (found.residuals <= 1e-3).all()
        torch.testing.assert_close(found.values.abs(), expected(values, 4, "magnitude").abs(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("which", ["magnitude", "largest", "smallest"])
def test_restarts_reach_the_same_pairs_in_less_memory(spectrum, which):
    matrix, values = with_spectrum(SPECTRA[spectrum], bulk=0.6)
    found = top_eigenpairs(matrix, 4, tol=1e-7, which=which, max_products=900, basis=14)
    assert found.products > 24  # at least two restarts
    assert found.converged
    torch.testing.assert_close(found.values, expected(values, 4, which), rtol=1e-8, atol=0)
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-10)
    residuals = (matrix @ found.vectors - found.vectors * found.values).norm(dim=0) / found.values.abs()
    torch.testing.assert_close(found.residuals, residuals, rtol=1e-3, atol=1e-13)


def test_a_basis_is_never_larger_than_asked(monkeypatch):
    shapes = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: shapes.append(size) or empty(*size, **options))
    matrix, _ = with_spectrum(SPECTRA["separate"])
    assert top_eigenpairs(matrix, 3, tol=1e-8, basis=10).converged
    assert shapes == [(10, 300)]


def test_hessians_of_networks():
    for problem in (mlp(), convnet()):
        dense = torch.linalg.eigvalsh(problem.dense_hessian())
        with Hessian(problem.loss, problem.params) as H:
            found = top_eigenpairs(H, 4, tol=1e-9)
            assert found.products == H.products
        torch.testing.assert_close(found.values, expected(dense, 4, "magnitude"), rtol=1e-8, atol=0)


class Counting:
    def __init__(self, matrix):
        self.matrix, self.shape, self.dtype, self.device = matrix, matrix.shape, matrix.dtype, matrix.device
        self.count = 0

    def __matmul__(self, v):
        self.count += 1
        return self.matrix @ v


def test_a_warm_start_needs_one_to_three_products():
    matrix, _ = with_spectrum(SPECTRA["separate"])
    operator = Counting(matrix)
    cold = top_eigenpairs(operator)
    assert operator.count == cold.products > 4
    exact = top_eigenpairs(matrix, tol=1e-10).vectors
    assert top_eigenpairs(matrix, start=exact[:, 0]).products == 1
    moved = matrix + with_spectrum([], bulk=0.003, seed=1)[0]
    warm = top_eigenpairs(moved, start=cold.vectors)
    assert 1 <= warm.products <= 3
    assert warm.converged
    assert warm.values.item() == pytest.approx(torch.linalg.eigvalsh(moved).max().item(), rel=1e-5)


def test_several_warm_vectors_are_a_block_start():
    matrix, values = with_spectrum(SPECTRA["cluster"])
    cold = top_eigenpairs(matrix, 5, tol=1e-6)
    again = top_eigenpairs(matrix, 5, tol=1e-3, start=cold.vectors)
    assert again.products <= 10 < cold.products  # 5 products, 5 to look for further copies
    torch.testing.assert_close(again.values, expected(values, 5, "magnitude"), rtol=1e-6, atol=0)
    # Repeated and zero columns add nothing and do no harm.
    poor = torch.stack([cold.vectors[:, 0], cold.vectors[:, 0], torch.zeros(300, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(top_eigenpairs(matrix, 2, start=poor).values, again.values[:2], rtol=1e-3, atol=0)


def test_invariant_subspaces_are_left_by_random_vectors():
    few = torch.diag(torch.tensor([4.0, 4, 4, 4, 1, 1, 1, 1, 0, 0], dtype=torch.float64))
    found = top_eigenpairs(few, 10, tol=1e-10)
    torch.testing.assert_close(
        found.values, torch.tensor([4.0] * 4 + [1] * 4 + [0] * 2).double(), rtol=1e-12, atol=1e-12
    )
    assert found.converged
    start = torch.zeros(10, dtype=torch.float64)
    start[9] = 1.0  # an eigenvector of the eigenvalue 0
    torch.testing.assert_close(top_eigenpairs(few, 4, start=start).values, torch.full((4,), 4.0).double())
    nothing = top_eigenpairs(torch.zeros(3, 3), 2)
    assert nothing.converged
    assert torch.equal(nothing.values, torch.zeros(2).double())
    assert torch.equal(nothing.residuals, torch.zeros(2).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_reach_the_default_tolerance(dtype):
    matrix, values = with_spectrum(SPECTRA["separate"])
    matrix = matrix.to(dtype)
    tol = 1e-3 if dtype == torch.float32 else 2e-2
    found = top_eigenpairs(matrix, 3, tol=tol)
    assert found.converged
    torch.testing.assert_close(found.values, expected(values, 3, "magnitude"), rtol=tol, atol=0)


def test_what_cannot_converge_says_so_within_its_budget():
    matrix, _ = with_spectrum([], size=400, bulk=1.0)
    found = top_eigenpairs(matrix, 3, tol=1e-6, max_products=12)
    assert found.products <= 12
    assert not found.converged
    assert (found.residuals > 1e-6).any()
    noise = 1e-2 * torch.randn(400, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for basis in (6, None):
        crooked = top_eigenpairs(with_spectrum([5.0], size=400)[0] + noise, tol=1e-6, max_products=40, basis=basis)
        assert crooked.products <= 40  # not symmetric: beta |s| would converge, the true residual never does
        assert not crooked.converged
        assert crooked.residuals.item() > 1e-4


def test_random_numbers_are_private():
    matrix, _ = with_spectrum(SPECTRA["separate"])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = top_eigenpairs(matrix), top_eigenpairs(matrix)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.vectors, second.vectors)
    other = top_eigenpairs(matrix, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(first.vectors, other.vectors)


def test_non_finite_products_stop_it():
    matrix = torch.eye(5)
    matrix[2, 3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"product 1 .* 1 of 5"):
        top_eigenpairs(matrix)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 4}, "k=4.*size of the operator, 3"),
        ({"k": 0}, "k=0"),
        ({"tol": 0.0}, "tol=0.0"),
        ({"which": "LM"}, "which='LM'"),
        ({"start": torch.ones(2)}, r"start has shape \(2,\)"),
        ({"start": torch.zeros(3)}, "only zeros"),
        ({"start": torch.tensor([1.0, torch.nan, 0])}, "start is not finite"),
        ({"k": 2, "max_products": 1}, "max_products=1.*at least 2"),
        ({"basis": 5}, "basis=5.*at least 6"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        top_eigenpairs(torch.eye(3), **arguments)

"""Newton-Schulz and Polar Express against the SVD and against their own recursion in float64."""

import pytest
import torch

from evolute.geometry import newton_schulz, nuclear_norm, polar_express
from evolute.geometry.norms.orthogonalize import MUON_QUINTIC, POLAR_EXPRESS, fast_dtype

# Share of the nuclear norm that five steps find.
SHARE = {"newton_schulz": (0.80, 0.92), "polar_express": (0.97, 1.08)}


def matrix(spectrum: str, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    M = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    if spectrum == "low_rank":
        left, right = torch.randn(rows, 4, generator=g).double(), torch.randn(4, columns, generator=g).double()
        return left @ right + 1e-3 * M
    if spectrum == "power_law":
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        return (U * torch.arange(1, len(S) + 1).double() ** -1.5) @ Vh
    return M


@pytest.mark.parametrize("spectrum", ["gaussian", "low_rank", "power_law"])
@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (64, 256), (128, 128)])
@pytest.mark.parametrize("method", SHARE)
def test_nuclear_norm_estimate_against_svd(spectrum, shape, method):
    M = matrix(spectrum, *shape)
    low, high = SHARE[method]
    for x in (M, M.mT, 1e-6 * M, 1e6 * M, M.float()):
        assert low < (nuclear_norm(x, method) / nuclear_norm(x, "svd")).item() < high
    rough = nuclear_norm(M.to(torch.bfloat16), method) / nuclear_norm(M)
    assert low - 0.02 < rough.item() < high + 0.02


def recursion(M, schedule, safety):
    X = M / (safety * torch.linalg.matrix_norm(M))
    for a, b, c in schedule:
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (128, 344), (344, 128), (256, 1024)])
def test_both_are_their_recursion_and_float32_stays_within_1e_6_of_it(rows, columns):
    M = matrix("gaussian", rows, columns)
    for function, schedule, safety, atol in (
        (newton_schulz, [MUON_QUINTIC] * 5, 1.0, 1e-6),
        (polar_express, POLAR_EXPRESS, 1.02, 3e-6),
    ):
        exact = recursion(M, schedule, safety)
        torch.testing.assert_close(function(M), exact, rtol=0, atol=1e-11)
        torch.testing.assert_close(function(M.float(), dtype=torch.float32).double(), exact, rtol=0, atol=atol)


def test_a_sum_of_many_squares_does_not_cost_digits():
    M = matrix("gaussian", 512, 4096)
    error = newton_schulz(M.float(), dtype=torch.float32).double() - newton_schulz(M)
    assert error.abs().max() < 1e-6


@pytest.mark.parametrize("function", [newton_schulz, polar_express])
def test_batch_equals_single_and_transpose_commutes(function):
    M = matrix("gaussian", 60, 20).reshape(2, 3, 10, 20)
    batch = function(M)
    torch.testing.assert_close(batch[1, 2], function(M[1, 2]), rtol=0, atol=1e-12)
    torch.testing.assert_close(batch.mT, function(M.mT), rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", [newton_schulz, polar_express])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_awkward_inputs(function, dtype):
    row = torch.tensor([[3.0, 4.0, 0.0]], dtype=dtype)
    unit = function(row)
    assert unit.dtype == dtype
    assert 0.65 < torch.linalg.vector_norm(unit.float()).item() < 1.2
    assert torch.equal(function(torch.zeros(2, 3, 4, dtype=dtype)), torch.zeros(2, 3, 4, dtype=dtype))
    assert function(torch.zeros(0, 3, dtype=dtype)).shape == (0, 3)
    largest = torch.full((4, 4), 3e4, dtype=dtype)  # its Frobenius norm overflows float16
    assert torch.isfinite(function(largest)).all()
    assert torch.linalg.matrix_norm(function(torch.full((4, 4), 1e-30)), 2) < 1.2


def test_input_is_left_alone_and_refusals_carry_the_value():
    M = matrix("gaussian", 8, 8)
    before = M.clone()
    newton_schulz(M)
    assert torch.equal(M, before)
    with pytest.raises(ValueError, match="steps=0"):
        newton_schulz(M, steps=0)
    with pytest.raises(ValueError, match=r"\(8,\)"):
        polar_express(M[0])
    with pytest.raises(ValueError, match="int64"):
        polar_express(torch.ones(2, 2, dtype=torch.int64))


def test_fast_dtype_never_narrows_float64():
    assert fast_dtype(torch.zeros(1, dtype=torch.float64)) == torch.float64
    assert fast_dtype(torch.zeros(1, dtype=torch.bfloat16)) in (torch.float32, torch.bfloat16)

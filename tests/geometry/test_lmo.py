"""Oracles and dual norms against brute force: SVD, enumeration of vertices, random feasible points."""

import itertools
import math

import pytest
import torch

from evolute.geometry import dual_norm, lmo, nuclear_norm
from evolute.geometry.norms.lmo import batched_dual_norms, batched_lmo

NORM_OF = {
    "spectral": lambda O: torch.linalg.matrix_norm(O, 2),
    "sign": lambda O: O.abs().max(),
    "rms": lambda O: O.square().mean().sqrt(),
}


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("norm", NORM_OF)
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_lmo_is_feasible_attains_the_dual_norm_and_no_random_point_beats_it(norm, shape):
    M = gaussian(*shape)
    best = lmo(M, norm)
    assert NORM_OF[norm](best).item() == pytest.approx(1.0, abs=1e-12)
    assert (M * best).sum().item() == pytest.approx(-dual_norm(M, norm).item(), rel=1e-12)
    for O in gaussian(2000, *shape, seed=1):
        assert (M * O).sum() / NORM_OF[norm](O) >= (M * best).sum() - 1e-12


@pytest.mark.parametrize("norm", NORM_OF)
def test_projected_gradient_descent_ends_at_the_lmo_value(norm):
    M = gaussian(4, 3)
    O = gaussian(4, 3, seed=2)
    for _ in range(3000):
        O = O - 0.1 * M
        if norm == "spectral":
            U, S, Vh = torch.linalg.svd(O, full_matrices=False)
            O = (U * S.clamp(max=1)) @ Vh
        else:
            O = O.clamp(-1, 1) if norm == "sign" else O / max(1.0, NORM_OF["rms"](O).item())
    assert (M * O).sum().item() == pytest.approx((M * lmo(M, norm)).sum().item(), rel=1e-4)


def test_sign_lmo_against_all_vertices():
    M = gaussian(3, 4)
    values = [
        sum(s * m for s, m in zip(v, M.flatten().tolist(), strict=True)) for v in itertools.product((-1, 1), repeat=12)
    ]
    assert (M * lmo(M, "sign")).sum().item() == pytest.approx(min(values), rel=1e-12)


def test_spectral_lmo_of_a_batch_is_that_of_each_matrix_and_a_minimiser_at_deficient_rank():
    M = gaussian(2, 3, 6, 4)
    M[0, 0] = torch.outer(M[0, 0, :, 0], M[0, 0, 0])
    U, _, Vh = torch.linalg.svd(M[1, 2], full_matrices=False)
    torch.testing.assert_close(lmo(M, "spectral")[1, 2], -U @ Vh, rtol=0, atol=1e-12)
    torch.testing.assert_close((M * lmo(M, "spectral")).sum((-1, -2)), -torch.linalg.matrix_norm(M, "nuc"))
    assert dual_norm(M, "spectral").shape == (2, 3)


@pytest.mark.parametrize("norm", NORM_OF)
def test_hoelder_homogeneity_and_triangle(norm):
    for seed in range(50):
        A, B = gaussian(4, 6, seed=seed), gaussian(4, 6, seed=seed + 100)
        assert (A * B).sum().abs() <= NORM_OF[norm](A) * dual_norm(B, norm) * (1 + 1e-12)
        assert dual_norm(A + B, norm) <= dual_norm(A, norm) + dual_norm(B, norm) + 1e-12
        assert dual_norm(-3 * A, norm).item() == pytest.approx(3 * dual_norm(A, norm).item())


def test_nuclear_norm_is_unitarily_invariant():
    M = gaussian(5, 5)
    Q = torch.linalg.qr(gaussian(5, 5, seed=3)).Q
    assert nuclear_norm(Q @ M).item() == pytest.approx(nuclear_norm(M).item())


def test_scaled_forms_bound_the_layers_output():
    """The unit ball of the scaled norm: RMS inputs of 1 give RMS outputs (spectral) or entries (sign) of at most 1."""
    M = gaussian(8, 4)
    spectral, sign = lmo(M, "spectral", scaled=True), lmo(M, "sign", scaled=True)
    x = torch.linalg.svd(spectral).Vh[0] * math.sqrt(4)  # RMS 1, the most amplified direction
    assert (spectral @ x).square().mean().sqrt().item() == pytest.approx(1.0)
    assert (sign @ torch.sign(sign[0])).abs().max().item() == pytest.approx(1.0)
    for norm in NORM_OF:
        assert (M * lmo(M, norm, scaled=True)).sum().item() == pytest.approx(-dual_norm(M, norm, scaled=True).item())


@pytest.mark.parametrize("norm", NORM_OF)
@pytest.mark.parametrize("method", ["svd", "newton_schulz", "polar_express"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_gives_zero(norm, method, dtype):
    M = torch.zeros(2, 3, 4, dtype=dtype)
    assert torch.equal(lmo(M, norm, method), M)
    assert not dual_norm(M, norm, method).any()
    assert dual_norm(M, norm, method).dtype == torch.float32


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("method", ["svd", "newton_schulz"])
def test_batched_forms_equal_the_single_ones(method, scaled):
    shapes = {(3, 5): "spectral", (5, 3): "spectral", (4, 4): "spectral", (7,): "rms", (6, 2): "sign"}
    tensors = [gaussian(*shape, seed=i) for i, shape in enumerate(shapes)] + [
        gaussian(3, 5, seed=9),
        gaussian(4, 2, 3, 3),
    ]
    norms = [*shapes.values(), "spectral", "spectral"]
    flat = [t.flatten(1) if t.ndim > 2 else t for t in tensors]
    for t, O, M, norm in zip(tensors, batched_lmo(tensors, norms, method), flat, norms, strict=True):
        torch.testing.assert_close(O, lmo(M, norm, method).reshape(t.shape), rtol=0, atol=1e-12)
    want = torch.stack([dual_norm(M, norm, method, scaled) for M, norm in zip(flat, norms, strict=True)])
    torch.testing.assert_close(batched_dual_norms(tensors, norms, method, scaled), want, rtol=1e-12, atol=0)


def test_refusals_carry_the_value():
    with pytest.raises(ValueError, match="'frobenius'"):
        lmo(torch.ones(2, 2), "frobenius")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'qr'"):
        dual_norm(torch.ones(2, 2), "spectral", "qr")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(3,\)"):
        lmo(torch.ones(3), "spectral")
    with pytest.raises(ValueError, match="2 tensors but 1 norms"):
        batched_lmo([torch.ones(2, 2)] * 2, ["sign"])

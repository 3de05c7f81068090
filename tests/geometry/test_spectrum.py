"""Quadrature of spectra against dense eigenvalues, where it is exact and where it is an estimate."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evolute.geometry import Hessian, spectral_density
from evolute.geometry.curvature.trace import random_signs
from tests.geometry.networks import convnet


def rotated(values, seed=0):
    generator = torch.Generator().manual_seed(100 + seed)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))
    return (basis * values) @ basis.T


def outlying(size=400):
    """Three outliers over a narrow bulk, a tail below zero."""
    generator = torch.Generator().manual_seed(1)
    bulk = 0.02 * torch.randn(size - 13, dtype=torch.float64, generator=generator).clamp(-3, 3)
    return torch.cat([torch.tensor([10.0, 8, 7]).double(), -torch.linspace(0.5, 1, 10).double(), bulk])


def test_each_probe_has_the_exact_moments_up_to_twice_its_steps():
    matrix = rotated(torch.linspace(-1, 2, 60, dtype=torch.float64))
    found = spectral_density(matrix, probes=3, steps=5)
    source = torch.Generator().manual_seed(0)
    for nodes, weights in zip(found.nodes, found.weights, strict=True):
        z = random_signs(matrix, source)
        for power in range(10):
            exact = z @ torch.linalg.matrix_power(matrix, power) @ z / 60
            assert (weights * nodes**power).sum().item() == pytest.approx(exact.item(), rel=1e-10)
    assert found.products == 15
    assert found.size == 60
    assert found.moment(2)[0].item() == pytest.approx((found.weights * found.nodes**2).sum().item() / 3)


def test_multiplicities_are_the_masses_and_error_bars_vanish_where_every_probe_agrees():
    values = torch.tensor([3.0] * 5 + [-1.0] * 15 + [0.0] * 80, dtype=torch.float64)
    found = spectral_density(torch.diag(values), probes=4, steps=10)  # signs weigh the entries of a diagonal alike
    assert found.products == 12  # three distinct eigenvalues: each probe is exhausted after three products
    for value, mass in ((3.0, 0.05), (-1.0, 0.15), (0.0, 0.8)):
        share, error = found.mass(value - 1e-9, value + 1e-9)
        assert share.item() == pytest.approx(mass, abs=1e-12)
        assert error.item() < 1e-12
    assert found.near_zero_mass()[0].item() == pytest.approx(0.8)
    assert found.negative_mass()[0].item() == pytest.approx(0.15)
    assert (found.largest.item(), found.smallest.item()) == pytest.approx((3.0, -1.0))
    assert torch.trapezoid(found.density, found.grid).item() == pytest.approx(1.0, abs=1e-3)
    assert found.stderr.max() < 1e-9 * found.density.max()
    spread = spectral_density(rotated(values), probes=4, steps=10)
    assert spread.mass(2.9, 3.1)[1] > 1e-3  # in another basis the probes differ, and say so


def test_low_rank_operators_end_early_and_lose_nothing():
    values = torch.cat([torch.tensor([4.0, 2.0, 1.0, -3.0]), torch.zeros(96)]).double()
    found = spectral_density(rotated(values), probes=6, steps=30)
    assert found.products <= 36  # rank and the null space: five products a probe, one more where rounding hides it
    torch.testing.assert_close(found.weights.sum(dim=1), torch.ones(6).double())
    for value in (-3.0, 0, 1, 2, 4):
        expected = 0.96 if value == 0 else 0.01
        share, error = found.mass(value - 1e-9, value + 1e-9)
        assert abs(share - expected) < 4 * error
    assert found.mass(-10, -3.01)[0] == 0
    nothing = spectral_density(torch.zeros(5, 5), probes=2, steps=3)
    assert torch.equal(nothing.nodes, torch.zeros(2, 3).double())
    assert torch.trapezoid(nothing.density, nothing.grid).item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_distribution_is_that_of_the_dense_spectrum(dtype):
    values = torch.cat([torch.linspace(0, 1, 300), torch.linspace(2, 2.5, 100)]).double()
    found = spectral_density(rotated(values).to(dtype), probes=16, steps=40)
    x = torch.linspace(-0.5, 3, 2000, dtype=torch.float64)
    true = (values.unsqueeze(0) <= x.unsqueeze(1)).double().mean(dim=1)
    distance = torch.trapezoid((found.cdf(x) - true).abs(), x)
    assert distance < 0.04  # Wasserstein; the mass of the second part, if misplaced, would cost 0.3
    assert torch.trapezoid(found.density, found.grid).item() == pytest.approx(1.0, abs=1e-3)
    share, error = found.mass(1.5, 3)
    assert abs(share - 0.25) < 4 * error
    assert 0 < error < 0.05
    assert found.density.dtype == torch.float64
    for power in (1, 2, 3):
        mean, error = found.moment(power)
        assert abs(mean - (values**power).mean()) < 4 * error


def test_error_bars_shrink_with_the_root_of_the_probes_and_cover_the_truth():
    matrix = rotated(torch.linspace(0, 1, 120, dtype=torch.float64))
    few, many = spectral_density(matrix, 8, 20), spectral_density(matrix, 128, 20)
    assert many.mass(0, 0.4)[1] / few.mass(0, 0.4)[1] == pytest.approx(0.25, rel=0.5)
    assert abs(many.moment(1)[0] - 0.5) < 3 * many.moment(1)[1]
    assert many.stderr.mean() < 0.5 * few.stderr.mean()
    assert spectral_density(matrix, 1, 20).stderr.isnan().all()


def test_bulk_outliers_and_masses_are_told_apart():
    values = outlying()
    found = spectral_density(rotated(values), probes=8, steps=48)
    assert 0.02 < found.bulk_edge() < 0.2
    # Nodes are where mass is: the quantile sits at the last one of the bulk or in the gap beyond it.
    assert 0.02 < found.bulk_edge(classes=2) <= 7.1
    torch.testing.assert_close(found.outliers(), torch.tensor([10.0, 8, 7]).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.outliers(edge=6.5), torch.tensor([10.0, 8, 7]).double(), rtol=1e-6, atol=0)
    assert len(found.outliers(edge=11.0)) == 0
    share, error = found.negative_mass(relative=0.01)
    assert abs(share - 10 / 400) < 4 * error
    assert found.near_zero_mass(relative=0.01)[0] > 0.9
    assert found.smallest.item() == pytest.approx(-1.0, abs=0.02)


def test_a_network_of_several_layers():
    problem = convnet()
    dense = torch.linalg.eigvalsh(problem.dense_hessian())
    with Hessian(problem.loss, problem.params) as H:
        found = spectral_density(H, probes=8, steps=32)
        assert H.products == found.products == 256
    assert found.largest.item() == pytest.approx(dense.max().item(), rel=1e-6)
    assert found.smallest.item() == pytest.approx(dense.min().item(), rel=1e-4)
    x = torch.linspace(dense.min().item(), dense.max().item(), 4000, dtype=torch.float64)
    true = (dense.unsqueeze(0) <= x.unsqueeze(1)).double().mean(dim=1)
    assert torch.trapezoid((found.cdf(x) - true).abs(), x) < 0.02 * dense.max()


@pytest.mark.parametrize("classes", [4, 6, 8])
@pytest.mark.parametrize("width", [16, 48])
def test_a_trained_classifier_has_about_as_many_outliers_as_classes_whatever_its_width(classes, width):
    torch.manual_seed(0)
    centres = torch.linalg.qr(torch.randn(16, classes, dtype=torch.float64))[0].T
    y = torch.arange(classes).repeat_interleave(40)
    x = centres[y] + 0.1 * torch.randn(len(y), 16, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, classes)).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    with Hessian(lambda: F.cross_entropy(net(x), y), dict(net.named_parameters())) as H:
        found = spectral_density(H, probes=4, steps=40)
    assert classes - 1 <= len(found.outliers()) <= classes


def test_random_numbers_are_private_and_nonsense_is_refused():
    matrix = rotated(outlying(60))
    state = torch.get_rng_state()
    assert torch.equal(spectral_density(matrix, 2, 8).density, spectral_density(matrix, 2, 8).density)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="probes=0"):
        spectral_density(matrix, 0)
    with pytest.raises(ValueError, match="steps=0"):
        spectral_density(matrix, 2, 0)
    matrix[2, 3] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        spectral_density(matrix, 2, 8)
    flat = spectral_density(torch.diag(torch.linspace(1, 2, 20)), 2, 8)
    with pytest.raises(ValueError, match="pass classes"):
        flat.bulk_edge()
    with pytest.raises(ValueError, match="classes=10"):
        flat.bulk_edge(classes=10)

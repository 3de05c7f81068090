"""Ratios by hand-computed limits and invariances, the running mean by its closed form and by Monte Carlo."""

import pytest
import torch

from evolute.geometry import dual_norm, noise_ema, noise_ratios

H = torch.tensor([4.0, 0.25, 9.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0, "auto"])
@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_paper_form(alpha, power):
    level = float(H.median()) ** 0.5 if alpha == "auto" else alpha
    a = level / torch.sqrt(level**2 + H)
    torch.testing.assert_close(noise_ratios(H, alpha, power), (a / a.max()) ** power, rtol=1e-12, atol=0)


@pytest.mark.parametrize("alpha", [1e-30, 1e-3, 1.0, 1e6, "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_0_1_with_exactly_1_at_the_least_noisy(alpha, dtype):
    for seed in range(20):
        noise = torch.rand(7, generator=torch.Generator().manual_seed(seed), dtype=dtype) ** 4
        ratios = noise_ratios(noise, alpha)
        assert ((ratios > 0) & (ratios <= 1)).all()
        assert ratios.max().item() == 1.0
        assert ratios[noise.argmin()].item() == 1.0
        assert (ratios[noise.argsort()].diff() <= 0).all()  # the noisier the slower
        order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(noise_ratios(noise[order], alpha), ratios[order])


def test_limits():
    torch.testing.assert_close(noise_ratios(H, 1e8), torch.ones(4).double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(noise_ratios(H, 1e-8, 0.5), (0.25 / H) ** 0.25)
    assert torch.equal(noise_ratios(H, 1.0, power=0.0), torch.ones(4).double())
    assert torch.equal(noise_ratios(torch.full((5,), 0.3), "auto"), torch.ones(5))
    for alpha in (1.0, "auto"):
        assert torch.equal(noise_ratios(torch.zeros(3), alpha), torch.ones(3))
        assert noise_ratios(torch.tensor([7.0]), alpha).tolist() == [1.0]
        assert noise_ratios(torch.zeros(0), alpha).shape == (0,)
    mostly_silent = noise_ratios(torch.tensor([0.0, 0.0, 0.0, 1.0]), "auto")
    assert mostly_silent[:3].tolist() == [1.0] * 3
    assert mostly_silent[3].item() == pytest.approx(0.5**0.25)


@pytest.mark.parametrize("c", [1e-4, 1e-2, 1e2, 1e4])
def test_scale_of_the_gradients(c):
    torch.testing.assert_close(noise_ratios(c * c * H, "auto"), noise_ratios(H, "auto"))
    torch.testing.assert_close(noise_ratios(c * c * H, c * 0.7), noise_ratios(H, 0.7))
    assert not torch.allclose(noise_ratios(c * c * H, 0.7), noise_ratios(H, 0.7), rtol=1e-3)


def test_ema_closed_form_and_memory_in_steps():
    sample = torch.tensor([2.0, 5.0], dtype=torch.float64)
    mean = torch.zeros(2, dtype=torch.float64)
    for _ in range(7):
        mean = noise_ema(mean, sample, decay=0.9)
    torch.testing.assert_close(mean, sample * (1 - 0.9**7))
    rare = noise_ema(torch.zeros_like(sample), sample, decay=0.9, every=7)
    torch.testing.assert_close(rare, mean)  # one sample in seven steps weighs what seven equal ones do
    assert torch.equal(noise_ema(mean, sample, decay=0.0), sample)


def test_consecutive_differences_hold_twice_the_noise_and_split_batches_once():
    g = torch.Generator().manual_seed(0)
    drawn = 1.0 + torch.randn(4000, 6, 4, generator=g, dtype=torch.float64)
    noise = dual_norm(drawn - 1.0, "spectral").square().mean()
    consecutive = dual_norm(drawn[1:] - drawn[:-1], "spectral").square().mean()
    assert (consecutive / noise).item() == pytest.approx(2.0, rel=0.03)
    A, B = drawn[::2], drawn[1::2]
    half_difference = dual_norm((A - B) / 2, "spectral").square().mean()
    batch_mean = dual_norm((A + B) / 2 - 1.0, "spectral").square().mean()
    assert (half_difference / batch_mean).item() == pytest.approx(1.0, rel=0.03)


def test_nan_stays_nan():
    assert noise_ratios(torch.tensor([1.0, torch.nan]), 1.0).isnan()[1]


@pytest.mark.parametrize(
    ("call", "value"),
    [
        (lambda: noise_ratios(H, 0.0), "alpha=0.0"),
        (lambda: noise_ratios(H, -1.0), "alpha=-1.0"),
        (lambda: noise_ratios(H, float("nan")), "alpha=nan"),
        (lambda: noise_ratios(H, "median"), "alpha='median'"),
        (lambda: noise_ratios(H, 1.0, -0.5), "power=-0.5"),
        (lambda: noise_ratios(H[None], 1.0), r"\(1, 4\)"),
        (lambda: noise_ema(H, H, decay=1.0), "decay=1.0"),
        (lambda: noise_ema(H, H, every=0), "every=0"),
        (lambda: noise_ema(H, H[:2]), r"\(2,\)"),
    ],
)
def test_refusals_carry_the_value(call, value):
    with pytest.raises(ValueError, match=value):
        call()

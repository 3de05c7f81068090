"""The estimates are unbiased: checked on gradients whose mean and covariance are known."""

import pytest
import torch

from evolute.geometry import gradient_noise_scale, pair_signal


def test_exact_on_expected_norms():
    grad_sq, trace = torch.tensor(3.0, dtype=torch.float64), torch.tensor(70.0, dtype=torch.float64)
    found = gradient_noise_scale(grad_sq + trace / 4, grad_sq + trace / 64, 4, 64)
    torch.testing.assert_close(torch.stack(list(found)), torch.stack([grad_sq, trace, trace / grad_sq]))


def test_unbiased_on_samples():
    torch.manual_seed(0)
    mean, scale = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.5
    samples = mean + scale * torch.randn(20000, 8, 5, dtype=torch.float64)  # a trial is 8 samples in pairs of 2
    small = samples.view(20000, 4, 2, 5).mean(dim=2).square().sum(dim=2).mean(dim=1)
    big = samples.mean(dim=1).square().sum(dim=1)
    found = gradient_noise_scale(small, big, 2, 8)
    error = lambda x: 4 * x.std().item() / 20000**0.5  # noqa: E731
    assert found.grad_sq.mean().item() == pytest.approx(mean.square().sum().item(), abs=error(found.grad_sq))
    assert found.trace.mean().item() == pytest.approx(scale.square().sum().item(), abs=error(found.trace))


@pytest.mark.parametrize(("small", "big"), [(4, 4), (8, 4), (0, 4)])
def test_batches_must_differ(small, big):
    with pytest.raises(ValueError, match=f"small_batch={small}, big_batch={big}"):
        gradient_noise_scale(torch.ones(()), torch.ones(()), small, big)


def test_a_pair_of_estimates_tells_signal_from_noise():
    generator = torch.Generator().manual_seed(0)
    true = [torch.randn(30, 4, generator=generator).double(), torch.zeros(50).double()]
    noise = (0.5, 2.0)
    signals, distances = [], []
    for _ in range(400):
        a, b = (
            [g + s * torch.randn(g.shape, generator=generator).double() for g, s in zip(true, noise, strict=True)]
            for _ in range(2)
        )
        signal, distance = pair_signal(a, b)
        signals.append(signal)
        distances.append(distance)
    assert torch.stack(signals).mean(0).tolist() == pytest.approx([float(true[0].square().sum()), 0.0], rel=0.01, abs=2)
    assert torch.stack(distances).mean(0).tolist() == pytest.approx([2 * 0.25 * 120, 2 * 4.0 * 50], rel=0.03)

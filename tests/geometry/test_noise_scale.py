"""The estimates are unbiased: checked on gradients whose mean and covariance are known."""

import pytest
import torch

from evolute.geometry import gradient_noise_scale


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

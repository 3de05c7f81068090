"""Each threshold against torch's own optimizer on a quadratic, just below and just above it."""

import pytest
import torch

from evolute.geometry import adam_threshold, gd_threshold, heavy_ball_threshold, nesterov_threshold

LR = 0.1


def grows(step, steps=2000):
    """Tell whether ``|x|`` after ``step`` grows in the long run; early steps may overshoot on either side."""
    sizes = [abs(step()) for _ in range(steps)]
    return max(sizes[-20:]) > max(sizes[steps // 2 : steps // 2 + 20])


def descending(make, curvature):
    """Return a step of the optimizer on ``curvature x^2 / 2`` from ``x = 1``."""
    x = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = make([x])

    def step():
        x.grad = curvature * x.detach()
        optimizer.step()
        return x.item()

    return step


def sgd(**kwargs):
    return lambda params: torch.optim.SGD(params, lr=LR, **kwargs)


CASES = [
    (gd_threshold(LR), sgd()),
    *[(heavy_ball_threshold(LR, b), sgd(momentum=b)) for b in (0.5, 0.9, 0.99)],
    *[(heavy_ball_threshold(LR, b, d), sgd(momentum=b, dampening=d)) for b, d in ((0.9, 0.9), (0.5, 0.5), (0.9, 0.3))],
    *[(nesterov_threshold(LR, b), sgd(momentum=b, nesterov=True)) for b in (0.5, 0.9, 0.99)],
]


@pytest.mark.parametrize(("threshold", "make"), CASES)
def test_divergence_starts_at_the_threshold(threshold, make):
    assert not grows(descending(make, 0.98 * threshold))
    assert grows(descending(make, 1.02 * threshold))


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 2.0])
def test_adam_whose_second_moment_stands_still(beta1, weight_decay):
    root = 0.5  # the square root of the corrected second moment

    def adam_at(sharpness):
        x = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = torch.optim.AdamW([x], lr=LR, betas=(beta1, 0.5), weight_decay=weight_decay)
        x.grad = torch.zeros_like(x)
        optimizer.step()  # creates the state
        x.data.fill_(1e-12)
        state = optimizer.state[x]
        state["step"].fill_(1000)  # past the bias correction of the first moment, which is P's prefactor

        def step():
            x.grad = sharpness * (root + 1e-8) * x.detach()
            # Solve v <- 0.5 v + 0.5 g^2 for the v that makes the corrected second moment root^2 after this step.
            target = root**2 * (1 - 0.5 ** (state["step"].item() + 1))
            state["exp_avg_sq"].copy_(2 * (target - 0.5 * x.grad**2))
            optimizer.step()
            return x.item()

        return step

    threshold = adam_threshold(LR, beta1, weight_decay)
    # Few steps from a small x: the cancellation above is exact only while g^2 is far below 1e16.
    assert not grows(adam_at(0.98 * threshold), steps=100)
    assert grows(adam_at(1.02 * threshold), steps=100)


def test_numbers_that_are_often_quoted():
    assert adam_threshold(0.01, 0.9) == pytest.approx(3800)
    assert gd_threshold(0.01) == pytest.approx(200)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gd_threshold(0.0), "lr=0.0"),
        (lambda: heavy_ball_threshold(0.1, 1.0), "momentum=1.0"),
        (lambda: heavy_ball_threshold(0.1, 0.9, 1.0), "dampening=1.0"),
        (lambda: nesterov_threshold(0.1, -0.1), "momentum=-0.1"),
        (lambda: adam_threshold(0.1, 0.9, 10.0), "decay_per_step=1.0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()

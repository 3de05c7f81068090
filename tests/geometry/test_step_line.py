"""Local models along a step, on functions whose answer is known in closed form."""

import math

import pytest
import torch

from evolute.geometry import critical_step, model_agreement, smoothness_ratio


def counted(function):
    calls: list[float] = []

    def loss(s):
        calls.append(s)
        return function(s)

    return loss, calls


@pytest.mark.parametrize("crossing", [0.03, 0.7, 1.0, 1.5, 9.0, 100.0])
def test_the_crossing_of_a_parabola_is_bracketed_and_told_to_its_error(crossing):
    """A loss of slope -1 and curvature 2 / c along a step is back where it began at c."""
    loss, calls = counted(lambda s: 3.0 - s + s**2 / crossing)
    found = critical_step(loss, evaluations=30, tol=0.01)
    assert found.found
    assert found.low <= crossing <= found.high
    assert abs(found.step / crossing - 1) <= found.error <= 0.01
    assert found.evaluations == len(calls) == len(set(calls))


@pytest.mark.parametrize("start", [0.6, 1.0, 1.9])
def test_a_start_within_a_factor_of_two_needs_seven_forward_passes(start):
    found = critical_step(lambda s: s * (s - 1.1), start=start)
    assert found.evaluations <= 7
    assert abs(found.step / 1.1 - 1) <= found.error <= 0.05


def test_it_never_takes_more_than_it_may():
    loss, calls = counted(lambda s: s * (s - 50.0))
    found = critical_step(loss, evaluations=8)
    assert len(calls) == 8
    assert (found.low, found.high) == (32.0, 64.0)
    assert found.error == pytest.approx(math.sqrt(2) - 1)


def test_an_update_that_never_or_always_raises_the_loss_has_no_crossing():
    rising = critical_step(lambda s: s)
    assert (rising.found, rising.step, rising.low, rising.high) == (False, 0.0, 0.0, 2.0**-6)
    falling = critical_step(lambda s: -s)
    assert (falling.found, falling.step, falling.low, falling.high) == (False, math.inf, 64.0, math.inf)
    assert math.isinf(falling.error)


def test_losses_that_are_not_finite_count_as_raised_and_such_an_origin_as_unknown():
    found = critical_step(lambda s: -s if s < 3 else float("nan"), evaluations=30, tol=1e-3)
    assert found.step == pytest.approx(3.0, rel=2e-3)
    assert critical_step(lambda s: float("nan")).evaluations == 1
    assert not critical_step(lambda s: float("inf") if s == 0 else 0.0).found


@pytest.mark.parametrize("bad", [{"start": 0.0}, {"tol": 0.0}, {"evaluations": 2}])
def test_arguments_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad)))):
        critical_step(lambda s: s, **bad)


def test_agreement_and_smoothness_of_a_cubic_by_hand():
    """x^3 / 6 from 1 to 2: gradient x^2 / 2, curvature x."""
    p, g0, g, curvature = (torch.tensor([v], dtype=torch.float64) for v in (1.0, 0.5, 2.0, 2.0))
    change = torch.tensor(8 / 6 - 1 / 6, dtype=torch.float64)
    agreed = model_agreement(change, g @ p, p @ (curvature * p))
    assert agreed.item() == pytest.approx((7 / 6) / (2 - 1), rel=1e-15)
    # The gradient rose by 1.5, the curvature at the end says 2.
    assert smoothness_ratio(g, g0, curvature * p).item() == pytest.approx(0.5 / 2.0, rel=1e-15)


def test_quadratics_agree_with_their_model():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    A, (x, p) = A + A.T, torch.randn(2, 6, generator=generator, dtype=torch.float64)
    y = x + p
    change = 0.5 * (y @ A @ y - x @ A @ x)
    assert model_agreement(change, A @ y @ p, p @ A @ p).item() == pytest.approx(1.0, rel=1e-12)
    assert smoothness_ratio(A @ y, A @ x, A @ p).item() < 1e-14

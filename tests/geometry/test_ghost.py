"""The ghost bound against the true zeros of the partition sum, and the estimators against each other."""

import math

import numpy as np
import pytest
import torch
from torch.func import functional_call

from evolute.geometry import (
    binary_ghost_radius,
    binary_spread,
    directional_logits,
    ghost_radius,
    ghost_ratio,
    head_spread,
    logit_spread,
    recomputed_spread,
    secant_spread,
)
from tests.geometry.networks import transformer


def nearest_zero(weights, slopes):
    """Distance from 0 to the nearest zero of ``sum_k w_k exp(a_k t)`` for integer slopes: logs of polynomial roots."""
    coefficients = np.zeros(slopes.max() - slopes.min() + 1)
    np.add.at(coefficients, slopes - slopes.min(), weights)
    roots = np.roots(coefficients[::-1]).astype(complex)
    # log has the imaginary part in (-pi, pi], where the nearest of its branches lies.
    return np.abs(np.log(roots[np.abs(roots) > 1e-12])).min()


@pytest.mark.parametrize("classes", [3, 10, 50])
def test_no_zero_lies_inside_the_radius(classes):
    random = np.random.default_rng(classes)
    ratios = []
    for _ in range(100):
        slopes = random.integers(-8, 9, classes)
        if slopes.max() == slopes.min():
            continue
        logits = random.normal(0, random.choice([0.3, 2.0]), classes)
        weights = np.exp(logits - logits.max())
        bound = ghost_radius(torch.tensor(slopes, dtype=torch.float64)[None]).item()
        ratios.append(nearest_zero(weights / weights.sum(), slopes) / bound)
    assert min(ratios) >= 1 - 1e-9
    assert np.median(ratios) < 4  # a bound, and not an idle one


def test_binary_radius_is_the_zero_itself():
    random = np.random.default_rng(0)
    for _ in range(50):
        delta, slope = random.normal(0, 5), int(random.integers(1, 9)) * random.choice([-1, 1])
        weights = np.array([1.0, math.exp(delta)]) / (1 + math.exp(delta))
        exact = nearest_zero(weights, np.array([0, slope]))
        found = binary_ghost_radius(torch.tensor(delta, dtype=torch.float64), torch.tensor(float(slope)).double())
        assert found.item() == pytest.approx(exact, rel=1e-10)


def test_taylor_coefficients_of_a_linear_softmax_grow_at_that_rate():
    # Two classes with delta = 1, slope = 2: log(1 + exp(1 + 2 t)) has the radius of the formula, read off its series.
    radius = binary_ghost_radius(torch.tensor(1.0).double(), torch.tensor(2.0).double()).item()
    n = 4096
    r = 0.97 * radius
    t = r * np.exp(2j * np.pi * np.arange(n) / n)
    coefficients = np.abs(np.fft.fft(np.log1p(np.exp(1 + 2 * t))) / n)[200:260]
    rate = np.max((coefficients / r ** np.arange(200, 260)) ** (1 / np.arange(200, 260)))
    assert 1 / rate == pytest.approx(radius, rel=0.03)


@pytest.fixture
def step():
    problem = transformer()
    torch.manual_seed(0)
    params = {n: p.detach() for n, p in problem.params.items()}
    direction = {n: torch.randn_like(p) for n, p in params.items()}
    length = torch.stack([d.norm() for d in direction.values()]).norm()
    direction = {n: d / length for n, d in direction.items()}
    return params, direction, lambda p: functional_call(problem.module, p, (problem.inputs,))


def test_secant_converges_to_the_jvp_at_first_order(step):
    params, direction, logits = step
    exact = logit_spread(directional_logits(logits, params, direction))
    errors = []
    for tau in (1e-2, 1e-3, 1e-4):
        moved = {n: p + tau * direction[n] for n, p in params.items()}
        errors.append((secant_spread(logits(params), logits(moved)) / tau - exact).abs().max().item())
    assert errors[0] < exact.max()
    assert errors[1] / errors[0] == pytest.approx(0.1, rel=0.1)
    assert errors[2] / errors[1] == pytest.approx(0.1, rel=0.1)


def test_ratio_is_step_over_radius_and_scales_with_the_direction(step):
    params, direction, logits = step
    unit = directional_logits(logits, params, direction)
    tripled = directional_logits(logits, params, {n: 3 * d for n, d in direction.items()})
    assert ghost_ratio(logit_spread(tripled)).item() == pytest.approx((3 / ghost_radius(unit)).item(), rel=1e-12)
    assert ghost_radius(unit / 5).item() == pytest.approx(5 * ghost_radius(unit).item(), rel=1e-12)  # temperature 5
    assert not unit.requires_grad


def test_masks_leave_rows_out():
    change = torch.tensor([[0.0, 1.0], [0.0, 10.0], [3.0, 1.0]])
    keep = torch.tensor([True, False, True])
    assert ghost_radius(change).item() == pytest.approx(math.pi / 10)
    assert ghost_radius(change, keep).item() == pytest.approx(math.pi / 2)
    none = torch.zeros(3, dtype=torch.bool)
    assert ghost_radius(change, none).item() == math.inf
    assert ghost_radius(torch.ones(2, 3)).item() == math.inf
    with pytest.raises(ValueError, match="mask"):
        ghost_ratio(logit_spread(change), none[:2])


@pytest.mark.parametrize("chunk", [1, 7, 33, 34, 1000])
def test_chunks_of_the_vocabulary_change_nothing(chunk):
    torch.manual_seed(0)
    before, after = torch.randn(2, 5, 33, dtype=torch.float64), torch.randn(2, 5, 33, dtype=torch.float64)
    assert torch.equal(secant_spread(before, after, chunk), logit_spread(after - before))
    h0, h1 = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    w0, w1 = torch.randn(33, 4, dtype=torch.float64), torch.randn(33, 4, dtype=torch.float64)
    b0, b1 = torch.randn(33, dtype=torch.float64), torch.randn(33, dtype=torch.float64)
    whole = logit_spread(h1 @ w1.T + b1 - h0 @ w0.T - b0)
    torch.testing.assert_close(head_spread(h0, w0, h1, w1, b0, b1, chunk), whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(head_spread(h0, w0, h1, w1, chunk=chunk), logit_spread(h1 @ w1.T - h0 @ w0.T))
    after = h1 @ w1.T + b1
    torch.testing.assert_close(recomputed_spread(h0, w0, after, b0, chunk), whole, rtol=1e-12, atol=0)


def test_binary_spread_is_pi_where_a_step_ends_on_the_exact_radius():
    generator = torch.Generator().manual_seed(4)
    before, slope = torch.randn(2, 20, 2, generator=generator, dtype=torch.float64)
    delta, rate = before.diff(dim=1).flatten(), slope.diff(dim=1).flatten()
    length = binary_ghost_radius(delta, rate)[:, None]
    torch.testing.assert_close(binary_spread(before, before + length * slope), torch.full((20,), math.pi).double())


def test_recomputed_spread_refuses_a_head_that_does_not_fit():
    with pytest.raises(ValueError, match="gives another"):
        recomputed_spread(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, 4))


def test_head_spread_does_not_cancel_in_low_precision():
    torch.manual_seed(0)
    h0, w0 = 30 * torch.randn(4, 16), torch.randn(50, 16)
    h1, w1 = h0 + 1e-4 * torch.randn(4, 16), w0 + 1e-5 * torch.randn(50, 16)
    exact = logit_spread(h1.double() @ w1.double().T - h0.double() @ w0.double().T)
    factored = (head_spread(h0, w0, h1, w1) / exact - 1).abs().max()
    subtracted = (secant_spread(h0 @ w0.T, h1 @ w1.T) / exact - 1).abs().max()
    assert factored < 1e-5 < subtracted


def test_bfloat16_logits_are_subtracted_in_float32():
    before, after = torch.tensor([[20.0, 1.0]]).bfloat16(), torch.tensor([[20.125, 1.0078125]]).bfloat16()
    spread = secant_spread(before, after)
    assert spread.dtype == torch.float32
    assert spread.item() == 0.125 - 0.0078125


def test_refusals():
    with pytest.raises(ValueError, match=r"\(2, 3\) before.*\(2, 4\) after"):
        secant_spread(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="chunk=0"):
        secant_spread(torch.zeros(2, 3), torch.zeros(2, 3), chunk=0)
    with pytest.raises(ValueError, match="one side"):
        head_spread(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(5))
    with pytest.raises(ValueError, match="shapes differ"):
        head_spread(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, 3), torch.zeros(6, 3))
    with pytest.raises(ValueError, match="bias"):
        directional_logits(lambda p: p["w"], {"w": torch.zeros(1)}, {"bias": torch.zeros(1)})

"""CAPO's closed forms against autograd, dense Kronecker forms and a head-only torch Adam, in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from evolute.geometry import (
    ShiftLimits,
    SparseMoments,
    joint_logit_steps,
    logit_steps,
    predicted_shifts,
    score_rest,
    sgd_shifts,
    token_support,
)

N, V, H, LR, TAU, EPS = 6, 11, 7, 0.03, 0.7, 1e-8
CLOSE = {"rtol": 1e-8, "atol": 1e-14}


class Problem:
    """A head W, hidden states, sampled tokens and advantages."""

    def __init__(self, seed: int = 0, n: int = N) -> None:
        g = torch.Generator().manual_seed(seed)
        self.W = torch.randn(V, H, generator=g, dtype=torch.float64)
        self.h = torch.randn(n, H, generator=g, dtype=torch.float64)
        self.a = torch.randint(V, (n,), generator=g)
        self.A = torch.randn(n, generator=g, dtype=torch.float64)
        self.D = 0.1 * torch.randn(n, V, H, generator=g, dtype=torch.float64)
        self.z = self.h @ self.W.T / TAU
        self.p = self.z.softmax(-1)
        self.v = torch.eye(V, dtype=torch.float64)[self.a] - self.p
        self.s = torch.einsum("nvh,nh->nv", self.D, self.h) / TAU

    def log_prob(self, W: Tensor, i: int) -> Tensor:
        return (W @ self.h[i] / TAU).log_softmax(-1)[self.a[i]]

    def pull(self) -> Tensor:
        return self.A.unsqueeze(-1) * self.v / TAU


@pytest.mark.parametrize("seed", range(3))
def test_shifts_equal_the_dense_kronecker_forms(seed):
    x = Problem(seed)
    found = predicted_shifts(x.s, x.p, x.a, x.A)
    for i in range(N):
        u, h, d = x.v[i], x.h[i] / TAU, x.D[i].flatten()
        F = torch.diag(x.p[i]) - torch.outer(x.p[i], x.p[i])
        hh = torch.outer(h, h)
        gradient = x.A[i] * torch.kron(u, h)
        hessian = x.A[i] * torch.kron(torch.outer(u, u) - F, hh)
        fisher = torch.kron(torch.outer(u, u), hh)
        torch.testing.assert_close(found.objective[i], gradient @ d + d @ hessian @ d / 2, **CLOSE)
        torch.testing.assert_close(found.policy[i], d @ fisher @ d / 2, **CLOSE)
        torch.testing.assert_close(found.expected_policy[i], d @ torch.kron(F, hh) @ d / 2, **CLOSE)


def test_gradient_and_curvature_are_those_of_the_ratio_surrogate_by_autograd():
    x = Problem()
    q1 = (x.v * x.s).sum(-1)
    q2 = (x.p * x.s**2).sum(-1) - (x.p * x.s).sum(-1) ** 2
    for i in range(N):
        t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        old = x.log_prob(x.W, i)
        for value, first, second in (
            (x.A[i] * (x.log_prob(x.W + t * x.D[i], i) - old).exp(), q1[i], q1[i] ** 2 - q2[i]),
            (x.A[i] * x.log_prob(x.W + t * x.D[i], i), q1[i], -q2[i]),
        ):
            g = torch.autograd.grad(value, t, create_graph=True)[0]
            torch.testing.assert_close(g.detach(), x.A[i] * first, **CLOSE)
            torch.testing.assert_close(torch.autograd.grad(g, t)[0], x.A[i] * second, **CLOSE)
        W = x.W.clone().requires_grad_()
        G = torch.autograd.grad(x.A[i] * x.log_prob(W, i), W)[0]
        torch.testing.assert_close(G, torch.outer(x.pull()[i], x.h[i]), **CLOSE)


def test_exact_kl_and_surrogate_are_those_of_the_moved_policy():
    x = Problem()
    found = predicted_shifts(x.s, x.p, x.a, x.A)
    moved = (x.z + x.s).log_softmax(-1)
    kl = (x.p * (x.p.log() - moved)).sum(-1)
    ratio = (moved - x.p.log()).gather(-1, x.a.unsqueeze(-1)).squeeze(-1).exp()
    torch.testing.assert_close(found.kl, kl, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(found.exact_objective, x.A * (ratio - 1), **CLOSE)


def test_the_quadratic_models_are_off_by_the_cube_of_the_step():
    x = Problem()
    errors = []
    for scale in (1e-2, 5e-3):
        f = predicted_shifts(scale * x.s, x.p, x.a, x.A)
        errors.append(((f.kl - f.expected_policy).norm(), (f.exact_objective - f.objective).norm()))
    assert [float(a / b) for a, b in zip(*errors, strict=True)] == pytest.approx([8, 8], rel=0.1)


@given(st.integers(0, 10_000), st.floats(-50, 50), st.floats(1e-6, 3))
@hypothesis_settings(max_examples=30, deadline=None)
def test_identities_hold_for_any_step(seed, constant, scale):
    x = Problem(seed)
    s = scale * x.s
    f = predicted_shifts(s, x.p, x.a, x.A)
    assert (f.expected_policy >= 0).all()
    assert (f.kl >= 0).all()
    shifted = predicted_shifts(s + constant, x.p, x.a, x.A)
    rounding = 32 * torch.finfo(s.dtype).eps * abs(constant)  # of s + constant: it does not shrink with s
    for a, b in zip(f, shifted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9 * scale + rounding)
    each = torch.stack([predicted_shifts(s, x.p, torch.full((N,), a), x.A).policy for a in range(V)], dim=-1)
    torch.testing.assert_close((x.p * each).sum(-1), f.expected_policy, **CLOSE)


def test_single_precision_is_enough_for_shifts_of_any_size():
    x = Problem()
    for scale in (1e-6, 1e-4, 1e-2, 1.0):
        wide = predicted_shifts(scale * x.s, x.p, x.a, x.A)
        narrow = predicted_shifts((scale * x.s).float(), x.p.float(), x.a, x.A.float())
        for a, b in zip(wide, narrow, strict=True):
            torch.testing.assert_close(b.double(), a, rtol=1e-4, atol=0)


def test_the_sgd_closed_form_equals_the_generic_path():
    x = Problem()
    s = LR * torch.einsum("nv,nh,nh->nv", x.pull(), x.h, x.h) / TAU
    torch.testing.assert_close(logit_steps(x.h, x.a.new_zeros(N, V), x.pull(), LR, TAU, None, EPS), s, **CLOSE)
    generic = predicted_shifts(s, x.p, x.a, x.A)
    closed = sgd_shifts(*score_rest(x.z, x.a), x.h.square().sum(-1), x.A, LR, TAU)
    for name in ("objective", "policy", "expected_policy"):
        torch.testing.assert_close(getattr(closed, name), getattr(generic, name), **CLOSE)
    assert ((x.v * s).sum(-1) * x.A >= 0).all()  # a step of its own never opposes a token
    linear = LR * (x.pull() ** 2).sum(-1) * x.h.square().sum(-1)
    torch.testing.assert_close(closed.policy, linear**2 / (2 * x.A**2), **CLOSE)


def test_the_sgd_closed_form_does_not_cancel_when_the_policy_is_sure():
    z = torch.zeros(1, V, dtype=torch.float64)
    z[0, 3] = 15.0  # every other token at 3e-7
    a, one = torch.tensor([3]), torch.ones(1, dtype=torch.float64)
    wide = sgd_shifts(*score_rest(z, a), one, one, LR, 1.0)
    narrow = sgd_shifts(*score_rest(z.float(), a), one.float(), one.float(), LR, 1.0)
    for x, y in zip(wide[:3], narrow[:3], strict=True):
        torch.testing.assert_close(y.double(), x, rtol=1e-4, atol=0)


def trained(betas: tuple[float, float], steps: int, seed: int = 5) -> tuple[SparseMoments, torch.optim.Adam, Tensor]:
    """Moments, and the torch Adam of a head that was given the same gradients."""
    moments = SparseMoments(*betas)
    W = torch.zeros(V, H, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([W], lr=LR, betas=betas, eps=EPS)
    for step in range(steps):
        x = Problem(seed + step, n=2)
        ids = torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5 + step % 5]])
        pull = x.pull().gather(-1, ids)
        rows, counts = torch.zeros(V, H, dtype=torch.float64), torch.zeros(V, 1, dtype=torch.float64)
        for i in range(2):
            rows[ids[i]] += pull[i].unsqueeze(-1) * x.h[i]
            counts[ids[i]] += 1
        moments.update(x.h, ids, pull)
        W.grad = -rows / counts.clamp(min=1)
        adam.step()
    return moments, adam, W


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.3), (0.0, 0.99)])
@pytest.mark.parametrize("steps", [1, 4, 300])
def test_moments_are_those_of_a_head_only_adam_after_any_number_of_steps(betas, steps):
    moments, adam, W = trained(betas, steps)
    first, second = moments.dense(V)
    torch.testing.assert_close(first, -adam.state[W]["exp_avg"], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(second, adam.state[W]["exp_avg_sq"], rtol=1e-8, atol=1e-12)
    assert moments.step == steps


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.3)])
def test_adam_steps_equal_those_of_a_head_only_torch_adam(betas):
    moments, adam, _ = trained(betas, 7)
    x = Problem(1)
    found = logit_steps(x.h, torch.arange(V).expand(N, V), x.pull(), LR, TAU, moments, EPS)
    state = adam.state_dict()
    for i in range(N):
        W = x.W.clone().requires_grad_()
        alone = torch.optim.Adam([W], lr=LR, betas=betas, eps=EPS)
        alone.load_state_dict({**state, "state": {0: {k: v.clone() for k, v in state["state"][0].items()}}})
        W.grad = torch.autograd.grad(-x.A[i] * x.log_prob(W, i), W)[0]
        alone.step()
        torch.testing.assert_close(found[i], (W - x.W).detach() @ x.h[i] / TAU, **CLOSE)


def test_without_decay_and_damping_adam_is_a_step_of_signs():
    moments = SparseMoments(0.0, 0.0)
    moments.update(
        *(t.double() if t.is_floating_point() else t for t in (torch.ones(1, H), torch.tensor([[0]]), torch.ones(1, 1)))
    )
    x = Problem()
    found = logit_steps(x.h, torch.arange(V).expand(N, V), x.pull(), LR, TAU, moments, 0.0)
    torch.testing.assert_close(found, LR / TAU * x.pull().sign() * x.h.abs().sum(-1, keepdim=True), **CLOSE)


@pytest.mark.parametrize("adam", [True, False])
def test_a_joint_step_equals_the_dense_one(adam):
    moments = trained((0.9, 0.99), 4)[0] if adam else None
    x = Problem(2)
    support = token_support(x.z, x.a, 4)
    pull = x.A.unsqueeze(-1) * support.score() / TAU
    G = torch.zeros(V, H, dtype=torch.float64)
    for i in range(N):
        G[support.ids[i]] += torch.outer(pull[i], x.h[i]) / N
    D = LR * G
    if moments is not None:
        M, Q = moments.dense(V)
        one, two = moments.bias_corrections()
        D = LR * ((0.9 * M + 0.1 * G) / one) / (((0.99 * Q + 0.01 * G**2) / two).sqrt() + EPS)
    found = joint_logit_steps(x.h, support.ids, pull, LR, TAU, moments, EPS)
    torch.testing.assert_close(found, (x.h @ D.T / TAU).gather(-1, support.ids), **CLOSE)


def test_a_group_of_one_token_is_that_token():
    moments = trained((0.9, 0.99), 4)[0]
    x = Problem(2, n=1)
    ids = torch.arange(V).unsqueeze(0)
    arguments = (x.h, ids, x.pull(), LR, TAU, moments, EPS)
    torch.testing.assert_close(joint_logit_steps(*arguments), logit_steps(*arguments), **CLOSE)


def test_a_state_brought_back_goes_on_as_if_nothing_happened():
    moments, _, _ = trained((0.9, 0.999), 5)
    again = SparseMoments()
    again.load_state_dict(moments.state_dict())
    x = Problem(9)
    for held in (moments, again):
        held.update(x.h, torch.arange(V).expand(N, V), x.pull())
    assert all(torch.equal(a, b) for a, b in zip(moments.dense(V), again.dense(V), strict=True))
    assert len(again) == len(moments) == V


def test_rows_touched_longest_ago_give_way():
    moments = SparseMoments(max_rows=3)
    h, one = torch.ones(1, H, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    for ids in ([0, 1], [1, 2], [3, 4]):
        moments.update(h, torch.tensor([ids]), one)
    rows = moments.dense(V)[0].any(-1).nonzero().flatten().tolist()
    assert len(moments) == 3
    assert set(rows) >= {3, 4}
    assert 0 not in rows
    moments.update(h, torch.tensor([[5, 6, 7, 8, 9]]), torch.ones(1, 5, dtype=torch.float64))
    assert len(moments) == 3
    with pytest.raises(ValueError, match="max_rows=0"):
        SparseMoments(max_rows=0)


@pytest.mark.parametrize("vocabulary", [300, 3000, 20_011])
def test_the_largest_logits_are_those_of_topk(vocabulary):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(5, vocabulary, generator=g)
    z[1] = torch.linspace(0, 30, vocabulary)
    z[2] = -z[1]
    actions = z.argmin(-1)
    found = token_support(z, actions, 9)
    expected = z.topk(9).indices
    assert torch.equal(found.ids[:, :-1], expected[:, :-1])
    assert torch.equal(found.ids[:, -1], actions)
    assert not found.inside.any()
    assert torch.equal(found.action, torch.full((5,), 8))
    torch.testing.assert_close(found.mass, z.softmax(-1).gather(-1, found.ids).sum(-1))
    torch.testing.assert_close(found.probs, z.gather(-1, found.ids).softmax(-1))
    inside = token_support(z, expected[:, 2], 9)
    assert torch.equal(inside.ids, expected)
    assert torch.equal(inside.action, torch.full((5,), 2))


def test_the_score_is_the_gradient_of_the_log_probability():
    x = Problem()
    for k in (None, V, V + 5, 4):
        support = token_support(x.z, x.a, k)
        z = x.z.gather(-1, support.ids).requires_grad_()
        picked = z.log_softmax(-1).gather(-1, support.action.unsqueeze(-1)).sum()
        torch.testing.assert_close(support.score(), torch.autograd.grad(picked, z)[0])
        assert torch.equal(support.ids.gather(-1, support.action.unsqueeze(-1)).squeeze(-1), x.a)


def test_limits_are_strict_and_monotone_and_reject_what_is_no_number():
    m = torch.tensor([-0.02, -0.01, -0.005, 0.0, 0.005, 0.01, math.nan, math.inf, -math.inf])
    band = ShiftLimits(policy=1e-4, objective=0.01)
    assert band.objective_fails(m).tolist() == [True, True, False, False, False, True, True, True, True]
    helping = ShiftLimits(policy=1e-4, objective=0.01, objective_low=0.0)
    assert helping.objective_fails(m).tolist() == [True, True, True, False, False, True, True, True, True]
    assert band.policy_fails(torch.tensor([0.0, 9e-5, 1e-4, math.nan])).tolist() == [False, False, True, True]
    open_ended = ShiftLimits(math.inf, math.inf)
    assert not open_ended.objective_fails(m[:6]).any()
    finite, policy = m[:6], torch.rand(6) * 2e-4
    rejected = band.objective_fails(finite) | band.policy_fails(policy)
    assert torch.equal(rejected, band.excess(finite, policy) >= 1)
    assert band.excess(m, torch.zeros(9))[6] == math.inf
    for bad in ({"policy": 0.0}, {"objective": -1.0}, {"policy": math.nan}, {"objective_low": 0.5}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ShiftLimits(**{"policy": 1.0, "objective": 0.1, **bad})


def test_shifts_scale_with_the_learning_rate_and_vanish_with_it():
    x, moments = Problem(), trained((0.9, 0.99), 3)[0]
    ids = torch.arange(V).expand(N, V)
    for held in (None, moments):
        s = [logit_steps(x.h, ids, x.pull(), lr, TAU, held, EPS) for lr in (LR, 2 * LR, 0.0)]
        f = [predicted_shifts(each, x.p, x.a, x.A) for each in s]
        torch.testing.assert_close(f[1].policy, 4 * f[0].policy, **CLOSE)
        assert not f[2].policy.any()
        assert not f[2].objective.any()


def test_order_and_chunks_do_not_matter(monkeypatch):
    x, moments = Problem(), trained((0.9, 0.99), 3)[0]
    ids, order = torch.arange(V).expand(N, V), torch.tensor([3, 1, 5, 0, 2, 4])
    whole = logit_steps(x.h, ids, x.pull(), LR, TAU, moments, EPS)
    joint = joint_logit_steps(x.h, ids, x.pull(), LR, TAU, moments, EPS)
    monkeypatch.setattr("evolute.geometry.policy.steps.BYTES", 1)
    monkeypatch.setattr("evolute.geometry.policy.moments.ROWS_AT_ONCE", 2)
    torch.testing.assert_close(
        logit_steps(x.h[order], ids, x.pull()[order], LR, TAU, moments, EPS), whole[order], **CLOSE
    )
    torch.testing.assert_close(
        joint_logit_steps(x.h[order], ids, x.pull()[order], LR, TAU, moments, EPS), joint[order], **CLOSE
    )

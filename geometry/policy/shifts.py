"""Predicted shifts of policy and objective, from the change of a token's logits (CAPO, arXiv 2510.00819, section 4).

With ``z = W h``, ``p = softmax(z)`` and the score ``v = e_a - p`` of the sampled token ``a``, a proposed step D of the
head changes the logits by ``s = D h``, and every quadratic form of the paper needs only s and p, never a matrix:

    q1 = v . s = s_a - E_p[s],    q2 = s^T F s = Var_p(s),    F = diag(p) - p p^T.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class PredictedShifts(NamedTuple):
    """What a step does to the objective and to the policy at each token, all [n].

    Attributes:
        objective: change of the ratio surrogate ``A pi / pi_old`` to second order, ``A (q1 + (q1^2 - q2) / 2)``; the
            paper's m_H.
        policy: ``q1^2 / 2``, the paper's m_F: the Fisher form at the sampled action.
        expected_policy: ``q2 / 2``, the mean of ``policy`` over actions; lower variance.
        kl: exact ``KL(old || new)`` of the token's distribution, nats.
        exact_objective: exact change of the ratio surrogate.
    """

    objective: Tensor
    policy: Tensor
    expected_policy: Tensor
    kl: Tensor
    exact_objective: Tensor


def predicted_shifts(s: Tensor, probs: Tensor, action: Tensor, advantage: Tensor) -> PredictedShifts:
    """Return the shifts that a change ``s`` of the logits brings, in O(k) a token.

    Args:
        s: change of the logits on the support [n, k]; a constant added to it changes nothing.
        probs: the policy on the support [n, k], summing to 1.
        action: place of the sampled token in the support [n].
        advantage: weight of the token in the objective [n].
    """
    centred = s - torch.linalg.vecdot(probs, s).unsqueeze(-1)
    q1 = centred.gather(-1, action.unsqueeze(-1)).squeeze(-1)
    q2 = torch.linalg.vecdot(probs, centred.square())
    kl = torch.log1p(torch.linalg.vecdot(probs, _beyond_linear(centred)))
    return PredictedShifts(
        objective=advantage * (q1 + (q1.square() - q2) / 2),
        policy=q1.square() / 2,
        expected_policy=q2 / 2,
        kl=kl,
        exact_objective=advantage * torch.expm1(q1 - kl),
    )


def _beyond_linear(x: Tensor) -> Tensor:
    """Return ``e^x - 1 - x`` without cancellation: shifts of 1e-8 are what it is for."""
    series = x.square() * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x / 5040)))))
    return torch.where(x.abs() < 0.03, series, torch.expm1(x) - x)


def sgd_shifts(
    rest: Tensor,
    squares: Tensor,
    cubes: Tensor,
    hidden_square: Tensor,
    advantage: Tensor,
    lr: float,
    temperature: float,
) -> PredictedShifts:
    """Return the shifts of each token's own SGD step, over the whole vocabulary, from four numbers a token.

    ``D = lr A v h^T / tau`` gives ``s = b v`` with ``b = lr A |h|^2 / tau^2``; in terms of the other tokens'
    probabilities nothing cancels when the policy is sure of itself.

    Args:
        rest: sum of the probabilities of the other tokens [n], ``1 - p_a``.
        squares: sum of their squares [n].
        cubes: sum of their cubes [n].
        hidden_square: squared norm of the hidden state [n].
        advantage: weight of the token in the objective [n].
        lr: learning rate of the head.
        temperature: tau, by which the logits were divided.

    Returns:
        Shifts [n]; ``kl`` and ``exact_objective`` are not in closed form and are NaN.
    """
    b = advantage * hidden_square * (lr / temperature**2)
    p_a = 1 - rest
    q1 = b * (rest.square() + squares)
    q2 = b.square() * (p_a * rest**3 + cubes + squares * (2 * p_a * rest - squares)).clamp(min=0)
    unknown = torch.full_like(q1, math.nan)
    objective = advantage * (q1 + (q1.square() - q2) / 2)
    return PredictedShifts(objective, q1.square() / 2, q2 / 2, unknown, unknown)


@dataclass(frozen=True)
class ShiftLimits:
    """The shifts that are accepted: ``policy`` below one limit, ``objective`` strictly between two.

    Attributes:
        policy: delta_F, above 0; infinity switches the test off.
        objective: delta_H, above 0; infinity switches the test off.
        objective_low: lower edge, by default ``-objective`` (the paper's recipes); 0 keeps only what is predicted to
            help.

    Raises:
        ValueError: if a limit is not above 0, or the lower edge not below the upper.
    """

    policy: float
    objective: float
    objective_low: float | None = None

    def __post_init__(self) -> None:
        for name in ("policy", "objective"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: a limit is above 0 (.inf for none)")
        if not self.low < self.objective:
            raise ValueError(f"objective_low={self.objective_low}: must be below objective={self.objective}")

    @property
    def low(self) -> float:
        """The lower edge of the objective's band."""
        return -self.objective if self.objective_low is None else self.objective_low

    def policy_fails(self, policy: Tensor) -> Tensor:
        """Say which policy shifts are too large, or not numbers."""
        return ~policy.isfinite() | (policy >= self.policy)

    def objective_fails(self, objective: Tensor) -> Tensor:
        """Say which objective shifts are outside the band, or not numbers."""
        # At the edge 0 the paper's test is not strict: a token that moves nothing stays.
        below = objective < self.low if self.low == 0 else objective <= self.low
        return ~objective.isfinite() | (objective >= self.objective) | below

    def excess(self, objective: Tensor, policy: Tensor) -> Tensor:
        """Return how far beyond its limits each is, in units of the limit: above 1 is rejected, larger is worse."""
        down = objective / self.low if self.low < 0 else torch.where(objective < 0, torch.inf, 0.0)
        worst = torch.maximum(torch.maximum(objective / self.objective, down), policy / self.policy)
        return worst.nan_to_num(nan=torch.inf)

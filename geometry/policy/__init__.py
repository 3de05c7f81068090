"""How far a policy and its objective move under a proposed step of the language-model head (CAPO)."""

from evolute.geometry.policy.moments import SparseMoments
from evolute.geometry.policy.shifts import PredictedShifts, ShiftLimits, predicted_shifts, sgd_shifts
from evolute.geometry.policy.steps import joint_logit_steps, logit_steps
from evolute.geometry.policy.support import Support, score_rest, token_support

__all__ = [
    "PredictedShifts",
    "ShiftLimits",
    "SparseMoments",
    "Support",
    "joint_logit_steps",
    "logit_steps",
    "predicted_shifts",
    "score_rest",
    "sgd_shifts",
    "token_support",
]

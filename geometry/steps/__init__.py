"""How far a step may go, and how far it went."""

from evolute.geometry.steps.ghost import (
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
from evolute.geometry.steps.noise_scale import NoiseScale, gradient_noise_scale, pair_signal
from evolute.geometry.steps.update_ratio import update_ratio

__all__ = [
    "NoiseScale",
    "binary_ghost_radius",
    "binary_spread",
    "directional_logits",
    "ghost_radius",
    "ghost_ratio",
    "gradient_noise_scale",
    "head_spread",
    "logit_spread",
    "pair_signal",
    "recomputed_spread",
    "secant_spread",
    "update_ratio",
]

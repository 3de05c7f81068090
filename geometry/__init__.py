"""The mathematics: pure functions and small operators on tensors. Imports torch, never lightning."""

from evolute.geometry.norms.lmo import batched_dual_norms, batched_lmo, dual_norm, lmo, nuclear_norm
from evolute.geometry.norms.noise import noise_ema, noise_ratios
from evolute.geometry.norms.orthogonalize import newton_schulz, polar_express

__all__ = [
    "batched_dual_norms",
    "batched_lmo",
    "dual_norm",
    "lmo",
    "newton_schulz",
    "noise_ema",
    "noise_ratios",
    "nuclear_norm",
    "polar_express",
]

"""Hessian and Gauss-Newton operators, and what is estimated from their products."""

from evolute.geometry.curvature.blocks import parameter_blocks
from evolute.geometry.curvature.fisher import EmpiricalFisher, Fisher
from evolute.geometry.curvature.gauss_newton import GaussNewton
from evolute.geometry.curvature.hessian import Hessian
from evolute.geometry.curvature.lanczos import Eigenpairs, top_eigenpairs
from evolute.geometry.curvature.operator import CurvatureOperator, SymmetricOperator
from evolute.geometry.curvature.residual import HessianResidual
from evolute.geometry.curvature.scaled import (
    GeneralizedSharpness,
    Preconditioned,
    adam_diagonal,
    adam_preconditioner,
    generalized_sharpness,
    preconditioned,
)
from evolute.geometry.curvature.sliding_fisher import SlidingFisher
from evolute.geometry.curvature.spectrum import SpectralDensity, spectral_density
from evolute.geometry.curvature.step_line import CriticalStep, critical_step, model_agreement, smoothness_ratio
from evolute.geometry.curvature.thresholds import (
    adam_threshold,
    gd_threshold,
    heavy_ball_threshold,
    nesterov_threshold,
)
from evolute.geometry.curvature.trace import (
    Diagonal,
    SketchedTrace,
    TraceSamples,
    hutch_plus_plus,
    hutchinson_diagonal,
    hutchinson_trace,
    trace_samples,
)

__all__ = [
    "CriticalStep",
    "CurvatureOperator",
    "Diagonal",
    "Eigenpairs",
    "EmpiricalFisher",
    "Fisher",
    "GaussNewton",
    "GeneralizedSharpness",
    "Hessian",
    "HessianResidual",
    "Preconditioned",
    "SketchedTrace",
    "SlidingFisher",
    "SpectralDensity",
    "SymmetricOperator",
    "TraceSamples",
    "adam_diagonal",
    "adam_preconditioner",
    "adam_threshold",
    "critical_step",
    "gd_threshold",
    "generalized_sharpness",
    "heavy_ball_threshold",
    "hutch_plus_plus",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "model_agreement",
    "nesterov_threshold",
    "parameter_blocks",
    "preconditioned",
    "smoothness_ratio",
    "spectral_density",
    "top_eigenpairs",
    "trace_samples",
]

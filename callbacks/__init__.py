"""Lightning callbacks: observe, call geometry, act, record."""

from evolute.callbacks.curvature_monitor import CurvatureMonitor
from evolute.callbacks.layer_monitor import LayerMonitor
from evolute.callbacks.metrics_csv import MetricsCSV
from evolute.callbacks.noise_adaptive_lr import NoiseAdaptiveLR
from evolute.callbacks.run_checkpoint import RunCheckpoint
from evolute.callbacks.run_report import RunReport
from evolute.callbacks.spectrum_probe import SpectrumProbe
from evolute.callbacks.step_radius import StepRadius

__all__ = [
    "CurvatureMonitor",
    "LayerMonitor",
    "MetricsCSV",
    "NoiseAdaptiveLR",
    "RunCheckpoint",
    "RunReport",
    "SpectrumProbe",
    "StepRadius",
]

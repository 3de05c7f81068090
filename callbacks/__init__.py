"""Lightning callbacks: observe, call geometry, act, record."""

from evolute.callbacks.capo import CAPO
from evolute.callbacks.curvature_monitor import CurvatureMonitor
from evolute.callbacks.entropy_mask import EntropyMask
from evolute.callbacks.gaussian_densify import GaussianDensify
from evolute.callbacks.gaussian_relocate import GaussianRelocate
from evolute.callbacks.gsplat_strategy import GsplatStrategy
from evolute.callbacks.item_embedding_norm import ItemEmbeddingNorm
from evolute.callbacks.item_geometry import ItemGeometry
from evolute.callbacks.item_init import ItemInit
from evolute.callbacks.layer_monitor import LayerMonitor
from evolute.callbacks.metrics_csv import MetricsCSV
from evolute.callbacks.noise_adaptive_lr import NoiseAdaptiveLR
from evolute.callbacks.opacity_reset import OpacityReset
from evolute.callbacks.random_token_mask import RandomTokenMask
from evolute.callbacks.run_checkpoint import RunCheckpoint
from evolute.callbacks.run_report import RunReport
from evolute.callbacks.scene_output import ExportPLY, RenderVideo
from evolute.callbacks.spectrum_probe import SpectrumProbe
from evolute.callbacks.splat_schedules import DepthSchedule, SHSchedule
from evolute.callbacks.step_radius import StepRadius

__all__ = [
    "CAPO",
    "CurvatureMonitor",
    "DepthSchedule",
    "EntropyMask",
    "ExportPLY",
    "GaussianDensify",
    "GaussianRelocate",
    "GsplatStrategy",
    "ItemEmbeddingNorm",
    "ItemGeometry",
    "ItemInit",
    "LayerMonitor",
    "MetricsCSV",
    "NoiseAdaptiveLR",
    "OpacityReset",
    "RandomTokenMask",
    "RenderVideo",
    "RunCheckpoint",
    "RunReport",
    "SHSchedule",
    "SpectrumProbe",
    "StepRadius",
]

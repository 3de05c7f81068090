"""Every callback, and what the generic conformance tests need to know of it.

A callback enters the tests of ``tests/callbacks/test_contracts.py`` by being listed here.
"""

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.callbacks import Callback

from evolute.callbacks import (
    CAPO,
    CurvatureMonitor,
    EntropyMask,
    GaussianDensify,
    GaussianRelocate,
    GsplatStrategy,
    ItemEmbeddingNorm,
    ItemGeometry,
    ItemInit,
    LayerMonitor,
    NoiseAdaptiveLR,
    OpacityReset,
    RandomTokenMask,
    SpectrumProbe,
    StepRadius,
)
from evolute.geometry import write_vectors


@dataclass(frozen=True)
class Refusal:
    """Where a callback refuses in the matrix of ``tests/callbacks/matrix.py``, and how.

    Attributes:
        where: values of the matrix's factors, ``{"accumulate": 1}``, or tuples of them; the refusal holds where all of
            them meet.
        message: a part of what it says.
    """

    where: Mapping[str, Any]
    message: str

    def values(self, factor: str) -> tuple[Any, ...]:
        """Return the values of a factor at which it refuses."""
        value = self.where[factor]
        return value if isinstance(value, tuple) else (value,)


@dataclass(frozen=True)
class Setting:
    """One callback under test.

    Attributes:
        make: builds it; keyword arguments override.
        prefix: of the metrics it records.
        metric: one scalar that every measurement records.
        intervention: it may change the run; it then has ``dry_run`` and ``neutral`` arguments that reproduce the base
            run.
        neutral: those arguments.
        first: first measured step when every step is measured.
        every_step: it measures every step, and takes no ``every_n_steps``.
        once: it acts before the first step, whoever optimises then, and records that at step 0.
        bad: argument values it must refuse, each alone.
        everywhere: arguments with which it measures the same whatever the number of processes.
        jumps: metrics that count or cut off at a threshold, so that the rounding of bfloat16 may move them anywhere;
            the matrix compares them in float32 only.
        refuses: where it may refuse instead.
        policy: it needs a policy loss, which the modules under test then have.
        scene: it needs a module that trains Gaussians, which those under test then do.
        float32: it refuses parameters of another kind.
        ends: what it measures every n steps is measured after the last of them.
    """

    make: Callable[..., Callback]
    prefix: str
    metric: str
    intervention: bool = False
    neutral: Mapping[str, Any] = field(default_factory=dict)
    first: int = 0
    every_step: bool = False
    once: bool = False
    bad: tuple[Mapping[str, Any], ...] = ()
    everywhere: Mapping[str, Any] = field(default_factory=dict)
    jumps: tuple[str, ...] = ()
    refuses: tuple[Refusal, ...] = ()
    policy: bool = False
    scene: bool = False
    float32: bool = False
    ends: bool = False

    def every(self, n: int) -> dict[str, int]:
        """Return the arguments that make it measure every ``n`` steps, where it can be told."""
        return {} if self.every_step or self.once else {"every_n_steps": n}


def _curvature(**kwargs: Any) -> Callback:
    return CurvatureMonitor(
        **{"every_n_steps": 3, "samples": 8, "budget": None, "blocks": "(.*weight)", "trace_samples": 2, **kwargs}
    )


def _spectrum(**kwargs: Any) -> Callback:
    return SpectrumProbe(**{"every_n_steps": 3, "samples": 8, "budget": None, "lanczos_steps": 8, **kwargs})


def _radius(**kwargs: Any) -> Callback:
    return StepRadius(**{"every_n_steps": 3, "budget": None, **kwargs})


def _clip(**kwargs: Any) -> Callback:
    return StepRadius(**{"mode": "clip", "target": 0.005, "samples": None, **kwargs})


def _layers(**kwargs: Any) -> Callback:
    return LayerMonitor(**{"every_n_steps": 3, "budget": None, **kwargs})


def _noise(**kwargs: Any) -> Callback:
    return NoiseAdaptiveLR(**kwargs)


# The heads of the modules of the tests: their rows are what a recommender's items are.
_HEADS = r"net\.(3|6)|head|encoder"


def _items(**kwargs: Any) -> Callback:
    return ItemGeometry(
        **{"target": _HEADS, "query": r"net\.(2|5)", "every_n_steps": 3, "budget": None, "keep": 0, **kwargs}
    )


def _unit_items(**kwargs: Any) -> Callback:
    return ItemEmbeddingNorm(**{"target": _HEADS, "query": None, "every_n_steps": 1, **kwargs})


def _first_items(**kwargs: Any) -> Callback:
    return ItemInit(**{"method": "random", "target": _HEADS, **kwargs})


_FOLDER = tempfile.TemporaryDirectory()


def _adapted_items(**kwargs: Any) -> Callback:
    """Four item vectors of width 5, under the numbers of the rows of a head, and an adapter over them."""
    path = Path(_FOLDER.name) / "vectors.parquet"
    write_vectors(path, [str(row) for row in range(4)], np.random.default_rng(0).normal(size=(4, 5)))
    return ItemInit(**{"vectors": str(path), "method": "linear", "target": "head", "first_row": 0, **kwargs})


def _capo(**kwargs: Any) -> Callback:
    return CAPO(**{"delta_f": 2e-4, "delta_h": 0.015, **kwargs})


def _random(**kwargs: Any) -> Callback:
    return RandomTokenMask(**{"rate": 0.3, **kwargs})


def _entropy(**kwargs: Any) -> Callback:
    return EntropyMask(**{"quantile": 0.4, **kwargs})


# Each process takes its share from its own part of the batch; all of the parts are all of the batch.
_ALL_SAMPLES: Mapping[str, Any] = {"samples": 1000}

SETTINGS: dict[str, Setting] = {
    "CurvatureMonitor": Setting(
        _curvature,
        "curvature",
        "curvature/sharpness",
        bad=(
            {"every_n_steps": 0},
            {"samples": 0},
            {"tol": 0.0},
            {"max_products": 1},
            {"trace_samples": -1},
            {"eigenpairs": 0},
            {"preset": "huge"},
            {"quantities": []},
            {"quantities": ["sharpness", "roundness"]},
            {"batch_norm": "off"},
            {"budget": 0.0},
            {"budget": 1.5},
        ),
        everywhere=_ALL_SAMPLES,
    ),
    "CurvatureMonitor-cheap": Setting(
        partial(_curvature, preset="cheap", blocks=None, trace_samples=None),
        "curvature",
        "curvature/loss_change",
        everywhere=_ALL_SAMPLES,
    ),
    "CurvatureMonitor-full": Setting(
        partial(_curvature, preset="full", blocks="layer", eigenpairs=2, max_products=12, batch_norm="train"),
        "curvature",
        "curvature/model_agreement",
        everywhere={**_ALL_SAMPLES, "max_products": 60, "tol": 1e-4},  # converged: rounding then moves little
    ),
    "SpectrumProbe": Setting(
        _spectrum,
        "spectrum",
        "spectrum/lambda_max",
        bad=(
            {"every_n_steps": 0},
            {"every_n_steps": None},
            {"vectors": 0},
            {"lanczos_steps": 0},
            {"classes": 0},
            {"samples": 0},
            {"batch_norm": "off"},
            {"budget": 0.0},
        ),
        everywhere=_ALL_SAMPLES,
        jumps=("spectrum/bulk_edge", "spectrum/outliers"),
    ),
    "SpectrumProbe-split": Setting(
        partial(_spectrum, split=True, on_validation_end=True, batch_norm="train"),
        "spectrum",
        "spectrum/residual_ratio",
        everywhere=_ALL_SAMPLES,
        jumps=("spectrum/bulk_edge", "spectrum/outliers"),
    ),
    "StepRadius": Setting(
        _radius,
        "step",
        "step/ghost_ratio",
        bad=(
            {"every_n_steps": 0},
            {"mode": "stop"},
            {"target": 0.0},
            {"estimator": "guess"},
            {"samples": 0},
            {"mode": "clip", "estimator": "jvp"},
            {"mode": "set", "estimator": "jvp"},
            {"head_from": 1},
        ),
        everywhere=_ALL_SAMPLES,
    ),
    "CurvatureMonitor-moving": Setting(
        partial(_curvature, fixed_batch=False), "curvature", "curvature/eos_ratio", everywhere=_ALL_SAMPLES
    ),
    "StepRadius-jvp": Setting(partial(_radius, estimator="jvp"), "step", "step/ghost_ratio", everywhere=_ALL_SAMPLES),
    "StepRadius-clip": Setting(
        _clip,
        "step",
        "step/clip_scale",
        intervention=True,
        neutral={"target": 1e9},
        every_step=True,
        bad=({"target": -1.0},),
    ),
    "StepRadius-set": Setting(
        partial(_clip, mode="set"),
        "step",
        "step/set_scale",
        intervention=True,
        neutral={"dry_run": True},
        every_step=True,
    ),
    "LayerMonitor": Setting(
        _layers,
        "layer",
        "layer/grad_norm",
        bad=({"every_n_steps": -1}, {"noise": "none"}, {"memory": 0}, {"budget": 2.0}),
        everywhere={"noise": "consecutive"},
    ),
    "NoiseAdaptiveLR": Setting(
        _noise,
        "noise",
        "noise/time_ms",
        intervention=True,
        neutral={"power": 0.0},
        first=1,
        bad=(
            {"alpha": 0.0},
            {"alpha": -1.0},
            {"alpha": "big"},
            {"power": -0.5},
            {"decay": 1.0},
            {"every_n_steps": 0},
            {"estimator": "third"},
            {"dual": "both"},
            {"rows": "some"},
        ),
    ),
    "ItemGeometry": Setting(
        _items,
        "item_geometry",
        "item_geometry/mean_cos",
        bad=({"every_n_steps": 0}, {"queries": 0}, {"sample": 0}, {"budget": 0.0}),
        everywhere={"query": None},  # each process would take its queries from its own part of the batch
    ),
    "ItemInit": Setting(
        _first_items,
        "item_init",
        "item_init/row_norm",
        intervention=True,
        once=True,
        neutral={"method": "keep"},
        bad=(
            {"method": "raw"},
            {"form": "sum"},
            {"trade_off": 2.0},
            {"row_norm": 0.0},
            {"target": "("},
            {"first_row": -1},
            {"control": True},
        ),
    ),
    "ItemEmbeddingNorm": Setting(
        _unit_items,
        "item_norm",
        "item_norm/stored_mean",
        intervention=True,
        neutral={"where": "none"},
        everywhere={"row_norm": None},  # the weights that the others start from
        bad=(
            {"where": "inside"},
            {"mode": "always"},
            {"temperature": 0.0},
            {"input_scale": -1.0},
            {"row_norm": 0.0},
            {"target": "("},
            {"every_n_steps": 0},
        ),
        refuses=(Refusal({"strategy": "ZeRO-3"}, "shard"),),
    ),
    "ItemEmbeddingNorm-project": Setting(
        partial(_unit_items, mode="project"),
        "item_norm",
        "item_norm/stored_mean",
        intervention=True,
        neutral={"dry_run": True},
        refuses=(Refusal({"strategy": "ZeRO-3"}, "shard"),),
    ),
}

_SHARES = ("capo/reject_frac", "capo/reject_frac_fisher", "capo/reject_frac_hessian", "capo/seq_all_rejected")
SETTINGS["CAPO"] = Setting(
    _capo,
    "capo",
    "capo/reject_frac",
    intervention=True,
    neutral={"delta_f": math.inf, "delta_h": math.inf},
    every_step=True,
    policy=True,
    bad=(
        {"preset": "ppo"},
        {"delta_f": 0.0},
        {"delta_h": -0.1},
        {"delta_h_low": 0.5},
        {"optimizer_model": "muon"},
        {"top_k": 0},
        {"fisher": "none"},
        {"model": "cubic"},
        {"granularity": "word"},
        {"max_reject_frac": 0.0},
        {"max_rows": 0},
        {"log_tokens": -1},
        {"denominator": "some"},
        {"start_step": -1},
    ),
    jumps=(*_SHARES, "capo/reject_frac_pos_adv", "capo/reject_frac_neg_adv"),
)
SETTINGS["CAPO-sgd"] = replace(
    SETTINGS["CAPO"],
    make=partial(_capo, optimizer_model="sgd", delta_f=1e-5, delta_h=1e-2, denominator="original"),
    bad=(),
)
SETTINGS["RandomTokenMask"] = Setting(
    _random,
    "random_mask",
    "random_mask/reject_frac",
    intervention=True,
    neutral={"rate": 0.0},
    every_step=True,
    policy=True,
    bad=({"rate": 1.0}, {"rate": -0.1}, {"rate": "some"}, {"denominator": "none"}),
    everywhere={"rate": 0.0},  # each process draws for itself
)
SETTINGS["EntropyMask"] = Setting(
    _entropy,
    "entropy_mask",
    "entropy_mask/reject_frac",
    intervention=True,
    neutral={"quantile": 0.0},
    every_step=True,
    policy=True,
    bad=({"quantile": 1.0}, {"reject": "both"}),
    everywhere={"quantile": 0.0},  # of a micro-batch of a process
)


def _relocate(**kwargs: Any) -> Callback:
    return GaussianRelocate(**{"cap": 340, "every_n_steps": 4, "start": 4, "stop": 1.0, "min_opacity": 0.05, **kwargs})


def _densify(**kwargs: Any) -> Callback:
    small = {"budget": 340, "every_n_steps": 4, "start": 4, "stop": 1.0, "grad_threshold": 1e-7}
    # Passing the same share throughout, it does not depend on the length of the run.
    return GaussianDensify(**{**small, "theta_mode": "quantile", "passing": (0.2, 0.2), "replaced": 0.2, **kwargs})


def _reset(**kwargs: Any) -> Callback:
    return OpacityReset(**{"every_n_steps": 6, "ceiling": 0.05, "stop": 1.0, **kwargs})


def _gsplat(dry_run: bool = False, every_n_steps: int = 4, **options: Any) -> Callback:
    small = {"refine_start_iter": 2, "refine_every": every_n_steps, "grow_grad2d": 1e-5, "reset_every": 8}
    return GsplatStrategy(options={**small, **options}, dry_run=dry_run)


# The number of Gaussians changes, and processes would go on reducing gradients of the shapes they began with.
_ALONE = (Refusal({"strategy": ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")}, "use one device"),)

# These are asked the same on the splatting recipe, and more, in tests/callbacks/test_gaussians.py.
GAUSSIANS: dict[str, Setting] = {
    "GaussianDensify": Setting(
        _densify,
        "densify",
        "densify/gaussians",
        intervention=True,
        scene=True,
        ends=True,
        refuses=_ALONE,
        neutral={"grad_threshold": math.inf, "min_opacity": 0.0, "max_scale": math.inf},
        bad=({"budget": 0}, {"every_n_steps": 0}, {"theta_mode": "soft"}, {"stop": 2.0}, {"replaced": -0.1}),
    ),
    "GaussianRelocate": Setting(
        _relocate,
        "relocate",
        "relocate/gaussians",
        intervention=True,
        scene=True,
        ends=True,
        refuses=_ALONE,
        neutral={"noise": 0.0, "growth": 0.0, "min_opacity": 0.0},
        bad=({"cap": 0}, {"growth": -1.0}, {"min_opacity": 2.0}),
    ),
    "OpacityReset": Setting(
        _reset,
        "opacity",
        "opacity/reset",
        intervention=True,
        scene=True,
        ends=True,
        refuses=_ALONE,
        neutral={"every_n_steps": 10_000},
        bad=({"ceiling": 0.0}, {"every_n_steps": 0}),
    ),
    "GsplatStrategy": Setting(
        _gsplat,
        "gsplat",
        "gsplat/gaussians",
        intervention=True,
        scene=True,
        first=4,
        float32=True,
        refuses=_ALONE,
        neutral={"refine_start_iter": 10_000, "reset_every": 10_000},
        bad=({"speed": 9},),
    ),
}
SETTINGS |= GAUSSIANS

# Noise from the halves of a step, which only an accumulated step has.
_HALVES = (Refusal({"accumulate": 1}, "accumulate_grad_batches"),)
MATRIX: dict[str, Setting] = {
    **SETTINGS,
    "LayerMonitor-split": Setting(partial(_layers, noise="split"), "layer", "layer/grad_norm", refuses=_HALVES),
    "ItemInit-linear": Setting(_adapted_items, "item_init", "item_init/row_norm", intervention=True, once=True),
    "NoiseAdaptiveLR-split": Setting(
        partial(_noise, estimator="split"), "noise", "noise/time_ms", intervention=True, refuses=_HALVES
    ),
}


MONITORS = {name: s for name, s in SETTINGS.items() if not s.intervention}
INTERVENTIONS = {name: s for name, s in SETTINGS.items() if s.intervention}

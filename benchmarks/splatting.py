"""Geometry-texture allocation and depth supervision on the synthetic room: do they do what they are for?

Arms, all at 4,000 Gaussians, 400 steps and without densification, so that only what is named differs: ``gtlr``
(allocation by shape and texture, depth loss with simulated LiDAR, sparse and noisy), ``uniform`` (the same with a
uniform draw), ``shape`` and ``texture`` (one of the two terms alone: the control that says which does the work),
``no_depth`` (``gtlr`` without the depth loss), ``full_depth`` (its weight at the paper's 1). Three more change the
number of Gaussians, scaled down to 400 steps: ``densify`` (``gtlr`` and its splitting under the same cap), ``mcmc``
(uniform, relocated, up to the same cap) and ``default`` (2,000 uniform, then gsplat's DefaultStrategy, which knows no
cap: look at how many it ends with). Each arm takes the factor
on all learning rates that is best for it on the selection seeds and is compared on fresh ones, paired by seed (same
scan, same order of views).

    python benchmarks/splatting.py                # all of it, resumable
    python benchmarks/splatting.py --factor 1     # without the selection of a rate, seed by seed
    python benchmarks/splatting.py --report       # only what is there

One JSON a run lands in benchmarks/results/splatting/; a run that is there is not repeated. Exit code 1 if a bar is
missed.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table

from evolute.callbacks import GaussianDensify, GaussianRelocate, GsplatStrategy
from evolute.data.scenes import SceneDataModule
from evolute.recipes.splatting import GaussianSplat

ARMS: dict[str, dict[str, Any]] = {
    "gtlr": {},
    "uniform": {"allocation": "uniform"},
    "no_depth": {"depth_weight": 0.0},
    "full_depth": {"depth_weight": 1.0},
    "shape": {"texture_weight": 0.0},
    "texture": {"shape_weight": 0.0},
    "densify": {},
    "mcmc": {"allocation": "uniform", "opacity_reg": 0.01, "scale_reg": 0.01},
    "default": {"allocation": "uniform", "initial": 0.5},
}
CADENCE = {"every_n_steps": 25, "start": 50}
ACTING: dict[str, Callable[[], Callback]] = {
    "densify": lambda: GaussianDensify(BUDGET, stop=0.6, theta_mode="quantile", **CADENCE),
    "mcmc": lambda: GaussianRelocate(BUDGET, **CADENCE),
    "default": lambda: GsplatStrategy(
        options={"refine_start_iter": 50, "refine_stop_iter": 240, "refine_every": 25, "reset_every": 10**6}
    ),
}
RATES = {"means": 7e-4, "scales": 1e-2, "quats": 2e-3, "opacities": 5e-2, "sh0": 7e-2, "shN": 2e-3}
GRID = (0.5, 1.0, 2.0, 4.0)
SELECTION, FRESH = (100, 101), (0, 1, 2, 3, 4)
STEPS, BUDGET = 400, 4000
RESULTS = Path(__file__).parent / "results" / "splatting"


def run(arm: str, factor: float, seed: int) -> dict[str, Any]:
    """Train one arm, or read what it gave before."""
    path = RESULTS / f"{arm}-{factor:g}-{seed}.json"
    if path.is_file():
        return json.loads(path.read_text())
    torch.set_num_threads(1)
    L.seed_everything(seed, verbose=False)
    rates = {name: factor * rate for name, rate in RATES.items()}
    options = {
        "budget": BUDGET,
        "sh_degree": 0,
        "rates": rates,
        "depth_weight": 0.2,
        "allocation_seed": seed,
        **ARMS[arm],
    }
    module, data = GaussianSplat(**options), SceneDataModule(seed=seed, folder=f"{tempfile.gettempdir()}/evolute-bench")
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [ACTING[arm]()] if arm in ACTING else []
    trainer = L.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        enable_checkpointing=False,
        limit_val_batches=0,
        callbacks=callbacks,
        **quiet,
    )
    begin = time.process_time()
    trainer.fit(module, data)
    spent = time.process_time() - begin
    scores = L.Trainer(accelerator="cpu", **quiet).validate(module, data, verbose=False)[0]
    found = {
        "arm": arm,
        "factor": factor,
        "seed": seed,
        "cpu_s": spent,
        "gaussians": len(module.scene),
        **{k[4:]: v for k, v in scores.items()},
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.replace(path)
    print(json.dumps(found), flush=True)
    return found


def held(arm: str, factor: float, seeds: tuple[int, ...], make: bool) -> list[dict[str, Any]] | None:
    paths = [RESULTS / f"{arm}-{factor:g}-{seed}.json" for seed in seeds]
    if not make and not all(path.is_file() for path in paths):
        return None
    return [run(arm, factor, seed) for seed in seeds]


def best(arm: str, make: bool) -> float | None:
    """Return the factor with the highest mean PSNR on the selection seeds."""
    tried = {factor: held(arm, factor, SELECTION, make) for factor in GRID}
    means = {f: statistics.mean(r["psnr"] for r in rows) for f, rows in tried.items() if rows}
    return max(means, key=lambda f: means[f]) if means else None


def paired(a: list[dict[str, Any]], b: list[dict[str, Any]], key: str) -> tuple[float, float]:
    differences = [x[key] - y[key] for x, y in zip(a, b, strict=True)]
    return statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="make no run")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--factor", type=float, help="take this factor for every arm, select none")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    if options.factor is not None and not options.report:
        for seed in FRESH:
            for arm in options.arms:
                run(arm, options.factor, seed)
    found: dict[str, list[dict[str, Any]]] = {}
    table = Table("arm", "factor", "PSNR", "SSIM", "depth MAE, m", "Gaussians", "CPU s")
    for arm in options.arms:
        factor = best(arm, not options.report) if options.factor is None else options.factor
        rows = None if factor is None else held(arm, factor, FRESH, not options.report)
        if rows is None:
            continue
        found[arm] = rows
        edge = " (at the edge of the grid)" if factor in (GRID[0], GRID[-1]) else ""
        means = {k: statistics.mean(r[k] for r in rows) for k in ("psnr", "ssim", "depth_mae", "gaussians", "cpu_s")}
        table.add_row(
            arm, f"{factor:g}{edge}", f"{means['psnr']:.2f}", f"{means['ssim']:.3f}",
            f"{means['depth_mae']:.4f}", f"{means['gaussians']:.0f}", f"{means['cpu_s']:.0f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    good = True
    for other in (arm for arm in found if arm != "gtlr"):
        if "gtlr" in found:
            text = ", ".join(
                f"{key} {mean:+.3f} ± {error:.3f}"
                for key in ("psnr", "depth_mae")
                for mean, error in [paired(found["gtlr"], found[other], key)]
            )
            console.print(f"gtlr - {other}, paired over {len(FRESH)} seeds: {text}")
    if {"gtlr", "uniform"} <= found.keys():
        gain = paired(found["gtlr"], found["uniform"], "psnr")[0]
        good &= gain >= 1.5
        console.print(f"allocation gains {gain:.2f} dB over uniform; bar 1.5: {'met' if gain >= 1.5 else 'MISSED'}")
    if {"gtlr", "no_depth"} <= found.keys():
        ratio = statistics.mean(r["depth_mae"] for r in found["gtlr"]) / statistics.mean(
            r["depth_mae"] for r in found["no_depth"]
        )
        cost = paired(found["no_depth"], found["gtlr"], "psnr")[0]
        good &= ratio <= 0.5
        console.print(
            f"depth error {ratio:.2f} of that without depth loss, at {cost:.2f} dB; bar 0.5: "
            f"{'met' if ratio <= 0.5 else 'MISSED'}"
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

"""Does CAPO let a policy learn at rates that break it otherwise?

.venv/bin/python benchmarks/grpo_rates.py [--seeds 2,3] [--steps 200] [--optimizer adamw] [--prompts 2]

The task and start of ``grpo_glitches.py``, without glitches, with GRPO's own normalised advantages, a grid of four
learning rates for AdamW and for SGD with momentum. Arms: nothing, CAPO with the model of the optimizer, a random mask
that rejects at every step the share that CAPO did, the tokens of highest entropy at CAPO's mean share, gradient
clipping at 1. Thresholds are measured at each rate on a seed of their own, in the first steps: ``--multiple`` times
the median of the 99th percentile. One JSON a run under benchmarks/results/grpo_rates/.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import grpo_glitches as glitches
import torch
from grpo_glitches import CALIBRATION_SEED, Plan, RecordedRates, column, kept, show, train
from lightning.pytorch.callbacks import Callback

from evolute.callbacks import CAPO, EntropyMask

RATES = {"adamw": (1e-4, 3e-4, 1e-3, 3e-3), "sgd": (1e-3, 3e-3, 1e-2, 3e-2)}
ARMS = ("none", "capo", "random", "entropy", "clip")
FIRST = 10
"""Steps that thresholds are measured in."""


def thresholds(plan: Plan) -> dict[str, float]:
    kind: Any = "sgd" if plan.optimizer == "sgd" else "adam"

    def measure() -> dict[str, Any]:
        run = train(CALIBRATION_SEED, plan._replace(steps=FIRST), False, [CAPO(optimizer_model=kind, dry_run=True)])
        return {letter: statistics.median(column(run, f"capo/m_{letter}/p99")) for letter in "fh"}

    first = kept(f"quantiles-{plan.optimizer}-{plan.lr:g}", measure)
    return {f"delta_{letter}": plan.multiple * value for letter, value in first.items()}


def arm(name: str, seed: int, plan: Plan) -> dict[str, Any]:
    """Make, or read, one run."""

    def make() -> dict[str, Any]:
        callbacks: list[Callback] = []
        if name == "capo":
            kind: Any = "sgd" if plan.optimizer == "sgd" else "adam"
            callbacks = [CAPO(optimizer_model=kind, **thresholds(plan))]
        elif name == "random":
            callbacks = [RecordedRates(arm("capo", seed, plan)["rates"], seed)]
        elif name == "entropy":
            callbacks = [EntropyMask(min(0.99, arm("capo", seed, plan)["rejected"]), "high")]
        start = time.process_time()
        run = train(seed, plan, False, callbacks, 1.0 if name == "clip" else None)
        rates = next(
            (found for p in ("capo", "random_mask", "entropy_mask") if (found := column(run, f"{p}/reject_frac"))), []
        )
        rejected = statistics.fmean(rates) if rates else 0.0
        return {**run["final"], "rejected": rejected, "rates": rates, "seconds": time.process_time() - start}

    return kept(f"{plan.optimizer}-{plan.lr:g}-{name}-{seed}-{plan.steps}", make)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="2,3")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--multiple", type=float, default=1.5)
    parser.add_argument("--optimizer", choices=list(RATES), help="this one alone")
    parser.add_argument("--prompts", type=int, default=8, help="prompts a rollout: fewer make noisier steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    glitches.RESULTS = Path(__file__).parent / "results" / "grpo_rates"
    if options.prompts != 8:
        glitches.RESULTS /= f"{options.prompts}-prompts"
    for optimizer in [options.optimizer] if options.optimizer else RATES:
        for lr in RATES[optimizer]:
            plan = Plan(options.steps, lr, options.multiple, optimizer, normalised=True, prompts=options.prompts)
            print(f"{optimizer} at {lr:g}:")
            show({name: [arm(name, int(seed), plan) for seed in options.seeds.split(",")] for name in ARMS})


if __name__ == "__main__":
    main()

"""Do noise-adaptive rates help the demo's language model? Run past its bigram floor, printed whatever it says.

Arms: ``base`` (Scion), ``noise`` (with NoiseAdaptiveLR), ``reversed`` (its ratios on the wrong layers: the control),
and variants of the method. Every arm runs the same grid of learning rates and is judged at its own best. Prototypes
saw no gain here, so there is no bar.

    python benchmarks/lanton_gpt.py                          # base and noise, about 20 minutes on one core
    python benchmarks/lanton_gpt.py --arms base power1 none_of_the_embeddings --seeds 0 1 2

One JSON a run lands in benchmarks/results/lanton_gpt/; a run that is there is not repeated.
"""

import argparse
import json
import logging
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table

from evolute.callbacks import NoiseAdaptiveLR
from evolute.callbacks.access import OptimizerStep
from evolute.data import TextDataModule
from evolute.recipes.llm import Pretrain
from evolute.registry import resolve

RECIPE = yaml.safe_load(resolve("llm/pretrain").read_text())
RESULTS = Path(__file__).parent / "results" / "lanton_gpt"
GRID = (0.01, 0.02, 0.04, 0.08)
EVERY = 5


class OnTheWrongLayers(NoiseAdaptiveLR):
    """The same ratios, handed out in reverse order within each norm group."""

    def _scale(self, step: OptimizerStep) -> Mapping[str, float] | None:
        ratios = dict(super()._scale(step) or {})
        for norm in set(self._norm_of.values()):
            names = [n for n in ratios if self._norm_of[n] == norm]
            ratios.update(zip(names, [ratios[n] for n in reversed(names)], strict=True))
        return ratios


ARMS: dict[str, Callable[[], list[Callback]]] = {
    "base": list,
    "noise": lambda: [NoiseAdaptiveLR(every_n_steps=EVERY)],
    "reversed": lambda: [OnTheWrongLayers(every_n_steps=EVERY)],
    "power1": lambda: [NoiseAdaptiveLR(every_n_steps=EVERY, power=1.0)],
    "every_step": lambda: [NoiseAdaptiveLR()],
    "matrices_only": lambda: [NoiseAdaptiveLR(every_n_steps=EVERY, layers=r".*proj\.weight")],
    "plain_dual": lambda: [NoiseAdaptiveLR(every_n_steps=EVERY, dual="plain")],
    "split": lambda: [NoiseAdaptiveLR(every_n_steps=EVERY, estimator="split")],
}


def run(arm: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Train once; return the validation bits per byte and the mean ratios."""
    path = RESULTS / f"{arm}-{lr}-{seed}-{steps}.json"
    if path.exists():
        return json.loads(path.read_text())
    L.seed_everything(seed, verbose=False)
    module = Pretrain(**{**RECIPE["model"]["init_args"], "samples": 0, "optimizer": "scion", "lr": lr})
    data = TextDataModule(
        **{**RECIPE["data"]["init_args"], "seed": seed, **({"batch_size": 8} if arm == "split" else {})}
    )
    callbacks = ARMS[arm]()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, limit_val_batches=60, val_check_interval=steps,
        check_val_every_n_epoch=None, num_sanity_val_steps=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        gradient_clip_val=RECIPE["trainer"]["gradient_clip_val"], accumulate_grad_batches=2 if arm == "split" else 1,
    )  # fmt: skip
    if arm == "split":  # the same samples a step, in two halves; validation counts micro-batches
        trainer.val_check_batch = 2 * steps
    trainer.fit(module, datamodule=data)
    if "val/bits_per_byte" not in trainer.callback_metrics:
        trainer.validate(module, datamodule=data, verbose=False)
    ratios = [float(v) for n, v in trainer.callback_metrics.items() if n.startswith("lr_ratio/")]
    result = {
        "arm": arm, "lr": lr, "seed": seed, "steps": steps,
        "tokens": steps * 16 * RECIPE["data"]["init_args"]["context"],
        "bits_per_byte": float(trainer.callback_metrics["val/bits_per_byte"]),
        "bigram_floor": data.bigram_floor(),
        "smallest_ratio": min(ratios, default=1.0), "mean_ratio": statistics.fmean(ratios) if ratios else 1.0,
    }  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    return result


def main() -> int:
    """Run the grid of every arm and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["base", "noise"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lrs", type=float, nargs="+", default=list(GRID))
    parser.add_argument("--steps", type=int, default=500, help="of 2048 tokens; the default is 1.02 M tokens")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    table = Table("arm", *[f"lr {lr:g}" for lr in args.lrs], "best", "smallest ratio",
                  title="Validation bits per byte, mean over seeds")  # fmt: skip
    for arm in args.arms:
        means: dict[float, float] = {}
        smallest = 1.0
        for lr in args.lrs:
            runs = [run(arm, lr, seed, args.steps) for seed in args.seeds]
            means[lr] = statistics.fmean(r["bits_per_byte"] for r in runs)
            smallest = min(smallest, *[r["smallest_ratio"] for r in runs])
            print(arm, lr, f"{means[lr]:.4f}", flush=True)
        best = min(means, key=lambda lr: means[lr])
        table.add_row(arm, *[f"{v:.4f}" for v in means.values()], f"{means[best]:.4f} at {best:g}", f"{smallest:.2f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())

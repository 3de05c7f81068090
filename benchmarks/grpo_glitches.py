"""Does CAPO keep a run alive when 1 % of the rewards are off by 30, and is it more than fewer tokens?

.venv/bin/python benchmarks/grpo_glitches.py [--seeds 2,3,4,5,6] [--steps 150] [--lr 1e-3] [--arms none,capo-adam]

The default task of ``llm/grpo`` (chain_sum, two terms, exact match), from one supervised start, with Adam and
advantages R - group median, not normalised. Every reward is +30 or -30 with probability 1/200 each. Arms: nothing, a
random mask that rejects at every step the share that CAPO-Adam did with the same seed, gradient clipping at 1,
advantages clamped to [-1, 1], CAPO with its Adam and its SGD model; and CAPO-Adam and nothing without glitches. The
thresholds of each model are measured once a learning rate, on a seed of their own, without glitches and at the full
rate: ``--multiple`` times the median over the steps of the 99th percentile. One JSON a run under
benchmarks/results/grpo_glitches/; a run that is there is not made again.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from evolute.callbacks import CAPO, MetricsCSV, RandomTokenMask
from evolute.callbacks.access import TokenCall
from evolute.data import PromptDataModule
from evolute.recipes.llm import GRPO
from evolute.recipes.llm.cold_start import ColdStart
from evolute.recipes.llm.rewards import exact_match

RESULTS = Path(__file__).parent / "results" / "grpo_glitches"
RATE, SIZE = 0.01, 30.0
TASK = {"size": 8000, "seed": 0, "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
CALIBRATION_SEED = 1000


class Glitches:
    """Exact match; with probability ``rate`` the reward is +30 or -30 instead, in training alone."""

    __name__ = "glitches"

    def __init__(self, seed: int, rate: float) -> None:
        self.chance, self.rate, self.on = random.Random(seed), rate, True

    def __call__(self, completions: list[str], answer: list[Any], **_: Any) -> list[float | None]:
        scores = exact_match(completions, answer)
        if not self.on:
            return scores
        return [self.chance.choice((SIZE, -SIZE)) if self.chance.random() < self.rate else s for s in scores]


class Clamp(Callback):
    """Clamps the advantages that reach the loss to [-1, 1]: the remedy of one who knows what is wrong."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        def clamp(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, kwargs | {"advantages": kwargs["advantages"].clamp(-1, 1)}

        loss: Any = pl_module.policy_loss
        loss.register_forward_pre_hook(clamp, with_kwargs=True)


class RecordedRates(RandomTokenMask):
    """Rejects at random, at each step the share that another run rejected there."""

    def __init__(self, rates: list[float], seed: int) -> None:
        super().__init__(0.0, seed)
        self.rates = rates

    def wanted(self, call: TokenCall, rows: Tensor) -> Tensor:
        self.rate = self.rates[self._steps_seen]
        return super().wanted(call, rows)


class Plan(NamedTuple):
    """What all runs of a table have in common.

    Attributes:
        steps: optimizer steps.
        lr: learning rate.
        multiple: of the clean quantile, for thresholds.
        optimizer: name of it.
        normalised: GRPO's own advantages, (R - mean) / deviation of the group, instead of R - median.
        prompts: a rollout, with 16 completions each.
    """

    steps: int
    lr: float
    multiple: float
    optimizer: str = "adamw"
    normalised: bool = False
    prompts: int = 8

    def __str__(self) -> str:
        return f"{self.steps}-{self.lr:g}"


def train(
    seed: int, plan: Plan, glitches: bool, callbacks: list[Callback], clip: float | None = None
) -> dict[str, Any]:
    """Make one run; return the accuracies after it, and the metrics of every step."""
    L.seed_everything(0, verbose=False)  # the weights that the supervised start begins from are the same for all
    reward: Any = Glitches(seed, RATE if glitches else 0.0)
    module = GRPO(
        rewards=[reward], baseline="mean" if plan.normalised else "median",
        scale_rewards="group" if plan.normalised else "none", group_size=16, max_completion=5,
        cold_start=ColdStart(), val_samples=4, log_completions=0, config=LLAMA, optimizer=plan.optimizer, lr=plan.lr,
        warmup=0, schedule="constant", samples=0,
    )  # fmt: skip
    data = PromptDataModule(
        "reasoning-gym/chain_sum", TASK, "chars:0123456789+-= ", "{metadata[expression]}=", 16, plan.prompts, 256,
        seed=0,
    )  # fmt: skip
    data.setup()
    data.seed = seed  # of order and draws; the split, and so the supervised start, stay
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu", devices=1, max_steps=plan.steps, max_epochs=-1, logger=MetricsCSV(Path(folder)),
            callbacks=callbacks, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            limit_val_batches=0, log_every_n_steps=1, gradient_clip_val=clip, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, data)
        text = (Path(folder) / "metrics.csv").read_text().splitlines()
        names = text[0].split(",")
        rows = [dict(zip(names, line.split(","), strict=True)) for line in text[1:]]
        reward.on = False
        trainer.limit_val_batches = 1.0
        final = trainer.validate(module, data, verbose=False)[0]
    return {"final": final, "rows": rows}


def column(run: dict[str, Any], name: str) -> list[float]:
    return [float(row[name]) for row in run["rows"] if row.get(name)]


def kept(name: str, make: Any) -> dict[str, Any]:
    """Return a run's JSON, making the run if it is not there."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        found = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
        print(name, {k: v for k, v in found.items() if k != "rates"}, flush=True)
    return json.loads(path.read_text())


def thresholds(kind: Any, plan: Plan) -> dict[str, float]:
    def measure() -> dict[str, Any]:
        run = train(CALIBRATION_SEED, plan, False, [CAPO(optimizer_model=kind, dry_run=True)])
        return {letter: statistics.median(column(run, f"capo/m_{letter}/p99")[2:]) for letter in "fh"}

    clean = kept(f"quantiles-{kind}-{plan}", measure)
    return {f"delta_{letter}": plan.multiple * value for letter, value in clean.items()}


def arm(name: str, seed: int, plan: Plan) -> dict[str, Any]:
    """Make, or read, one run."""

    def make() -> dict[str, Any]:
        glitches, callbacks, clip = not name.startswith("clean"), list[Callback](), None
        if "capo" in name:
            kind: Any = "sgd" if name.endswith("sgd") else "adam"
            callbacks = [CAPO(optimizer_model=kind, **thresholds(kind, plan))]
        elif name == "random":
            callbacks = [RecordedRates(arm("capo-adam", seed, plan)["rates"], seed)]
        elif name == "clamp":
            callbacks = [Clamp()]
        elif name == "clip":
            clip = 1.0
        start = time.process_time()
        run = train(seed, plan, glitches, callbacks, clip)
        rates = column(run, "capo/reject_frac") or column(run, "random_mask/reject_frac")
        rejected = statistics.fmean(rates) if rates else 0.0
        return {**run["final"], "rejected": rejected, "rates": rates, "seconds": time.process_time() - start}

    gated = "capo" in name or name == "random"
    return kept(f"{name}-{seed}-{plan}" + (f"-{plan.multiple:g}" if gated else ""), make)


ARMS = ("none", "capo-adam", "random", "clip", "clamp", "capo-sgd", "clean-none", "clean-capo-adam")


def show(table: dict[str, list[dict[str, Any]]]) -> None:
    """Print an arm a line, with the paired difference to the first and its standard error."""
    first = next(iter(table))
    for name, runs in table.items():
        sampled, greedy, rejected = ([r[key] for r in runs] for key in ("val/pass@1", "val/greedy", "rejected"))
        gap = [r["val/pass@1"] - n["val/pass@1"] for r, n in zip(runs, table[first], strict=True)]
        error = statistics.stdev(gap) / len(gap) ** 0.5 if len(gap) > 1 else float("nan")
        print(
            f"  {name:16} sampled {statistics.fmean(sampled):.3f} greedy {statistics.fmean(greedy):.3f} "
            f"over {first} {statistics.fmean(gap):+.3f} ({error:.3f}) rejected {statistics.fmean(rejected):.1%}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="2,3,4,5,6")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--multiple", type=float, default=2.0)
    parser.add_argument("--arms", default=",".join(ARMS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan = Plan(options.steps, options.lr, options.multiple)
    table: dict[str, list[dict[str, Any]]] = {name: [] for name in options.arms.split(",")}
    for seed in map(int, options.seeds.split(",")):
        for name, runs in table.items():
            runs.append(arm(name, seed, plan))
        print(f"{plan.steps} steps at {plan.lr:g}, {plan.multiple:g} times the clean quantile, after seed {seed}:")
        show(table)


if __name__ == "__main__":
    main()

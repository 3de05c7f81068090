"""GRPO under CAPO in two processes: they draw different completions, and end with the same weights and moments.

The file is also the script of the two processes.
"""

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from evolute.callbacks import CAPO
from evolute.data import PromptDataModule
from evolute.recipes.llm import GRPO
from evolute.strategies import CPUDeepSpeedStrategy
from tests.processes import run_pair

pytestmark = pytest.mark.timeout(300)

RUNS = ("ddp", "zero2", "zero3")
LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
TASK = {"size": 60, "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(c)) for c in completions]


class Watch(Callback):
    """Keeps what this rank drew, and the weights that it ended with where it has them whole."""

    def __init__(self) -> None:
        self.actions: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.actions.append(batch["actions"].clone())

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.weights = [p.detach().float().clone() for p in module.parameters()]


def strategy(run: str) -> Any:
    if run == "ddp":
        return "ddp"
    stage = int(run[-1])
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    return CPUDeepSpeedStrategy(config={"zero_allow_untested_optimizer": True, "zero_optimization": zero})


def trained(run: str, folder: Path) -> dict[str, Any]:
    L.seed_everything(0, verbose=False)
    module = GRPO(
        rewards=[length], group_size=4, max_completion=4, log_completions=0, config=LLAMA, optimizer="adamw", lr=3e-3,
        warmup=0, schedule="constant", samples=0,
    )  # fmt: skip
    data = PromptDataModule(
        "reasoning-gym/chain_sum", TASK, "chars:0123456789+-= ", "{metadata[expression]}=", 8, 2, seed=0
    )
    capo, watch = CAPO(delta_f=1e-3, delta_h=2e-2), Watch()
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy(run), max_steps=6, max_epochs=-1, callbacks=[capo, watch],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        logger=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, data)
    logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("capo/") and "time" not in k}
    return {"actions": watch.actions, "weights": watch.weights, "capo": capo.state_dict(), "logged": logged}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_pair(__file__, tmp_path_factory.mktemp("ranks"), 250)


@pytest.mark.parametrize("run", RUNS)
def test_ranks_draw_their_own_and_agree_on_what_they_learn(ranks, run):
    one, other = (rank[run] for rank in ranks)
    assert len(one["actions"]) == 6
    assert not any(torch.equal(a, b) for a, b in zip(one["actions"], other["actions"], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one["weights"], other["weights"], strict=True)) or run == "zero3"
    assert one["capo"]["steps_seen"] == 6
    moments, others = one["capo"]["moments"], other["capo"]["moments"]
    assert any(torch.is_tensor(v) and v.abs().sum() > 0 for v in moments.values())
    for name, value in moments.items():
        assert torch.equal(value, others[name]) if torch.is_tensor(value) else value == others[name], name
    assert one["logged"] == other["logged"]
    assert one["logged"]["capo/tokens"] > 0


def test_strategies_learn_alike(ranks):
    """The shards are pieces of the same run: the moments of the head say so, step by step."""
    moments = [ranks[0][run]["capo"]["moments"] for run in RUNS]
    for name, value in moments[0].items():
        for other in moments[1:]:
            if torch.is_tensor(value) and value.is_floating_point():
                torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-6)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {run: trained(run, folder) for run in RUNS}
    torch.save(found, folder / f"{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

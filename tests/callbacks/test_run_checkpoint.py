"""A run saved at any step and resumed equals one that was never interrupted."""

import csv
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from evolute.callbacks import CurvatureMonitor, LayerMonitor, MetricsCSV, NoiseAdaptiveLR, RunCheckpoint, StepRadius
from evolute.callbacks.run_checkpoint import checkpoints
from evolute.data import TextDataModule
from evolute.recipes.llm import Pretrain
from tests.conftest import trainer_of


class Killed(BaseException):
    pass


class KillAt(Callback):
    """Stop the process, as far as a test can, at the end of the batch after ``step`` optimizer steps."""

    def __init__(self, step: int, hook: str) -> None:
        self.step, self.hook = step, hook

    def _maybe(self, trainer: Any, hook: str) -> None:
        if hook == self.hook and trainer.global_step >= self.step and not trainer.sanity_checking:
            raise Killed

    def on_train_batch_end(self, trainer, *args):
        self._maybe(trainer, "train")

    def on_validation_batch_end(self, trainer, *args):
        self._maybe(trainer, "validation")

    def on_train_epoch_end(self, trainer, *args):
        self._maybe(trainer, "epoch")


class Noisy(Pretrain):
    """Draws from every generator in each step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * (1.0 + 1e-3 * (torch.rand(()) + random.random() + np.random.rand()))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    words = ["the", "curvature", "of", "a", "loss", "is", "what", "steps", "meet", "along", "its", "own", "gradient"]
    draw = random.Random(0)
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(draw.choice(words) for _ in range(60)))
    return folder


def run(folder: Path, corpus: Path, workers: int, accumulate: int, kill: KillAt | None = None, every: int = 3) -> Any:
    """Train 13 optimizer steps over two epochs and a bit, from the newest checkpoint if there is one."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    module = Noisy(
        config={"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                "num_attention_heads": 2},
        optimizer="scion", lr=0.01, samples=1, sample_tokens=4,
    )  # fmt: skip
    data = TextDataModule(source=str(corpus), context=32, batch_size=32, val_fraction=0.2, num_workers=workers)
    logger = MetricsCSV(folder, flush_every=4)
    saved = checkpoints(folder / "checkpoints")
    callbacks = [
        RunCheckpoint(every),
        LearningRateMonitor(),
        CurvatureMonitor(every_n_steps=4, budget=None),
        StepRadius(every_n_steps=3, budget=None),
        LayerMonitor(every_n_steps=4, budget=None),
        NoiseAdaptiveLR(every_n_steps=2),
        *([kill] if kill else []),
    ]
    trainer = trainer_of(
        callbacks, max_steps=13, default_root_dir=folder, logger=logger, accumulate_grad_batches=accumulate,
        val_check_interval=2 * accumulate, check_val_every_n_epoch=1, log_every_n_steps=1, num_sanity_val_steps=0,
        limit_val_batches=2,
    )  # fmt: skip
    if not saved:
        logger.rewind(0)
    try:
        trainer.fit(
            module, datamodule=data, ckpt_path=str(saved[-1]) if saved else None, weights_only=True if saved else None
        )
    except Killed:
        return None
    return module, trainer, callbacks[2:6]


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return [
            {k: v for k, v in r.items() if v and "time" not in k and "per_s" not in k} for r in csv.DictReader(file)
        ]


def stateful(callbacks: Any) -> list[Any]:
    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in ("spent", "elapsed")}
        if isinstance(value, list | tuple):
            return [strip(v) for v in value]
        return value.tolist() if isinstance(value, torch.Tensor) else value

    return [strip(c.state_dict()) for c in callbacks]


@pytest.fixture(scope="module", params=[1, 2], ids=["plain", "accumulate"])
def reference(request, tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("whole")
    return request.param, folder, run(folder, corpus, 0, request.param)


@pytest.mark.parametrize(
    ("steps", "hook", "every", "workers"),
    [
        *[((s,), "train", 1, 0) for s in range(1, 13)],
        *[((s,), "validation", 2, 0) for s in (2, 4, 6, 8)],
        *[((s,), "epoch", 3, 0) for s in (3, 8)],
        ((2, 4, 5, 9, 11), "train", 3, 0),
        ((2, 6, 10), "validation", 1, 0),
        ((4, 9), "train", 2, 2),
    ],
    ids=str,
)
def test_killed_and_resumed_equals_uninterrupted(reference, corpus, tmp_path, steps, hook, every, workers):
    accumulate, whole, (module, trainer, callbacks) = reference
    for step in steps:
        run(tmp_path, corpus, workers, accumulate, KillAt(step, hook), every)
    result = run(tmp_path, corpus, workers, accumulate, None, every)
    assert result is not None
    again, resumed, others = result
    for (name, p), q in zip(module.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    ours, theirs = trainer.optimizers[0].state_dict(), resumed.optimizers[0].state_dict()
    assert str(ours["param_groups"]) == str(theirs["param_groups"])
    for key, state in ours["state"].items():
        assert all(torch.equal(v, theirs["state"][key][n]) for n, v in state.items() if isinstance(v, torch.Tensor))
    assert stateful(callbacks) == stateful(others)
    assert table(whole) == table(tmp_path)
    assert (whole / "samples.jsonl").read_text() == (tmp_path / "samples.jsonl").read_text()
    assert resumed.global_step == trainer.global_step == 13
    assert resumed.current_epoch == trainer.current_epoch


def test_a_checkpoint_is_whole_or_absent_and_old_ones_go(corpus, tmp_path, monkeypatch):
    run(tmp_path, corpus, 0, 1, KillAt(10, "train"), every=3)
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == ["step=00000006.ckpt", "step=00000009.ckpt"]

    def half(self, filepath, *args, **kwargs):
        Path(filepath).write_bytes(b"half")
        raise Killed

    import lightning as L

    monkeypatch.setattr(L.Trainer, "save_checkpoint", half)
    run(tmp_path, corpus, 0, 1, None, every=3)
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == ["step=00000006.ckpt", "step=00000009.ckpt"]


@pytest.mark.parametrize("bad", [{"every_n_steps": 0}, {"keep": 0}])
def test_refuses_intervals_below_one(bad):
    with pytest.raises(MisconfigurationException, match=next(iter(bad))):
        RunCheckpoint(**bad)

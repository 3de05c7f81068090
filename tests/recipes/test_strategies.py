"""Every recipe under every strategy: the loss of one process, and checkpoints that go from one strategy to another.

The file is also the script of two processes, which train one run after the other with the command line's own function.
"""

import contextlib
import copy
import csv
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from evolute.callbacks.zero_checkpoint import layout, load_checkpoint
from evolute.geometry import write_vectors
from evolute.recipes.llm import Pretrain
from evolute.recipes.llm.network import build
from evolute.registry import recipes, strategies
from tests.processes import run_pair

pytestmark = pytest.mark.timeout(900)

TORCH = ("ddp", "fsdp2")
CROSSINGS = [
    ("zero2", 3),
    ("zero3", 2),
    ("single", 1),
    ("fsdp2", 2),
    ("single", "fsdp2"),
    ("fsdp2", "ddp"),
    ("zero3", "ddp"),
]
"""Checkpoints that another strategy goes on from: what wrote it, and the stage or the name of the other."""
VALIDATED = [("zero2", 3), ("zero3", 2)]
SPECIAL = ("poisoned", "loaded")
STEPS, SAVED, GLOBAL_BATCH = 50, 20, 8
LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}

TINY: dict[str, dict[str, Any]] = {
    "llm/pretrain": {
        "model": {"config": {"model_type": "llama", **LLAMA}, "optimizer": "adamw", "lr": 0.01, "sample_tokens": 4},
        "data": {"source": "FOLDER/corpus", "context": 24, "val_fraction": 0.1},
    }
}
"""What makes a recipe small enough for a test."""
TABLE = {"dim": 8, "encoder": "gru4rec", "encoder_args": {"hidden": 8, "dropout": 0.0}, "lr": 0.01}
EVENTS = {"source": "FOLDER/log.csv", "vectors": "FOLDER/vectors.parquet", "max_len": 8}
OTHERS: dict[str, dict[str, Any]] = {
    "llm/sft": {
        "model": {"config": {"model_type": "llama", **LLAMA}, "lr": 0.01, "samples": 0},
        "data": {
            "source": "FOLDER/pairs.jsonl", "source_args": None, "prompt_template": None, "tokenizer": "byte",
            "context": 32, "val_fraction": 0.1, "packing": False,
        },
    },
    "recommender/plain": {"model": TABLE, "data": EVENTS},
    "recommender/tf_llmer": {"model": TABLE, "data": EVENTS},
}  # fmt: skip
"""Recipes that share the paths to checkpoints with the first: what they reach under each stage is compared, no more."""
COMPARED = [
    (recipe, run) for recipe in OTHERS for run in ("zero1", "zero2", "zero3", "ddp")
    if (recipe, run) != ("recommender/tf_llmer", "zero3")  # ItemEmbeddingNorm refuses shards of weights
]  # fmt: skip
ELSEWHERE = {
    "llm/grpo": "each process draws completions of its own: tests/recipes/test_grpo_ranks.py",
    "llm/grpo_smollm2": "the same recipe on another model",
    "splatting/gtlr": "refuses several processes: tests/recipes/test_splatting.py",
}
"""Recipes with no loss to compare, and why. Every packaged recipe must be in one of the three."""


def write(folder: Path, name: str) -> None:
    """Write a packaged recipe as ``<task>-<name>.yaml``: small, and with callbacks that do not look at the clock."""
    config = yaml.safe_load(recipes()[name].read_text())
    for part, values in copy.deepcopy({**TINY, **OTHERS}[name]).items():
        placed = {k: v.replace("FOLDER", str(folder)) if isinstance(v, str) else v for k, v in values.items()}
        config[part]["init_args"].update(placed)
    config["data"]["init_args"]["batch_size"] = GLOBAL_BATCH
    for callback in config["trainer"]["callbacks"]:
        callback["init_args"]["every_n_steps"] = 15
        if "budget" in callback["init_args"] or callback["class_path"].endswith(("Monitor", "StepRadius")):
            callback["init_args"]["budget"] = None
    config["trainer"].update(
        max_steps=STEPS, max_epochs=-1, val_check_interval=SAVED // 2, check_val_every_n_epoch=None,
        limit_val_batches=None, log_every_n_steps=1,
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    (folder / f"{name.replace('/', '-')}.yaml").write_text(yaml.safe_dump(config))


def write_all(folder: Path) -> None:
    (folder / "corpus").mkdir()
    for i in range(60):
        (folder / "corpus" / f"{i}.txt").write_text(f"{i} green bottles hang on the wall, {i * i} on the floor\n" * 4)
    pairs = [{"prompt": f"{i} + {i % 7} = ", "completion": str(i + i % 7)} for i in range(99)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    # Users with as many events each: then the mean of two ranks' mean losses is the mean of all.
    events = [f"u{user},{(user * user + time * (1 + user % 3)) % 30},{time}" for user in range(40) for time in range(8)]
    (folder / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *events]) + "\n")
    vectors = torch.randn(30, 12, generator=torch.Generator().manual_seed(0)) + 1
    write_vectors(folder / "vectors.parquet", [str(item) for item in range(30)], vectors.numpy())
    for name in (*TINY, *OTHERS):
        write(folder, name)
    (folder / "two.yaml").write_text("trainer: {devices: 2}\n")
    build({"model_type": "llama", **LLAMA}, 320, None, "sdpa").save_pretrained(folder / "hf")
    for stage in (1, 2, 3):
        # The default threshold would leave every parameter of so small a model whole.
        zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
        config = {"zero_allow_untested_optimizer": True, "zero_optimization": zero}
        strategy = {"class_path": "evolute.strategies.CPUDeepSpeedStrategy", "init_args": {"config": config}}
        text = yaml.safe_dump({"trainer": {"devices": 2, "strategy": strategy}})
        (folder / f"zero{stage}.yaml").write_text(text)


class Killed(BaseException):
    pass


class KillAt(Callback):
    """Ends the process, as far as a test can, after so many optimizer steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step >= self.step:
            raise Killed


class PoisonedPretrain(Pretrain):
    """The second rank's loss is not a number in one batch (the only rank's, if there is one)."""

    def loss_on(self, batch: Any) -> Any:
        loss, *others = super().loss_on(batch)
        if self.training and self.trainer.global_step == 4 and self.trainer.global_rank == self.trainer.world_size - 1:
            loss = loss * float("nan")
        return loss, *others


def evolute(
    command: str, folder: Path, recipe: str, *arguments: str, configs: tuple[str, ...] = (), batch: int = 4
) -> None:
    """Run a command in this process."""
    from evolute.cli import train

    files = [str(folder / f"{recipe.replace('/', '-')}.yaml"), *configs]
    args = [word for file in files for word in ("--config", file)]
    assert train(command, [*args, "--data.init_args.batch_size", str(batch), *arguments], [recipe]) == 0


def fit(folder: Path, recipe: str, run: str, *arguments: str, **options: Any) -> None:
    """Run ``evolute fit``."""
    place = ("--run", str(folder / recipe / run), "--checkpoint_every", str(SAVED))
    evolute("fit", folder, recipe, *place, *arguments, **options)


def killed(folder: Path, recipe: str, run: str, step: int, *arguments: str, **options: Any) -> None:
    """Begin a run that ends after so many steps without a word."""
    callback = {"class_path": "tests.recipes.test_strategies.KillAt", "init_args": {"step": step}}
    try:
        fit(folder, recipe, run, "--trainer.callbacks+", json.dumps(callback), *arguments, **options)
    except Killed:
        return
    raise AssertionError


def special(folder: Path, name: str) -> tuple[str, ...]:
    """Arguments of the runs that only the language model makes."""
    if name == "poisoned":
        return "--model.class_path", "tests.recipes.test_strategies.PoisonedPretrain", "--trainer.max_steps", "10"
    return (
        "--model.init_args.config",
        "null",
        "--model.init_args.model",
        str(folder / "hf"),
        "--trainer.max_steps",
        "10",
    )


def pair(folder: Path) -> None:
    """What two processes do."""
    zero = {stage: (str(folder / f"zero{stage}.yaml"),) for stage in (1, 2, 3)}
    zero = {**zero, **{name: (str(strategies()[f"strategy/{name}"]), str(folder / "two.yaml")) for name in TORCH}}
    for recipe, run in COMPARED:
        fit(folder, recipe, run, configs=zero[run if run in TORCH else int(run[-1])])
    for recipe in TINY:
        for stage in (1, 2, 3):
            fit(folder, recipe, f"zero{stage}", configs=zero[stage])
            killed(folder, recipe, f"bf16-{stage}", 4, "--trainer.precision", "bf16-mixed", configs=zero[stage])
        for stage in (2, 3):
            killed(folder, recipe, f"cut{stage}", SAVED + 3, configs=zero[stage])
            half = checkpoint(folder, recipe, f"cut{stage}", 2 * SAVED).with_suffix(".tmp") / "checkpoint"
            half.mkdir(parents=True, exist_ok=True)
            (half / "zero_pp_rank_7_mp_rank_00_optim_states.pt").touch()
            fit(folder, recipe, f"cut{stage}", "--resume", "true", configs=zero[stage])
        for name in TORCH:
            fit(folder, recipe, name, configs=zero[name])
        for source, target in CROSSINGS:
            saved = str(checkpoint(folder, recipe, source, SAVED * 2))
            fit(folder, recipe, f"{source}-{target}", "--ckpt_path", saved, configs=zero[target])
        for source, target in VALIDATED:
            saved = str(checkpoint(folder, recipe, source, SAVED * 2))
            said = folder / recipe / f"validated-{target}.{os.environ['LOCAL_RANK']}"
            with said.open("w") as file, contextlib.redirect_stdout(file):
                evolute("validate", folder, recipe, "--ckpt_path", saved, configs=zero[target])
    for name in SPECIAL:
        for stage in (2, 3):
            fit(folder, "llm/pretrain", f"{name}-{stage}", *special(folder, name), configs=zero[stage])


def checkpoint(folder: Path, recipe: str, run: str, step: int) -> Path:
    return folder / recipe / run / "checkpoints" / f"step={step:08d}.ckpt"


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if v and "time" not in k and "per_s" not in k} for row in table]


def losses(folder: Path, recipe: str, run: str) -> dict[int, float]:
    """Return the validation loss by step."""
    return {int(r["step"]) + 1: float(r["val/loss"]) for r in rows(folder / recipe / run) if "val/loss" in r}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of one process and of two."""
    folder = tmp_path_factory.mktemp("strategies")
    write_all(folder)
    for recipe in (*TINY, *OTHERS):
        fit(folder, recipe, "single", batch=GLOBAL_BATCH)
    for name in SPECIAL:
        fit(folder, "llm/pretrain", f"{name}-0", *special(folder, name), batch=GLOBAL_BATCH)
    run_pair(__file__, folder, 850)
    return folder


def test_every_recipe_has_a_tiny_version():
    assert {*TINY, *OTHERS, *ELSEWHERE} == set(recipes())


@pytest.mark.parametrize(("recipe", "run"), COMPARED)
def test_other_recipes_validate_under_two_processes_as_in_one(runs, recipe, run):
    single, found = (
        {
            int(r["step"]): {k: float(v) for k, v in r.items() if k.startswith("val/")}
            for r in rows(runs / recipe / name)
        }
        for name in ("single", run)
    )
    assert found.keys() == single.keys()
    last = [values for values in single.values() if values][-1]
    assert "val/loss" in last or "val/ndcg@10" in last
    for step, values in single.items():
        assert found[step] == pytest.approx(values, rel=0.01), step


@pytest.mark.parametrize("recipe", TINY)
@pytest.mark.parametrize("run", ["zero1", "zero2", "zero3", "ddp", "fsdp2"])
def test_two_processes_reach_the_loss_of_one_on_the_same_batches(runs, recipe, run):
    single, found = losses(runs, recipe, "single"), losses(runs, recipe, run)
    assert found.keys() == single.keys()
    assert STEPS in found
    for step, loss in single.items():
        assert found[step] == pytest.approx(loss, rel=0.01), step
    assert single[STEPS] < 0.9 * single[SAVED // 2]


@pytest.mark.parametrize("recipe", TINY)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_begins_as_float32_does(runs, recipe, stage):
    bf16, fp32 = (
        [float(r["train/loss"]) for r in rows(runs / recipe / run) if "train/loss" in r][:3]
        for run in (f"bf16-{stage}", f"zero{stage}")
    )
    assert bf16 == pytest.approx(fp32, rel=0.02)
    assert len(bf16) == 3
    assert bf16 != fp32


def plain(value: Any) -> Any:
    """Make values comparable, without what the clock says."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in ("spent", "elapsed")}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return (str(value.dtype), value.tolist()) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("recipe", TINY)
@pytest.mark.parametrize("stage", [2, 3])
def test_killed_and_resumed_equals_uninterrupted(runs, recipe, stage):
    whole, cut = (load_checkpoint(checkpoint(runs, recipe, f"{run}{stage}", STEPS)) for run in ("zero", "cut"))
    assert whole.keys() == cut.keys()
    for key in whole:
        if key == "callbacks":
            whole[key], cut[key] = ({k: v for k, v in c[key].items() if "KillAt" not in k} for c in (whole, cut))
        assert plain(whole[key]) == plain(cut[key]), key
    assert rows(runs / recipe / f"zero{stage}") == rows(runs / recipe / f"cut{stage}")
    assert [p.name for p in sorted((runs / recipe / f"cut{stage}" / "checkpoints").iterdir())] == [
        f"step={2 * SAVED:08d}.ckpt", f"step={STEPS:08d}.ckpt",
    ]  # fmt: skip


@pytest.mark.parametrize("recipe", TINY)
@pytest.mark.parametrize(("written", "opened"), CROSSINGS)
def test_a_checkpoint_goes_on_under_another_strategy(runs, recipe, written, opened):
    run = f"{written}-{opened}"
    source = losses(runs, recipe, written)
    assert losses(runs, recipe, run) == {STEPS: pytest.approx(source[STEPS], rel=1e-4)}
    same_moments(*(checkpoint(runs, recipe, name, STEPS) for name in (written, run)))


def same_moments(one: Path, other: Path) -> None:
    """Check that two optimizers hold nearly the same: one that began anew ten steps ago would not."""
    ours, theirs = (load_checkpoint(path)["optimizer_states"][0] for path in (one, other))
    for group, other in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert group["weight_decay"] == other["weight_decay"]
        for number, same in zip(group["params"], other["params"], strict=True):  # FSDP2 numbers through the module
            for key, value in ours["state"][number].items():
                assert (theirs["state"][same][key] - value).norm() <= 0.02 * value.norm(), (number, key)


@pytest.mark.parametrize("recipe", TINY)
@pytest.mark.parametrize(("written", "opened"), VALIDATED)
def test_a_checkpoint_is_validated_under_another_stage(runs, recipe, written, opened):
    said = [(runs / recipe / f"validated-{opened}.{rank}").read_text() for rank in (0, 1)]
    shown = re.search(r"val/loss\W+([\d.]+)", said[0])
    assert shown, said
    assert float(shown[1]) == pytest.approx(losses(runs, recipe, written)[2 * SAVED], rel=1e-5)
    assert said[1] == ""


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_loaded_model_and_a_loss_that_is_no_number_are_as_in_one_process(runs, name, stage):
    ours, theirs = (losses(runs, "llm/pretrain", f"{name}-{s}") for s in (0, stage))
    assert theirs == pytest.approx(ours, rel=1e-4)
    assert ours[10] < 5.8
    counts = [float(r["train/nonfinite"]) for r in rows(runs / "llm/pretrain" / f"{name}-{stage}")]
    assert counts[-1] == (name == "poisoned")


@pytest.mark.parametrize("recipe", TINY)
@pytest.mark.parametrize("run", ["zero1", "zero2", "zero3", "fsdp2"])
def test_a_checkpoint_goes_on_in_a_single_process(runs, recipe, run):
    saved = str(checkpoint(runs, recipe, run, 2 * SAVED))
    fit(runs, recipe, f"alone-{run}", "--ckpt_path", saved, batch=GLOBAL_BATCH)
    assert losses(runs, recipe, f"alone-{run}")[STEPS] == pytest.approx(losses(runs, recipe, run)[STEPS], rel=1e-4)
    same_moments(*(checkpoint(runs, recipe, name, STEPS) for name in (run, f"alone-{run}")))


@pytest.mark.parametrize("recipe", TINY)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_read_equals_deepspeeds_own_export(runs, recipe, stage):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    path = checkpoint(runs, recipe, f"zero{stage}", STEPS)
    assert layout(path) == (stage, 2)
    ours, theirs = load_checkpoint(path)["state_dict"], get_fp32_state_dict_from_zero_checkpoint(str(path))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value.contiguous()), name


def test_a_model_is_exported_from_a_directory(runs, tmp_path):
    from transformers import AutoModelForCausalLM

    from evolute.recipes.llm import export

    path = checkpoint(runs, "llm/pretrain", "zero3", STEPS)
    model = AutoModelForCausalLM.from_pretrained(export(path, tmp_path / "hf"))
    for name, value in load_checkpoint(path)["state_dict"].items():
        assert torch.equal(model.state_dict()[name.removeprefix("model.")], value), name


def main(folder: str) -> None:
    torch.set_num_threads(1)
    pair(Path(folder))
    torch.save({}, Path(folder) / f"{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    from tests.recipes import test_strategies  # by the name under which the configurations find its callback

    test_strategies.main(sys.argv[1])

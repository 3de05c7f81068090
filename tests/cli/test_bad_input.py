"""Bad input: one line on stderr, exit code 2, and nothing written."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from evolute.recipes.llm import Pretrain
from tests.cli.conftest import ENVIRONMENT, EXECUTABLE, Result, execute, recipe

CALLBACK = "trainer.callbacks.0"


def contents(folder: Path) -> dict[str, str]:
    """Every file and folder below, with a hash of its bytes and the time it was last changed."""
    return {
        p.relative_to(folder).as_posix(): (hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder")
        + str(p.stat().st_mtime_ns)
        for p in folder.rglob("*")
    }


def refused(result: Result, *parts: str) -> None:
    assert result.code == 2, result
    assert result.err.startswith("evolute: error: "), result.err
    assert result.err.count("\n") == 1, result.err
    assert result.err.endswith("\n")
    assert "Traceback" not in result.err + result.out
    assert result.out == ""
    for part in parts:
        assert part in result.err, (part, result.err)


class TwoOptimizers(Pretrain):
    """What no ZeRO can shard."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([p], lr=0.1) for p in list(self.parameters())[:2]], []


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, corpus, evolute) -> Path:
    """A folder with a finished run, checkpoints of all kinds, a small-vocabulary model and an empty folder."""
    shelf = tmp_path_factory.mktemp("shelf")
    result = evolute("fit", "--config", recipe(shelf, corpus), "--run", "run", cwd=shelf)
    assert result.code == 0, result.err
    good = shelf / "run" / "checkpoints" / "step=00000006.ckpt"
    whole = good.read_bytes()
    (shelf / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    (shelf / "none.ckpt").write_bytes(b"")
    (shelf / "text.ckpt").write_text("no checkpoint\n")
    state = torch.load(good, weights_only=True)
    torch.save(state | {"evolute": state["evolute"] | {"module": "elsewhere.Ranker"}}, shelf / "other.ckpt")
    torch.save({"state_dict": state["state_dict"]}, shelf / "foreign.ckpt")
    torch.save({"anything": Path("unsafe")}, shelf / "unsafe.ckpt")
    (shelf / "empty").mkdir()
    result = evolute("fit", "--config", "tiny.yaml", *ZERO, "--run", "zero", cwd=shelf)
    assert result.code == 0, result.err
    for name in ("zero-half", "zero-missing", "zero-unnamed", "zero-other"):
        shutil.copytree(shelf / "zero" / "checkpoints" / "step=00000006.ckpt", shelf / name)
    piece = "checkpoint/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    whole = (shelf / "zero-half" / piece).read_bytes()
    (shelf / "zero-half" / piece).write_bytes(whole[: len(whole) // 2])
    (shelf / "zero-missing" / piece).unlink()
    (shelf / "zero-unnamed" / "latest").unlink()
    model = shelf / "zero-other" / "checkpoint" / "mp_rank_00_model_states.pt"
    state = torch.load(model, weights_only=True)
    torch.save(state | {"evolute": state["evolute"] | {"module": "elsewhere.Ranker"}}, model)
    (shelf / "tiny").mkdir()
    (shelf / "tiny" / "a.txt").write_text("too little")
    (shelf / "locked").mkdir(mode=0o500)

    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=64, **sizes)).save_pretrained(
        shelf / "model64"
    )
    return shelf


HF = {"model.init_args.config": ..., "model.init_args.model": "SHELF/model64"}
ZERO = ["--config", "strategy/zero2_cpu", "--trainer.devices", "1"]
# name: (changes of the recipe, more arguments, what the line says)
CASES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "key-top": ({"trainr": {"max_steps": 3}}, [], ["'trainr", "did you mean 'trainer'"]),
    "key-top-argument": ({}, ["--trainr.max_steps", "3"], ["--trainr.max_steps", "did you mean 'trainer'"]),
    "key-option": ({}, ["--runn", "x"], ["--runn", "did you mean 'run'"]),
    "key-trainer": ({"trainer.max_step": 3}, [], ["'trainer.max_step'", "did you mean 'trainer.max_steps'"]),
    "key-trainer-argument": ({}, ["--trainer.max_step", "3"], ["did you mean 'trainer.max_steps'"]),
    "key-model": ({"model.init_args.optimizr": "sgd"}, [], ["model", "'optimizr'", "did you mean 'optimizer'"]),
    "key-data": ({"data.init_args.contxt": 3}, [], ["data", "'contxt'", "did you mean 'context'"]),
    "key-data-argument": ({}, ["--data.init_args.contxt", "3"], ["data", "'contxt'", "did you mean 'context'"]),
    "key-callback": ({f"{CALLBACK}.init_args.alfa": 3}, [], ["callbacks", "'alfa'", "did you mean 'alpha'"]),
    "class-callback": (
        {f"{CALLBACK}.class_path": "evolute.callbacks.NoiseAdaptivLR"}, [], ["did you mean 'NoiseAdaptiveLR'"]
    ),
    "class-model": ({"model.class_path": "evolute.recipes.llm.Pretrainer"}, [], ["did you mean 'Pretrain'"]),
    "argument-stray": ({}, ["oops"], ["oops"]),
    "no-model": ({"model": ...}, [], ["lacks 'model'"]),
    "no-data": ({"data": ...}, [], ["data"]),
    "type-trainer": ({}, ["--trainer.max_steps", "many"], ["trainer.max_steps", "int", "many"]),
    "type-model": ({"model.init_args.lr": "fast"}, [], ["lr", "float", "fast"]),
    "type-choice": ({"model.init_args.optimizer": "adamww"}, [], ["optimizer", "'adamw'", "adamww"]),
    "range-model": ({"model.init_args.lr": -1.0}, [], ["lr=-1.0", "positive"]),
    "range-data": ({"data.init_args.context": 0}, [], ["context=0", "at least 1"]),
    "corpus-missing": ({"data.init_args.source": "./nowhere"}, [], ["'./nowhere'", "no such"]),
    "corpus-empty": ({"data.init_args.source": "SHELF/empty"}, [], ["SHELF/empty", "holds no"]),
    "corpus-small": ({"data.init_args.source": "SHELF/tiny"}, [], ["SHELF/tiny", "1 documents", "use more text"]),
    "corpus-hash": ({"data.init_args.sha256": "abc"}, [], ["sha256='abc'", "restore it"]),
    "tokenizer-missing": ({"data.init_args.tokenizer": "./nowhere"}, [], ["tokenizer='./nowhere'"]),
    "tokenizer-offline": ({"data.init_args.tokenizer": "no-such-tokenizer"}, [], ["tokenizer='no-such-tokenizer'"]),
    "tokenizer-of-another-model": (HF, [], ["'byte'", "257", "64", "the model's own tokenizer"]),
    "model-missing": ({**HF, "model.init_args.model": "./nowhere"}, [], ["'./nowhere'"]),
    "nothing-to-adapt": ({f"{CALLBACK}.init_args.layers": "nothing.*"}, [], ["'nothing.*'", "nothing to adapt"]),
    "strategy-fsdp": ({}, ["--trainer.strategy", "fsdp"], ["fsdp"]),
    "strategy-deepspeed": ({}, ["--trainer.strategy", "deepspeed"], ["DeepSpeed"]),
    "zero-scion": ({"model.init_args.optimizer": "scion"}, ZERO, ["'scion'", "whole matrices", "optimizer adamw"]),
    "zero-muon": ({"model.init_args.optimizer": "muon_adamw"}, ZERO, ["'muon_adamw'", "whole matrices"]),
    "zero-optimizers": (
        {"model.class_path": "tests.cli.test_bad_input.TwoOptimizers", "trainer.callbacks": []}, ZERO,
        ["single optimizer"],
    ),
    "zero-on-processors": ({}, ["--config", "strategy/zero3", "--trainer.accelerator", "cpu"], ["strategy/zero2_cpu"]),
    "zero-offload": (
        {}, ["--config", "strategy/zero3_offload", "--trainer.accelerator", "cpu"], ["GPUs", "strategy/zero2_cpu"]
    ),
    "zero-offload-cpu": (
        {}, [*ZERO, "--trainer.strategy.init_args.offload_optimizer", "true"], ["offload_optimizer", "CPUAdam"]
    ),
    "zero-argument": ({}, [*ZERO, "--trainer.strategy.init_args.stge", "2"], ["'stge'", "did you mean 'stage'"]),
    "fsdp2-scion": (
        {"model.init_args.optimizer": "scion"}, ["--config", "strategy/fsdp2", "--trainer.devices", "1"],
        ["'scion'", "whole matrices"],
    ),
    "strategy-unknown": ({}, ["--trainer.strategy", "dpd"], ["dpd"]),
    "alpha": ({f"{CALLBACK}.init_args.alpha": 0}, [], ["NoiseAdaptiveLR(alpha=0.0)", "above 0"]),
    "every_n_steps": ({f"{CALLBACK}.init_args.every_n_steps": 0}, [], ["every_n_steps=0", "at least 1"]),
    "checkpoint_every": ({}, ["--checkpoint_every", "0"], ["every_n_steps=0", "at least 1"]),
    "endless": ({"trainer.max_steps": ...}, ["--trainer.max_epochs", "-1"], ["'cosine'", "set trainer.max_steps"]),
    "checkpoint-missing": ({}, ["--ckpt_path", "no.ckpt"], ["no checkpoint at no.ckpt"]),
    "checkpoint-half": ({}, ["--ckpt_path", "SHELF/half.ckpt"], ["SHELF/half.ckpt", "truncated"]),
    "checkpoint-empty": ({}, ["--ckpt_path", "SHELF/none.ckpt"], ["SHELF/none.ckpt", "truncated"]),
    "checkpoint-text": ({}, ["--ckpt_path", "SHELF/text.ckpt"], ["SHELF/text.ckpt", "no checkpoint"]),
    "checkpoint-unsafe": ({}, ["--ckpt_path", "SHELF/unsafe.ckpt"], ["SHELF/unsafe.ckpt", "no checkpoint"]),
    "checkpoint-other": ({}, ["--ckpt_path", "SHELF/other.ckpt"], ["of elsewhere.Ranker", "not of evolute.recipes"]),
    "checkpoint-folder-half": ({}, ["--ckpt_path", "SHELF/zero-half"], ["SHELF/zero-half", "rank_0", "truncated"]),
    "checkpoint-folder-missing": ({}, ["--ckpt_path", "SHELF/zero-missing"], ["SHELF/zero-missing", "truncated"]),
    "checkpoint-folder-unnamed": ({}, ["--ckpt_path", "SHELF/zero-unnamed"], ["SHELF/zero-unnamed", "'latest'"]),
    "checkpoint-folder-other": ({}, ["--ckpt_path", "SHELF/zero-other"], ["of elsewhere.Ranker, not of"]),
    "checkpoint-folder": ({}, ["--ckpt_path", "SHELF/empty"], ["SHELF/empty", "'latest'"]),
    "checkpoint-foreign": ({}, ["--ckpt_path", "SHELF/foreign.ckpt"], ["not written by an evolute run"]),
    "checkpoint-other-data": (
        {"data.init_args.context": 16}, ["--ckpt_path", "SHELF/run/checkpoints/step=00000006.ckpt"],
        ["context=32", "this run has 16"],
    ),
    "run-exists": ({}, ["--run", "SHELF/run"], ["SHELF/run holds a run already", "--resume"]),
    "run-file": ({}, ["--run", "tiny.yaml"], ["tiny.yaml is not a folder"]),
    "run-below-a-file": ({}, ["--run", "tiny.yaml/run"], ["tiny.yaml"]),
    "run-locked": ({}, ["--run", "SHELF/locked/run"], ["SHELF/locked/run"]),
    "run-unwritable": ({}, ["--run", "/proc/run"], ["/proc/run"]),
    "root-dir": ({"trainer.default_root_dir": "here"}, [], ["'here'", "--run"]),
    "resume-what": ({}, ["--resume"], ["--resume needs --run"]),
    "resume-no-run": ({}, ["--resume", "--run", "SHELF/empty"], ["SHELF/empty holds no run"]),
    "resume-refused": (
        {f"{CALLBACK}.init_args.layers": "nothing.*", "trainer.max_steps": 9},
        ["--resume", "--run", "SHELF/run"], ["nothing to adapt"],
    ),
    "loggers-not-opened": (
        {f"{CALLBACK}.init_args.layers": "nothing.*"}, ["--wandb", "true", "--tensorboard", "true", "--run", "new"],
        ["nothing to adapt"],
    ),
}  # fmt: skip


def placed(value: Any, shelf: Path) -> Any:
    return value.replace("SHELF", str(shelf)) if isinstance(value, str) else value


@pytest.mark.parametrize("case", CASES)
def test_refused_in_one_line_and_nothing_written(case, evolute, shelf, corpus, tmp_path):
    if case == "run-locked" and os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    changes, args, parts = CASES[case]
    file = recipe(tmp_path, corpus, **{key: placed(value, shelf) for key, value in changes.items()})
    before = contents(tmp_path), contents(shelf)
    result = evolute("fit", "--config", file.name, *(placed(a, shelf) for a in args), cwd=tmp_path)
    assert (contents(tmp_path), contents(shelf)) == before
    refused(result, *(placed(p, shelf) for p in parts))


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["fitt"], ["'fitt'", "did you mean 'fit'"]),
        (["fit"], ["needs --config"]),
        (["fit", "--config"], ["--config needs"]),
        (["fit", "--config", "llm/pretrian"], ["'llm/pretrian'", "did you mean 'llm/pretrain'"]),
        (["fit", "--config", "broken.yaml"], ["broken.yaml, line 2", "not YAML"]),
        (["fit", "--config", "list.yaml"], ["list.yaml", "a list"]),
        (["fit", "--config", "empty.yaml"], ["empty.yaml", "nothing"]),
        (["fit", "--config", "bytes.yaml"], ["bytes.yaml", "UTF-8"]),
        (["recipes", "all"], ["'all'"]),
        (["export", "one"], ["CHECKPOINT FOLDER"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_refused_before_torch(args, parts, evolute, tmp_path):
    (tmp_path / "broken.yaml").write_text("a: [1,\nb: }{\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff\xfe")
    before = contents(tmp_path)
    result = evolute(*args, cwd=tmp_path)
    assert contents(tmp_path) == before
    refused(result, *parts)


@pytest.mark.parametrize("checkpoint", ["half.ckpt", "text.ckpt", "no.ckpt", "foreign.ckpt", "zero-half", "empty"])
def test_export_refuses(checkpoint, evolute, shelf, tmp_path):
    refused(evolute("export", shelf / checkpoint, "out", cwd=tmp_path), checkpoint)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("tokenizer-of-another-model", ["257"]),
        ("key-trainer", ["did you mean"]),
        ("nothing-to-adapt", ["nothing to adapt"]),
    ],
)
def test_the_executable_says_the_same(case, parts, evolute, shelf, corpus, tmp_path):
    changes, args, _ = CASES[case]
    recipe(tmp_path, corpus, **{key: placed(value, shelf) for key, value in changes.items()})
    command = ["fit", "--config", "tiny.yaml", *args]
    before = contents(tmp_path)
    cold = execute(*command, cwd=tmp_path)
    refused(cold, *parts)
    assert contents(tmp_path) == before
    assert cold == evolute(*command, cwd=tmp_path)


@pytest.mark.parametrize(
    ("key", "package"),
    [("wandb", "wandb"), ("tensorboard", "tensorboard"), ("model", "transformers"), ("zero", "deepspeed")],
)
def test_a_missing_extra_says_what_to_install(key, package, corpus, tmp_path):
    blocker = tmp_path / "site"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        f"hidden = lambda name, *more: None if name.split('.')[0] == {package!r} else find(name, *more)\n"
        "PathFinder.find_spec = staticmethod(hidden)\n"
        "import importlib.metadata as metadata\n"
        "known = metadata.Distribution.from_name\n"
        "def from_name(name):\n"
        f"    if name == {package!r}:\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return known(name)\n"
        "metadata.Distribution.from_name = staticmethod(from_name)\n"
    )
    work = tmp_path / "work"
    work.mkdir()
    recipe(work, corpus)
    before = contents(work)
    extra = {"model": "llm", "zero": "deepspeed"}.get(key, key)
    options = {"model": [], "zero": ["--config", "strategy/zero2_cpu"]}.get(key, [f"--{key}", "true"])
    path = f"{blocker}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}"
    refused(execute("fit", "--config", "tiny.yaml", *options, cwd=work, PYTHONPATH=path), f"evolute[{extra}]")
    assert contents(work) == before


@pytest.mark.parametrize(
    ("args", "code"),
    [(["--help"], 0), (["--version"], 0), (["recipes"], 0), (["fitt"], 2), (["fit", "--config", "llm/pretrian"], 2)],
)
def test_what_needs_no_torch_is_quick(args, code, tmp_path):
    start = time.perf_counter()
    assert execute(*args, cwd=tmp_path).code == code
    assert time.perf_counter() - start < 2.0
    script = (
        "import json, sys; from evolute.__main__ import main; code = main(json.loads(sys.argv[1]));"
        "print([m for m in ('torch', 'lightning', 'numpy', 'matplotlib') if m in sys.modules], code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(args)],
        cwd=tmp_path, env=os.environ | ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == f"[] {code}"
    assert EXECUTABLE.is_file()

"""The commands, from the executable down to what they leave in the run folder."""

import csv
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from evolute.folders import next_free, take
from tests.cli.conftest import ENVIRONMENT, EXECUTABLE, execute, recipe
from tests.cli.test_bad_input import contents
from tests.cli.test_kill import plain, rows


def checkpoint(run: Path, step: int = 6) -> Any:
    return torch.load(run / "checkpoints" / f"step={step:08d}.ckpt", weights_only=True)


def equal_runs(one: Path, other: Path, step: int = 6, but: tuple[str, ...] = ()) -> None:
    ours, theirs = checkpoint(one, step), checkpoint(other, step)
    assert ours.keys() == theirs.keys()
    for key in ours.keys() - set(but):
        assert plain(ours[key]) == plain(theirs[key]), key
    assert rows(one) == rows(other)


@pytest.fixture(scope="module")
def work(tmp_path_factory, corpus) -> Path:
    """A folder with a recipe and the run that the executable made of it."""
    work = tmp_path_factory.mktemp("work")
    recipe(work, corpus)
    result = execute("fit", "--config", "tiny.yaml", "--run", "run", "--model.init_args.lr=0.02", cwd=work)
    assert result.code == 0, result.err
    assert "Traceback" not in result.err
    assert result.out.startswith("run folder: run\n")
    return work


def test_fit_leaves_everything_in_the_run_folder(work):
    run = work / "run"
    names = {p.name for p in run.iterdir()}
    assert names == {"config.yaml", "environment.json", "metrics.csv", "checkpoints", "report.html", "samples.jsonl"}
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step=00000006.ckpt"]
    environment = json.loads((run / "environment.json").read_text())
    command = "evolute fit --config tiny.yaml --run run --model.init_args.lr=0.02"
    assert environment["command"] == command
    assert environment["versions"]["torch"] == torch.__version__
    text = (run / "config.yaml").read_text()
    assert text.startswith(f"# {command}\n")
    config = yaml.safe_load(text)
    assert config["model"]["init_args"]["lr"] == 0.02
    assert config["data"]["init_args"]["sha256"] == environment["sha256"]
    assert len(environment["sha256"]) == 64
    table = rows(run)
    assert [int(r["step"]) for r in table if "train/loss" in r] == list(range(6))
    assert all("val/loss" in table[i] for i in (2, 5))
    assert "Validation" in (run / "report.html").read_text()


def test_a_run_can_be_repeated_from_its_own_configuration(work, evolute):
    result = evolute("fit", "--config", "run/config.yaml", "--run", "again", cwd=work)
    assert result.code == 0, result.err
    equal_runs(work / "run", work / "again", but=("datamodule_hyper_parameters",))  # which has the sha256 now


def test_validate_gives_the_loss_that_fit_logged_last(work, evolute):
    before = contents(work)
    path = "run/checkpoints/step=00000006.ckpt"
    result = evolute("validate", "--config", "run/config.yaml", "--ckpt_path", path, cwd=work)
    assert result.code == 0, result.err
    shown = re.search(r"val/loss\W+([\d.]+)", result.out)
    assert shown, result.out
    assert float(shown[1]) == pytest.approx(float(rows(work / "run")[-1]["val/loss"]), rel=1e-6)
    assert contents(work) == before


def test_export_opens_in_transformers(work, evolute):
    from transformers import AutoModelForCausalLM

    result = evolute("export", "run/checkpoints/step=00000006.ckpt", "hf", cwd=work)
    assert (result.code, result.out, result.err) == (0, "wrote hf\n", "")
    model = AutoModelForCausalLM.from_pretrained(work / "hf")
    for name, value in checkpoint(work / "run")["state_dict"].items():
        if name != "model.lm_head.weight":
            assert torch.equal(model.state_dict()[name.removeprefix("model.")], value), name


def test_recipes_are_listed_with_what_they_are(evolute, tmp_path):
    result = evolute("recipes", cwd=tmp_path)
    assert result.code == 0
    assert re.search(r"^llm/pretrain +Train a small Llama from scratch", result.out, re.MULTILINE)


def test_packaged_recipes_are_found_by_name_and_a_local_file_wins(evolute, tmp_path):
    result = evolute("fit", "--config", "llm/pretrain", "--print_config", cwd=tmp_path)
    assert result.code == 0, result.err
    assert yaml.safe_load(result.out)["model"]["class_path"] == "evolute.recipes.llm.Pretrain"
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "pretrain").write_text("- local\n")
    assert "a list" in evolute("fit", "--config", "llm/pretrain", cwd=tmp_path).err


def test_help_lists_the_keys(evolute, tmp_path):
    result = evolute("fit", "--help", cwd=tmp_path)
    assert result.code == 0
    assert all(key in result.out for key in ("--run", "--resume", "--trainer.max_steps", "--wandb"))
    assert not list(tmp_path.iterdir())


def test_doctor_version_and_usage(evolute, tmp_path):
    from evolute import __version__

    result = evolute("doctor", cwd=tmp_path)
    assert result.code == 0
    assert all(part in result.out for part in (torch.__version__, "extra llm", "threads", "SLURM", "CPU only"))
    assert "logged in" in result.out
    assert evolute("--version", cwd=tmp_path).out == f"evolute {__version__}\n"
    assert evolute(cwd=tmp_path).code == 2
    assert not list(tmp_path.iterdir())


def test_report_of_one_run_and_of_two(work, evolute):
    (work / "run" / "report.html").unlink()
    assert evolute("report", "run", cwd=work).code == 0
    assert (work / "run" / "report.html").stat().st_size > 1000
    assert evolute("report", "run", "run", "--out", "both.html", cwd=work).code == 0
    assert (work / "both.html").stat().st_size > 1000
    missing = evolute("report", "nowhere", cwd=work)
    assert (missing.code, missing.err.count("\n")) == (2, 1)


def test_resuming_a_finished_run_says_so_and_changes_nothing(work, evolute):
    before = contents(work / "run")
    result = evolute("fit", "--config", "run/config.yaml", "--run", "run", "--resume", cwd=work)
    assert result.code == 0, result.err
    assert "run is finished, at step 6" in result.out
    after = contents(work / "run")
    for folder in (before, after):
        folder.pop("report.html")
    assert after == before


@pytest.mark.parametrize("epochs", [False, True])
def test_a_finished_run_goes_on_as_if_it_had_been_longer(epochs, evolute, corpus, tmp_path):
    short, long = ("1", "2") if epochs else ("6", "12")
    key = "--trainer.max_epochs" if epochs else "--trainer.max_steps"
    changes = {"trainer.max_steps": -1, "trainer.limit_train_batches": 6} if epochs else {}
    recipe(tmp_path, corpus, **{"model.init_args.schedule": "constant", "model.init_args.warmup": 0, **changes})
    fit = ["fit", "--config", "tiny.yaml", key]
    assert evolute(*fit, long, "--run", "whole", cwd=tmp_path).code == 0
    assert evolute(*fit, short, "--run", "parts", cwd=tmp_path).code == 0
    first = (tmp_path / "parts" / "config.yaml").read_bytes()
    result = evolute(*fit, long, "--run", "parts", "--resume", cwd=tmp_path)
    assert result.code == 0, result.err
    assert (tmp_path / "parts" / "config.yaml").read_bytes() == first
    later = yaml.safe_load((tmp_path / "parts" / "config.1.yaml").read_text())
    assert str(later["trainer"][key.rpartition(".")[2]]) == long
    # Lightning counts an epoch that max_steps cuts short as a whole one: only the numbers of epochs differ then.
    ours, theirs = checkpoint(tmp_path / "whole", 12), checkpoint(tmp_path / "parts", 12)
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "global_step"):
        assert plain(ours[name]) == plain(theirs[name]), name
    drop = {} if epochs else {"epoch": "?"}
    ours, theirs = ([row | drop for row in rows(tmp_path / name)] for name in ("whole", "parts"))
    assert ours == theirs


def test_without_a_length_a_run_lasts_one_epoch(evolute, corpus, tmp_path):
    recipe(tmp_path, corpus, **{"trainer.max_steps": ..., "trainer.limit_train_batches": 4})
    result = evolute("fit", "--config", "tiny.yaml", "--run", "run", cwd=tmp_path)
    assert result.code == 0, result.err
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["max_epochs"] == 1
    assert checkpoint(tmp_path / "run", 4)["global_step"] == 4


@pytest.mark.slow
def test_runs_get_folders_of_their_own_also_when_two_start_at_once(corpus, tmp_path):
    recipe(tmp_path, corpus)
    (tmp_path / "runs" / "tiny-3").mkdir(parents=True)
    command = [EXECUTABLE, "fit", "--config", "tiny.yaml", "--trainer.max_steps", "2"]
    both = [
        subprocess.Popen(command, cwd=tmp_path, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert {out.splitlines()[0] for out in said} == {"run folder: runs/tiny-4", "run folder: runs/tiny-5"}
    for name in ("tiny-4", "tiny-5"):
        run = tmp_path / "runs" / name
        assert [int(r["step"]) for r in rows(run)] == [0, 1]
        assert len(list(run.glob("checkpoints/*"))) == len(list(run.glob("report.html"))) == 1
    assert not list((tmp_path / "runs" / "tiny-3").iterdir())


def test_a_number_taken_meanwhile_is_passed_over(tmp_path):
    proposal = next_free(tmp_path, "a-b")
    assert proposal == tmp_path / "a-b-1"
    assert [take(proposal).name for _ in range(3)] == ["a-b-1", "a-b-2", "a-b-3"]
    (tmp_path / "a-b-11").mkdir()
    (tmp_path / "a-b-x").mkdir()
    assert next_free(tmp_path, "a-b").name == "a-b-12"


@pytest.mark.slow
def test_two_runs_told_to_use_one_folder_do_not_mix(corpus, tmp_path):
    recipe(tmp_path, corpus)
    command = [EXECUTABLE, "fit", "--config", "tiny.yaml", "--trainer.max_steps", "2", "--run", "run"]
    both = [
        subprocess.Popen(
            command, cwd=tmp_path, env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[1].decode() for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    loser = next(err for err, process in zip(said, both, strict=True) if process.returncode == 2)
    assert loser.startswith("evolute: error: ")
    assert loser.count("\n") == 1
    assert [int(r["step"]) for r in rows(tmp_path / "run")] == [0, 1]


def test_ctrl_c_ends_quietly_with_130_and_a_report(evolute, corpus, tmp_path):
    recipe(
        tmp_path,
        corpus,
        **{"trainer.max_steps": 2000, "trainer.callbacks": [{"class_path": "tests.cli.test_kill.Slow"}]},
    )
    pid = evolute.start("fit", "--config", "tiny.yaml", "--run", "run", "--checkpoint_every", "2", cwd=tmp_path)
    end = time.monotonic() + 60
    while evolute.out.read_text().count("TRAINING") < 5 and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(pid, signal.SIGINT)
    result = evolute.wait()
    assert result.code == 130
    assert "Traceback" not in result.err
    assert "Interrupt" not in result.err
    assert (tmp_path / "run" / "report.html").is_file()
    with (tmp_path / "run" / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) >= 4


def test_errors_after_the_start_keep_their_traceback(evolute, corpus, tmp_path):
    recipe(tmp_path, corpus, **{"model.init_args.on_nonfinite": "raise", "model.init_args.lr": 1e30})
    result = evolute(
        "fit", "--config", "tiny.yaml", "--run", "run", "--trainer.gradient_clip_val", "null", cwd=tmp_path
    )
    assert result.code == 1
    assert "Traceback" in result.err
    assert "not finite" in result.err


def test_an_error_before_the_start_shows_its_traceback_when_asked(evolute, corpus, tmp_path):
    recipe(tmp_path, corpus, **{"data.init_args.source": "./nowhere"})
    result = evolute("fit", "--config", "tiny.yaml", cwd=tmp_path, EVOLUTE_DEBUG="1")
    assert result.code == 1
    assert "Traceback" in result.err
    assert "FileNotFoundError" in result.err

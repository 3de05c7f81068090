"""Splatting at the command line: a scene in COLMAP form to a .ply and a report, and bad input in one line."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from evolute.data.scenes import make_room, write_cloud
from evolute.models.splatting import read_ply
from evolute.registry import recipes


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a small scene in COLMAP form alone, and the packaged recipe cut down to it."""
    place = tmp_path_factory.mktemp("place")
    make_room(place / "scene", views=9, width=40, height=33, lidar=3000)
    (place / "scene" / "transforms.json").unlink()
    config = yaml.safe_load(recipes()["splatting/gtlr"].read_text())
    config["data"]["init_args"]["source"] = "scene"
    config["model"]["init_args"] |= {"budget": 300, "neighbours": 16}
    config["trainer"] |= {"max_steps": 12, "val_check_interval": 6, "accelerator": "cpu", "log_every_n_steps": 1}
    for callback in config["trainer"]["callbacks"]:
        if callback["class_path"].endswith("GaussianDensify"):
            callback["init_args"] |= {"budget": 300, "every_n_steps": 4, "start": 4, "stop": 1.0}
        if callback["class_path"].endswith("RenderVideo"):
            callback["init_args"]["frames"] = 4
    (place / "small.yaml").write_text(yaml.safe_dump(config))
    return place


def test_the_packaged_recipe_runs_on_a_colmap_project_and_leaves_a_scene_a_flight_and_a_report(place, evolute):
    done = evolute("fit", "--config", "small.yaml", "--run", "run", "--trainer.enable_progress_bar", "false", cwd=place)
    assert done.code == 0, done.err
    run = place / "run"
    assert {"scene.ply", "flight.webp", "report.html", "metrics.csv", "config.yaml"} <= {p.name for p in run.iterdir()}
    assert len(read_ply(run / "scene.ply")) <= 300
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows if r["densify/gaussians"]] == [3, 7, 11]
    assert max(float(r["densify/gaussians"]) for r in rows if r["densify/gaussians"]) <= 300
    assert len([r for r in rows if r["val/psnr"]]) == 2
    page = (run / "report.html").read_text()
    assert "Held-out views" in page
    assert "Validation, PSNR in dB" in page
    assert {p.name for p in (run / "arrays" / "views").iterdir()} == {"0", "8"}


REFUSED = {
    "an image that no pose knows": lambda s: shutil.copy(s / "images/0000.png", s / "images/extra.png"),
    "a pose without its image": lambda s: (s / "images/0002.png").unlink(),
    "depth of another size": lambda s: np.save(s / "depth/0001.npy", np.ones((4, 4))),
    "a cloud of one point": lambda s: write_cloud(s / "lidar.ply", np.zeros((1, 3)), np.zeros((1, 3))),
    "no focal length": lambda s: (s / "sparse/0/cameras.txt").write_text("1 PINHOLE 40 33 0 0 20 16\n"),
}
NAMED = ("extra.png", "0002.png", "0001.npy", "lidar.ply", "images.txt")


@pytest.mark.parametrize(("what", "named"), list(zip(REFUSED, NAMED, strict=True)))
def test_bad_scenes_are_one_line_exit_code_2_and_nothing_written(what, named, place, evolute, tmp_path):
    shutil.copytree(place / "scene", tmp_path / "scene")
    shutil.copy(place / "small.yaml", tmp_path)
    REFUSED[what](tmp_path / "scene")
    done = evolute("fit", "--config", "small.yaml", "--run", "run", cwd=tmp_path)
    assert done.code == 2, done.err
    assert done.err.startswith("evolute: error: ")
    assert done.err.count("\n") == 1
    assert named in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model.init_args.budget", "0"), "budget=0"),
        (("--model.init_args.budget", "5000"), "exceeds the 3000 points"),
        (("--data.init_args.source", "nowhere"), "no such file or folder"),
    ],
)
def test_bad_arguments_are_refused_before_training(arguments, message, place, evolute):
    done = evolute("fit", "--config", "small.yaml", "--run", "bad", *arguments, cwd=place)
    assert done.code == 2, done.err
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not (place / "bad").exists()

"""Recommenders from the command line: fit, resume, predict, item vectors, and what each refuses."""

import hashlib
import zipfile

import numpy as np
import pytest
import torch
import yaml
from pyarrow import parquet

from evolute.data import movielens
from tests.data.test_interactions import rows, write_csv


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a log, texts and a recipe."""
    folder = tmp_path_factory.mktemp("recommender")
    write_csv(folder / "log.csv", rows(users=40, items=30))
    from evolute.geometry import write_vectors

    table = np.random.default_rng(0).normal(size=(30, 12)).astype(np.float32) + 1
    write_vectors(folder / "v.parquet", [str(i) for i in range(30)], table)
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "evolute.recipes.recommender.Recommend",
            "init_args": {"encoder": "gru4rec", "dim": 8, "encoder_args": {"hidden": 8}, "init": "rec_pca", "lr": 0.01,
                          "top_k": 5},
        },
        "data": {
            "class_path": "evolute.data.InteractionDataModule",
            "init_args": {"source": "log.csv", "max_len": 4, "batch_size": 8, "vectors": "v.parquet"},
        },
        "trainer": {
            "accelerator": "cpu", "devices": 1, "max_steps": 12, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
            "enable_model_summary": False, "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "evolute.callbacks.ItemEmbeddingNorm", "init_args": {"every_n_steps": 4}},
                {"class_path": "evolute.callbacks.ItemGeometry", "init_args": {"every_n_steps": 4, "budget": None}},
            ],
        },
        "checkpoint_every": 6,
    }  # fmt: skip
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder


def state(run, step):
    return torch.load(run / "checkpoints" / f"step={step:08d}.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def run(work, evolute):
    result = evolute("fit", "--config", "tiny.yaml", "--run", "run", cwd=work)
    assert result.code == 0, result.err
    return work / "run"


def test_a_run_measures_its_items_and_reports_them(run):
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss", "train/self_logit", "val/ndcg@10", "item_norm/stored_ratio", "item_geometry/kappa_hess",
            "item_geometry/tv_ratio"} <= set(header)  # fmt: skip
    page = (run / "report.html").read_text()
    assert "Geometry of the item vectors" in page
    assert "Ranking" in page


def test_an_interrupted_run_ends_where_a_whole_one_does(work, run, evolute):
    first = evolute("fit", "--config", "tiny.yaml", "--run", "parts", "--trainer.max_steps", "6", cwd=work)
    assert first.code == 0, first.err
    second = evolute("fit", "--config", "tiny.yaml", "--run", "parts", "--resume", cwd=work)
    assert second.code == 0, second.err
    whole, parts = state(run, 12)["state_dict"], state(work / "parts", 12)["state_dict"]
    assert "item_emb.parametrizations.weight.original" in whole
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_predict_writes_the_best_items_nobody_has_seen(work, run, evolute):
    ckpt = "run/checkpoints/step=00000012.ckpt"
    result = evolute("predict", "--config", "tiny.yaml", "--ckpt_path", ckpt, "--run", "served", cwd=work)
    assert result.code == 0, result.err
    table = parquet.read_table(work / "served" / "recommendations.parquet").to_pydict()
    seen = {(user, item) for user, item, _ in rows(users=40, items=30)}
    assert len(table["user"]) == 40 * 5
    assert not seen & set(zip(table["user"], table["item"], strict=True))
    for start in range(0, 200, 5):
        assert table["rank"][start : start + 5] == [1, 2, 3, 4, 5]
        assert table["score"][start : start + 5] == sorted(table["score"][start : start + 5], reverse=True)
    assert max(abs(s) for s in table["score"]) <= 10 + 1e-4  # cosines over a temperature of 0.1: the norm is on


def test_test_ranks_every_user_once(work, run, evolute):
    ckpt = "run/checkpoints/step=00000012.ckpt"
    result = evolute("test", "--config", "tiny.yaml", "--ckpt_path", ckpt, cwd=work)
    assert result.code == 0, result.err
    assert "test/ndcg@10" in result.out
    assert "items, those of the history kept in" in result.out + result.err


def test_curvature_radius_and_noise_are_measured_beside_the_norm(work, evolute):
    config = yaml.safe_load((work / "tiny.yaml").read_text())
    config["trainer"]["callbacks"] += [
        {"class_path": "evolute.callbacks.CurvatureMonitor", "init_args": {"every_n_steps": 6, "budget": None}},
        {"class_path": "evolute.callbacks.StepRadius", "init_args": {"every_n_steps": 6, "budget": None}},
        {"class_path": "evolute.callbacks.NoiseAdaptiveLR", "init_args": {"every_n_steps": 2}},
    ]
    (work / "all.yaml").write_text(yaml.safe_dump(config))
    result = evolute("fit", "--config", "all.yaml", "--run", "all", cwd=work)
    assert result.code == 0, result.err
    header = (work / "all" / "metrics.csv").read_text().splitlines()[0].split(",")
    names = {"curvature/sharpness", "step/ghost_ratio", "noise/time_ms", "item_geometry/kappa_hess"}
    assert names <= set(header)


@pytest.mark.parametrize("encoder", ["sasrec", "bert4rec", "lightgcn"])
def test_every_encoder_trains_with_the_norm(encoder, work, evolute):
    arguments = ["--model.init_args.encoder", encoder, "--model.init_args.encoder_args", "{}"]
    if encoder == "lightgcn":
        arguments += ["--model.init_args.loss", "sampled"]
    result = evolute("fit", "--config", "tiny.yaml", "--run", encoder, *arguments, cwd=work)
    assert result.code == 0, result.err
    assert "val/ndcg@10" in (work / encoder / "metrics.csv").read_text()


BAD = {
    "an item the checkpoint does not know": (
        "predict", ["--ckpt_path", "run/checkpoints/step=00000012.ckpt", "--data.init_args.source", "more.csv",
                    "--data.init_args.vectors", "null"],
        "item '99' is unknown to the checkpoint (1 of 31)"),
    "vectors that do not cover the items": (
        "fit", ["--data.init_args.source", "more.csv"], "holds no vector of item '99' (1 of 31 missing)"),
    "nothing trained to serve": ("predict", [], "predict: the model has not been trained; name a checkpoint"),
    "nothing trained to test": ("test", [], "test: the model has not been trained"),
    "a checkpoint of normalised items without the norm": (
        "predict", ["--ckpt_path", "run/checkpoints/step=00000012.ckpt", "--trainer.callbacks", "null"],
        "trained with ItemEmbeddingNorm, and this configuration has none"),
    "no vectors": ("fit", ["--data.init_args.vectors", "null"], "this needs item vectors"),
    "too many components": ("fit", ["--model.init_args.dim", "16"], "makes 16 dimensions of 12"),
    "an adapter of a narrow table": ("fit", ["--model.init_args.adapter", "linear"], "take none"),
    "a negative length": ("fit", ["--model.init_args.row_norm", "-1"], "Recommend(row_norm=-1.0): must be positive"),
    "no such file": ("fit", ["--data.init_args.source", "./none.csv"], "no such file"),
    "a pattern without a match": ("fit", [], "films"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(name, work, run, evolute):
    write_csv(work / "more.csv", [*rows(users=40, items=30), ("u1", "99", 90)])
    command, arguments, message = BAD[name]
    config = yaml.safe_load((work / "tiny.yaml").read_text())
    if name == "a pattern without a match":
        config["trainer"]["callbacks"][0]["init_args"]["target"] = "films"
    (work / "bad.yaml").write_text(yaml.safe_dump(config))
    result = evolute(command, "--config", "bad.yaml", "--run", "bad", *arguments, cwd=work)
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1, result.err
    assert not (work / "bad").exists()


def test_item_vectors_are_written_with_their_projection(work, evolute):
    result = evolute("item-vectors", "out.parquet", "--source", "log.csv", "--vectors", "v.parquet", "--rec-pca", "4",
                     "--form", "generalized", cwd=work)  # fmt: skip
    assert result.code == 0, result.err
    table = parquet.read_table(work / "out.parquet").to_pydict()
    assert len(table["item_id"]) == 30
    z = np.array(table["vector"])
    np.testing.assert_allclose(z.T @ z / 30, np.eye(4), atol=0.1)
    assert (work / "out.npz").is_file()
    refused = evolute("item-vectors", "out.parquet", "--source", "log.csv", "--vectors", "nowhere.npy", cwd=work)
    assert (refused.code, refused.err.count("\n")) == (2, 1)


def test_movielens_comes_from_a_wheel_or_a_folder_and_nowhere_else(work, evolute, tmp_path, monkeypatch):
    content = {"ml-100k.inter": b"user_id:token\n", "ml-100k.item": b"item_id:token\n"}
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        for name, data in content.items():
            archive.writestr(movielens.INSIDE + name, data)
    refused = evolute("data", "ml-100k", "--from", str(tmp_path / "x.whl"), cwd=work, EVOLUTE_CACHE=str(tmp_path))
    assert refused.code == 2
    assert "is not the file known by that name" in refused.err
    monkeypatch.setenv("EVOLUTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(movielens, "FILES", {n: hashlib.sha256(d).hexdigest() for n, d in content.items()})
    folder = movielens.set_up_movielens(tmp_path / "x.whl")
    assert movielens.movielens_folder() == folder
    assert movielens.set_up_movielens() == folder  # already there: pip is not asked
    missing = evolute("data", "ml-100k", "--from", str(tmp_path / "none"), cwd=work, EVOLUTE_CACHE=str(tmp_path))
    assert (missing.code, missing.err.count("\n")) == (2, 1)

"""Normalised item vectors on modules that know nothing of evolute, and the monitor of their geometry."""

import copy
import csv
import pickle

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from evolute.callbacks import CurvatureMonitor, ItemEmbeddingNorm, ItemGeometry, MetricsCSV, NoiseAdaptiveLR, StepRadius
from evolute.geometry import condition_number, embedding_geometry, softmax_covariance, unit_rows
from tests.conftest import fit, trainer_of
from tests.modules import Recorder


class Foreign(L.LightningModule):
    """A recommender as others write them: item 0 pads, the table is tied to the scores, GRU in between."""

    def __init__(self, late: bool = False, tied_head: bool = False, sparse: bool = False) -> None:
        super().__init__()
        self.late, self.tied_head, self.sparse = late, tied_head, sparse
        self.item_embedding = None
        if not late:
            self.build()

    def build(self) -> None:
        self.item_embedding = nn.Embedding(30, 8, padding_idx=0)
        with torch.no_grad():
            self.item_embedding.weight.mul_(torch.linspace(0.5, 9, 30)[:, None])
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 30, bias=False)
        if self.tied_head:
            self.head.weight = self.item_embedding.weight

    def configure_model(self) -> None:
        if self.item_embedding is None:
            self.build()

    def scores(self, items: torch.Tensor) -> torch.Tensor:
        h = self.encoder(self.item_embedding(items).mean(1))
        return self.head(h) if self.tied_head else h @ self.item_embedding.weight.T

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.scores(batch[:, :-1])[:, 1:], batch[:, -1] - 1)

    def validation_step(self, batch, batch_idx):
        self.log("val", F.cross_entropy(self.scores(batch[:, :-1])[:, 1:], batch[:, -1] - 1))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def batches() -> DataLoader:
    items = torch.randint(1, 30, (64, 5), generator=torch.Generator().manual_seed(0))
    items[::7, 0] = 0
    return DataLoader(items, batch_size=16)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("tied_head", [False, True])
@pytest.mark.parametrize("mode", ["parametrize", "project"])
def test_a_foreign_table_trains_at_unit_length_and_exports_plain(mode, tied_head, late):
    norm = ItemEmbeddingNorm(mode=mode)
    module, _ = fit([norm], lambda: Foreign(late, tied_head), batches())
    table = module.item_embedding.weight
    torch.testing.assert_close(table[1:].norm(dim=1), torch.ones(29))
    assert not table[0].any()
    items = torch.randint(0, 30, (9, 4))
    h = module.encoder(module.item_embedding(items).mean(1))
    torch.testing.assert_close(h.norm(dim=1), torch.full((9,), 10.0))  # 1 / temperature
    norm_free = ItemEmbeddingNorm(mode=mode, query=None)
    norm_free.install(module)  # the same table, queries as they are: what a plain module computes
    before = module.scores(items)
    norm_free.export(module)
    assert type(module.item_embedding) is nn.Embedding
    assert {n for n, _ in module.named_parameters()} >= {"item_embedding.weight", "encoder.0.weight"}
    assert not [n for n in module.state_dict() if "parametrizations" in n]
    torch.testing.assert_close(module.scores(items), before)
    if tied_head:
        assert module.head.weight is module.item_embedding.weight
    plain = Foreign(False, tied_head)
    plain.load_state_dict(module.state_dict())
    torch.testing.assert_close(plain.scores(items), before)


@pytest.mark.parametrize("name", ["item_emb", "item_embeddings", "model.item_embedding", "net.item_emb"])
def test_names_of_other_libraries_match(name):
    module = nn.Module()
    inner, _, last = name.rpartition(".")
    holder = module
    if inner:
        holder = nn.Module()
        module.add_module(inner, holder)
    holder.add_module(last, nn.Embedding(5, 3))
    ItemEmbeddingNorm().install(module)
    torch.testing.assert_close(getattr(holder, last).weight.norm(dim=1), torch.ones(5))


def test_a_linear_head_outside_recommenders():
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    ItemEmbeddingNorm(target="2", query="1", temperature=0.5).install(module)
    x = torch.randn(5, 4)
    h = torch.relu(module[0](x))
    expected = unit_rows(h) * 2 @ unit_rows(module[2].parametrizations.weight.original).T + module[2].bias
    torch.testing.assert_close(module(x), expected)
    with pytest.raises(MisconfigurationException, match="linear head"):
        ItemEmbeddingNorm(target="0", mode="hook").install(module)


def test_where_decides_which_side_is_normalised():
    items = torch.tensor([[3, 5]])
    for where, looked_up, met in (("both", 1.0, 1.0), ("input", 1.0, None), ("output", 0.3, 1.0)):
        module = Foreign()
        stored = module.item_embedding.weight.detach().clone()
        ItemEmbeddingNorm(where=where, row_norm=0.3, query=None).install(module)
        torch.testing.assert_close(module.item_embedding(items).norm(dim=2), torch.full((1, 2), looked_up))
        expected = stored if met is None else unit_rows(stored, 0)
        torch.testing.assert_close(module.item_embedding.weight.detach(), expected)
    for bad in ({"where": "output", "mode": "hook"}, {"where": "input", "mode": "project"}):
        with pytest.raises(MisconfigurationException, match="needs mode='parametrize'"):
            ItemEmbeddingNorm(**bad)
    module = Foreign()
    ItemEmbeddingNorm(mode="hook", input_scale=3.0).install(module)
    torch.testing.assert_close(module.item_embedding(items).norm(dim=2), torch.full((1, 2), 3.0))


def test_gradient_of_a_row_is_orthogonal_and_one_sgd_step_lengthens_it():
    module = Foreign()
    ItemEmbeddingNorm(row_norm=None).install(module)
    stored = module.item_embedding.parametrizations.weight.original
    before = stored.detach().clone()
    loss = module.training_step(next(iter(batches())), 0)
    loss.backward()
    assert (stored.grad * stored).sum(1).abs().max() < 1e-6
    torch.optim.SGD([stored], lr=0.5).step()
    expected = before.square().sum(1) + 0.25 * stored.grad.square().sum(1)
    torch.testing.assert_close(stored.detach().square().sum(1), expected)
    with torch.no_grad():
        stored.mul_(torch.linspace(0.5, 3, 30)[:, None])
        one = module.training_step(next(iter(batches())), 0)
        stored.mul_(0.7)
        torch.testing.assert_close(module.training_step(next(iter(batches())), 0), one)


def test_optimizers_see_the_stored_rows_and_a_second_setup_changes_nothing():
    norm = ItemEmbeddingNorm(learn_temperature=True)
    module, trainer = fit([norm], Foreign, batches())
    owned = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
    assert {id(p) for p in module.parameters()} == owned
    assert module.item_norm_log_scale.item() != pytest.approx(torch.tensor(0.1).log().neg().item(), abs=1e-5)
    scores = module.scores(torch.tensor([[1, 2]]))
    keys = list(module.state_dict())
    again = ItemEmbeddingNorm(learn_temperature=True, input_scale=1.0)
    trainer_of([again], limit_val_batches=1).validate(module, batches(), verbose=False)
    assert list(module.state_dict()) == keys
    torch.testing.assert_close(module.scores(torch.tensor([[1, 2]])), scores)
    torch.testing.assert_close(copy.deepcopy(module).item_embedding.weight, module.item_embedding.weight)
    pickle.dumps(norm.state_dict())


def test_a_checkpoint_opens_with_the_callback(tmp_path):
    norm = ItemEmbeddingNorm()
    module, trainer = fit([norm], Foreign, batches(), default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    fresh = Foreign()
    trainer_of([ItemEmbeddingNorm()]).validate(fresh, batches(), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    torch.testing.assert_close(fresh.item_embedding.weight, module.item_embedding.weight)


def test_what_matches_nothing_is_refused_with_the_names_there_are():
    for callback in (ItemEmbeddingNorm(target="films"), ItemGeometry(target="films")):
        with pytest.raises(MisconfigurationException, match="films"):
            fit([callback], Foreign, batches())
    for arguments in ({"query": "encodre"}, {"query": None, "learn_temperature": True}):
        module = Foreign()
        with pytest.raises(
            MisconfigurationException, match=r"matches no module of Foreign.*item_embedding, encoder, he"
        ):
            ItemEmbeddingNorm(**arguments).install(module)
        assert type(module.item_embedding) is nn.Embedding  # nothing was half installed
    with pytest.raises(MisconfigurationException, match=r"item_embedding, .*head"):
        ItemEmbeddingNorm(target="films").install(Foreign())
    with pytest.raises(MisconfigurationException, match="films"):
        fit([ItemEmbeddingNorm(target="films")], lambda: Foreign(late=True), batches())
    with pytest.raises(MisconfigurationException, match="nowhere"):
        fit([ItemGeometry(reference="nowhere")], Foreign, batches())


def test_the_monitor_records_what_the_formulas_give():
    class Keep(ItemGeometry):
        def _measure(self):
            self.kept = (self._captured.clone(), self._module.item_embedding.weight.detach()[1:].clone())
            return super()._measure()

    callback, recorder = Keep(every_n_steps=4, budget=None), Recorder()
    fit([ItemEmbeddingNorm(), callback], Foreign, batches(), max_steps=5, logger=recorder)
    h, table = callback.kept
    row = recorder.rows[4]
    expected = embedding_geometry(table)
    assert {k: row[f"item_geometry/{k}"] for k in expected} == pytest.approx(expected)
    hessian = softmax_covariance(table, torch.softmax(h.double() @ table.double().T, 1))
    kappa = condition_number(hessian).log().mean().exp()
    assert row["item_geometry/kappa_hess"] == pytest.approx(float(kappa))
    assert row["item_geometry/norm_ratio"] == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_monitor_compares_with_a_reference_run_at_the_steps_that_it_logged(tmp_path, accumulate):
    class Logged(Foreign):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train/loss", loss.detach())
            return loss

    def run(*callbacks, logger):
        fit(
            list(callbacks), Logged, batches(), max_steps=8, logger=logger, log_every_n_steps=3 * accumulate,
            accumulate_grad_batches=accumulate,
        )  # fmt: skip
        return logger

    run(logger=MetricsCSV(tmp_path))
    with open(tmp_path / "metrics.csv", newline="") as file:
        logged = [int(row["step"]) for row in csv.DictReader(file)]
    gaps = run(
        ItemGeometry(every_n_steps=4, budget=None, reference=str(tmp_path)), logger=Recorder()
    ).of("item_geometry/loss_gap")  # fmt: skip
    assert sorted(gaps) == logged != []
    assert list(gaps.values()) == pytest.approx([0] * len(gaps), abs=1e-6)
    (tmp_path / "metrics.csv").write_text("step,train/loss\n0,1.0\n4,2.0\n")
    recorder = Recorder()
    fit([ItemGeometry(budget=None, reference=str(tmp_path))], Foreign, batches(), max_steps=6, logger=recorder)
    gaps = recorder.of("item_geometry/loss_gap")
    assert sorted(gaps) == [0, 4]
    L.seed_everything(0, verbose=False)
    first = Foreign().training_step(next(iter(batches())), 0)
    assert gaps[0] == pytest.approx(float(first) - 1.0, rel=1e-5)


def test_other_callbacks_run_beside_it():
    recorder = Recorder()
    callbacks = [
        ItemEmbeddingNorm(),
        CurvatureMonitor(every_n_steps=2, budget=None),
        StepRadius(every_n_steps=2, budget=None),
        NoiseAdaptiveLR(),
    ]
    fit(callbacks, Foreign, batches(), max_steps=5, logger=recorder)
    assert recorder.of("curvature/sharpness")
    assert recorder.of("step/ghost_ratio")
    assert recorder.of("noise/time_ms")

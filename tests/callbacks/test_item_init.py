"""First values of item tables on a module that knows nothing of evolute: by name, once, before everything else."""

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from evolute.callbacks import ItemEmbeddingNorm, ItemGeometry, ItemInit, RunCheckpoint
from evolute.geometry import cooccurrence_graph, embedding_geometry, initial_table, unit_rows, write_vectors
from tests.callbacks.test_item_callbacks import Foreign, batches
from tests.conftest import fit, trainer_of
from tests.modules import Recorder

N, D = 29, 12
NAMES = [f"film {i}" for i in range(N)]
TEXT = torch.from_numpy(np.random.default_rng(3).normal(size=(N, D)).astype(np.float32)) + 1


class Data(L.LightningDataModule):
    """Somebody's data: it names its items in the order of the rows, from row 1."""

    item_names = NAMES
    graph = cooccurrence_graph(np.random.default_rng(0).integers(0, N, (40, 6)), N)

    def train_dataloader(self):
        return batches()

    val_dataloader = train_dataloader


@pytest.fixture
def file(tmp_path):
    """Text vectors in another order than the rows, with one of a film that nobody took."""
    order = np.random.default_rng(1).permutation(N)
    write_vectors(tmp_path / "v.parquet", [*(NAMES[i] for i in order), "other"], np.vstack([TEXT[order], np.ones(D)]))
    return str(tmp_path / "v.parquet")


def filled(callback, data=None, **options):
    module = Foreign(**options)
    callback.install(module, data or Data())
    return module


@pytest.mark.parametrize(
    "method", ["truncate", "even", "variance", "random_projection", "pca", "whitened_pca", "rec_pca"]
)
def test_rows_are_filled_by_the_names_of_the_items(method, file):
    module = filled(ItemInit(file, method=method, row_norm=0.3, frozen=method == "pca"))
    expected = initial_table(TEXT, 8, method, Data.graph, row_norm=0.3)
    weight = module.item_embedding.weight
    torch.testing.assert_close(weight[1:].detach(), expected)
    assert not weight[0].any()
    assert weight.requires_grad == (method != "pca")


def test_a_random_table_is_drawn_from_the_seed_and_keeps_its_padding():
    one, same, other = (filled(ItemInit(method="random", seed=s)).item_embedding.weight for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not one[0].any()
    assert float(one[1:].detach().std()) == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_makes_the_table_of_its_text_trains_and_exports_plain(kind, tied, file):
    init = ItemInit(file, method=kind, frozen=True)
    module, trainer = fit([init], lambda: Foreign(tied_head=tied), Data())
    held = module.item_embedding.parametrizations.weight
    assert torch.equal(held.original, TEXT)
    table = module.item_embedding.weight.detach()
    torch.testing.assert_close(table[1:], held[0].adapter(TEXT).detach())
    assert not table[0].any()
    owned = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
    assert {id(p) for p in held[0].adapter.parameters()} <= owned
    start = filled(ItemInit(file, method=kind, frozen=True)).item_embedding.weight.detach()
    assert not torch.allclose(start[1:], table[1:])
    before = module.scores(torch.tensor([[1, 0, 29]]))
    init.export(module)
    assert type(module.item_embedding) is nn.Embedding
    torch.testing.assert_close(module.scores(torch.tensor([[1, 0, 29]])), before)
    assert not tied or module.head.weight is module.item_embedding.weight


def test_rows_that_are_no_items_keep_values_of_their_own(file):
    class Masked(Foreign):
        def build(self):
            super().build()
            self.item_embedding = nn.Embedding(N + 3, 8, padding_idx=N)  # padding and two mask tokens come last

    for method in ("pca", "linear"):
        module = Masked()
        rest = module.item_embedding.weight[N:].detach().clone()
        ItemInit(file, method=method).install(module, Data())
        table = module.item_embedding.weight
        torch.testing.assert_close(table[N:].detach(), rest)
        table.square().sum().backward()
    rows = module.item_embedding.parametrizations.weight[0].rest.grad
    assert not rows[0].any()
    assert rows[1:].any(1).all()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("method", "mode"),
    [("pca", "parametrize"), ("linear", "parametrize"), ("pca", "project"), ("pca", "hook"), ("mlp", "hook")],
)
def test_either_order_with_the_norm_gives_the_same_run(method, mode, tied, late, file):
    def run(*callbacks):
        module, _ = fit(list(callbacks), lambda: Foreign(late, tied), Data())
        return module

    def pair():
        return ItemInit(file, method=method), ItemEmbeddingNorm(mode=mode, query=None)

    init, norm = pair()
    one, other = run(init, norm), run(*reversed(pair()))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    items = torch.tensor([[3, 29, 1]])
    torch.testing.assert_close(one.item_embedding(items).norm(dim=2), torch.ones(1, 3))
    before = one.scores(items)
    norm.export(one)
    assert not [k for k in one.state_dict() if "parametrizations" in k]
    if mode != "hook":
        torch.testing.assert_close(one.scores(items), before)


def test_the_norm_starts_from_the_directions_of_the_text(file):
    module, _ = fit([ItemEmbeddingNorm(row_norm=0.3, query=None), ItemInit(file)], Foreign, Data(), max_steps=0)
    expected = unit_rows(initial_table(TEXT, 8, "pca"))
    torch.testing.assert_close(module.item_embedding.weight[1:].detach(), expected)
    torch.testing.assert_close(module.item_embedding.parametrizations.weight.original[1:].detach(), 0.3 * expected)


def test_inputs_alone_may_stay_as_the_adapter_made_them(file):
    module = filled(ItemInit(file, method="linear"))
    raw = module.item_embedding.weight.detach().clone()
    ItemEmbeddingNorm(where="output", query=None).install(module)
    torch.testing.assert_close(module.item_embedding(torch.tensor([0, 5])).detach(), raw[[0, 5]])
    torch.testing.assert_close(module.item_embedding.weight.detach(), unit_rows(raw, 0))
    with pytest.raises(MisconfigurationException, match="adapter"):
        ItemEmbeddingNorm(mode="project").install(filled(ItemInit(file, method="linear")))


@pytest.mark.parametrize("method", ["pca", "linear"])
def test_a_resumed_run_goes_on_with_what_it_had_learned(method, file, tmp_path):
    def run(folder, steps, ckpt=None, shift=0.0, seed=0):
        callbacks = [ItemInit(file, method=method, frozen=method == "linear", seed=seed), RunCheckpoint(4)]
        write_vectors(tmp_path / "v.parquet", NAMES, TEXT.numpy() + np.float32(shift) * np.arange(D))
        recorder = Recorder()
        module, _ = fit(
            callbacks, Foreign, Data(), ckpt_path=ckpt, max_steps=steps, default_root_dir=folder, logger=recorder
        )
        return module, recorder

    whole, recorder = run(tmp_path / "whole", 8)
    assert recorder.of("item_init/rows") == {0: N}
    run(tmp_path / "parts", 4)
    ckpt = str(next((tmp_path / "parts" / "checkpoints").glob("*.ckpt")))
    parts, recorder = run(tmp_path / "parts", 8, ckpt, shift=3.0, seed=5)  # what a new fill would write is another
    assert not recorder.of("item_init/rows")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_a_table_is_filled_once_and_only_to_be_fitted(file):
    init = ItemInit(file)
    module, _ = fit([init], Foreign, Data())
    learned = module.item_embedding.weight.detach().clone()
    for callback in (init, ItemInit(file, method="truncate")):
        trainer_of([callback]).validate(module, datamodule=Data(), verbose=False)
        assert torch.equal(module.item_embedding.weight, learned)
    fit([init], module, Data(), max_steps=0)
    assert torch.equal(module.item_embedding.weight, learned)
    fit([ItemInit(file, frozen=True)], module, Data(), max_steps=3)
    torch.testing.assert_close(module.item_embedding.weight[1:].detach(), initial_table(TEXT, 8, "pca"))


def test_the_control_holds_no_text(file):
    text, control = (filled(ItemInit(file, method="linear", control=c)).item_embedding for c in (False, True))
    stored = [m.parametrizations.weight.original.detach() for m in (text, control)]
    assert stored[1].shape == stored[0].shape
    assert abs(np.corrcoef(stored[0].flatten(), stored[1].flatten())[0, 1]) < 0.2
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            text.parametrizations.weight[0].parameters(), control.parametrizations.weight[0].parameters(), strict=True
        )
    )


def test_without_names_a_file_is_matched_by_the_numbers_of_rows(tmp_path):
    path = tmp_path / "rows.parquet"
    order = np.random.default_rng(2).permutation(N)
    write_vectors(path, [str(i + 1) for i in order], TEXT.numpy()[order])
    module = Foreign()
    ItemInit(str(path), method="truncate").install(module)
    torch.testing.assert_close(module.item_embedding.weight[1:].detach(), TEXT[:, :8])
    for names, message in (
        ([str(i) for i in range(N)], "'0' is none"),
        ([*(str(i + 1) for i in range(N - 1)), "x"], "'x' is none"),
        ([str(2 * i + 1) for i in range(N)], "no vector of item '2'"),
        ([str(i + 2) for i in range(N)], "no vector of item '1'"),
    ):
        write_vectors(path, names, TEXT.numpy())
        with pytest.raises((MisconfigurationException, ValueError), match=message):
            ItemInit(str(path), method="truncate").install(Foreign())


def test_a_linear_head_is_filled_too_and_the_monitor_sees_what_an_adapter_makes(file):
    recorder = Recorder()
    callbacks = [
        ItemInit(file, method="mlp"),
        ItemEmbeddingNorm(query=None),
        ItemGeometry(every_n_steps=1, budget=None, query=None),
    ]
    module, _ = fit(callbacks, Foreign, Data(), max_steps=3, logger=recorder)
    expected = embedding_geometry(module.item_embedding.weight[1:])
    found = {k: recorder.rows[2][f"item_geometry/{k}"] for k in expected}
    assert found == pytest.approx(expected)
    head = Foreign()
    ItemInit(file, target="head", method="truncate", first_row=1).install(head, Data())
    torch.testing.assert_close(head.head.weight[1:].detach(), TEXT[:, :8])


class Short(Data):
    item_names = NAMES[:-4]


class Long(Data):
    item_names = [*NAMES, "other"]


class Vectors(Data):
    vectors = TEXT[:-1]


class New(Data):
    item_names = [*NAMES[:-1], "new"]


class NoGraph(Data):
    graph = None


BAD = {
    "nothing matches": ({"target": "films"}, Data, "matches no table of Foreign; its tables are item_embedding, enc"),
    "no vectors": ({"vectors": None}, Data, "name a file"),
    "no such file": ({"vectors": "none.parquet"}, Data, "none.parquet: no such file"),
    "no graph": ({"method": "rec_pca"}, NoGraph, "needs an attribute 'graph'"),
    "a missing item": ({}, New, "no vector of item 'new' .1 of"),
    "too many items": ({}, Long, "30 items in the 30 rows of item_embedding .* rows 1 to 30 are not theirs"),
    "items on the padding": ({"first_row": 0}, Data, "rows 0 to 28 are not theirs"),
    "rows without a hint": ({"target": "head"}, Data, "set first_row"),
    "vectors of another count": ({"vectors": None}, Vectors, "29 item_names and 28 vectors"),
    "too narrow": ({"target": "wide"}, Data, "makes 16 dimensions of 12"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_in_one_line(name, file):
    arguments, data, message = BAD[name]
    module = Foreign()
    module.wide = nn.Embedding(N + 1, 16, padding_idx=0)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises((MisconfigurationException, ValueError, FileNotFoundError), match=message) as caught:
        fit([ItemInit(**{"vectors": file, **arguments})], module, data())
    assert "\n" not in str(caught.value)
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in before.items())


def test_fewer_items_than_rows_leave_the_last_rows_alone(file):
    module = Foreign()
    rest = module.item_embedding.weight[-4:].detach().clone()
    ItemInit(file, method="truncate").install(module, Short())
    torch.testing.assert_close(module.item_embedding.weight[1:-4].detach(), TEXT[:-4, :8])
    assert torch.equal(module.item_embedding.weight[-4:], rest)

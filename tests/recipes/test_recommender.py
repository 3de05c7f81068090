"""What the recommender's recipe does of its own accord."""

import itertools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from evolute.callbacks import ItemEmbeddingNorm, ItemGeometry, ItemInit
from evolute.data import InteractionDataModule
from evolute.geometry import write_vectors
from evolute.recipes.recommender import Recommend
from tests.data.test_interactions import rows, write_csv


class Broken(Recommend):
    bad = ()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx + 1 in self.bad:
            self._window_losses[-1] = self._window_losses[-1] * float("nan")
            return loss * float("nan")
        return loss


class Weights(Callback):
    def __init__(self):
        self.kept = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.kept.append([p.detach().clone() for p in pl_module.parameters()])


def fit(tmp_path, bad, callbacks=(), **options):
    write_csv(tmp_path / "log.csv", rows(users=40, items=30))
    module = Broken(dim=8, encoder_args={"hidden": 8}, lr=0.01, **options)
    module.bad = bad
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=4, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, InteractionDataModule(str(tmp_path / "log.csv"), max_len=4, batch_size=8))
    return trainer


def test_a_nonfinite_loss_takes_no_step(tmp_path):
    weights = Weights()
    trainer = fit(tmp_path, (2,), [weights])
    moved = [any(not torch.equal(p, q) for p, q in zip(a, b, strict=True)) for a, b in itertools.pairwise(weights.kept)]
    assert moved == [False, True, True]
    assert all(torch.isfinite(p).all() for p in weights.kept[-1])
    assert trainer.callback_metrics["train/nonfinite"] == 1


@pytest.mark.parametrize(("mode", "bad"), [("raise", (1,)), ("skip", (1, 2, 3))])
def test_nonfinite_losses_raise_at_once_or_after_some_in_a_row(tmp_path, mode, bad):
    with pytest.raises(RuntimeError, match=f"not finite {len(bad)} step"):
        fit(tmp_path, bad, on_nonfinite=mode, max_nonfinite=3)


@pytest.mark.parametrize("loss", ["full", "sampled"])
@pytest.mark.parametrize("encoder", ["sasrec", "lightgcn"])
def test_rows_normalised_on_look_up_are_scored_so_too(tmp_path, loss, encoder):
    write_csv(tmp_path / "log.csv", rows(users=40, items=30))
    data = InteractionDataModule(str(tmp_path / "log.csv"), max_len=4, batch_size=8)
    queries = {}
    for mode in ("hook", "parametrize"):
        L.seed_everything(0, verbose=False)
        module = Recommend(encoder=encoder, dim=8, loss=loss, encoder_args={"layers": 1})
        norm, geometry = ItemEmbeddingNorm(mode=mode, row_norm=None), ItemGeometry(every_n_steps=1, budget=None)
        trainer = L.Trainer(
            accelerator="cpu", devices=1, max_steps=1, limit_val_batches=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[norm, geometry],
        )  # fmt: skip
        trainer.fit(module, data)
        assert trainer.callback_metrics["item_geometry/norm_ratio"] == pytest.approx(1, rel=1e-5)
        module.eval()
        _, table, _ = module.queries(next(iter(data.train_dataloader())))
        scored = table[torch.arange(30)]
        torch.testing.assert_close(scored.norm(dim=1), torch.ones(30))
        queries[mode] = module.user_queries(next(iter(data.test_dataloader())))
        torch.testing.assert_close(queries[mode][1].norm(dim=1), torch.ones(30))
    # Gradients are those of the same function, so that one step later the two are still alike.
    for hook, whole in zip(queries["hook"], queries["parametrize"], strict=True):
        torch.testing.assert_close(hook, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("encoder", ["gru4rec", "bert4rec"])
def test_the_callback_makes_the_table_that_the_recipe_makes(tmp_path, encoder):
    write_csv(tmp_path / "log.csv", rows(users=40, items=30))
    write_vectors(tmp_path / "v.parquet", [str(i) for i in range(30)], torch.randn(30, 12).numpy())
    found = []
    for init, callbacks in (("rec_pca", []), ("random", [ItemInit(method="rec_pca")])):
        data = InteractionDataModule(str(tmp_path / "log.csv"), max_len=4, vectors=str(tmp_path / "v.parquet"))
        module = Recommend(encoder=encoder, dim=8, init=init, trade_off=0.95, encoder_args={})
        trainer = L.Trainer(
            accelerator="cpu", devices=1, max_steps=0, limit_val_batches=0, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        )  # fmt: skip
        trainer.fit(module, data)
        found.append(module.item_emb.weight[:30].detach())
        assert not module.item_emb.weight[30].any()
    assert torch.equal(*found)

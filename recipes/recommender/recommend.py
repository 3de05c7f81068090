"""Train a recommender, and rank all items with it."""

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from evolute.callbacks.item_embedding_norm import scored_by_lookup
from evolute.geometry import Form, TableMethod, initial_table
from evolute.models.recommender import (
    LOSSES,
    AdaptedItems,
    ItemEmbedding,
    LookedUp,
    Loss,
    all_items,
    item_loss,
    ranking_metrics,
    target_ranks,
    top_items,
)
from evolute.recipes.llm.schedules import Schedule, lr_factor
from evolute.recipes.recommender.build import ENCODERS, EncoderName, build_encoder
from evolute.recipes.recommender.output import check_items, check_table, write_recommendations


class Recommend(L.LightningModule):
    """Learn what a user takes next; validated, tested and served by ranking all items.

    Wants an :class:`evolute.data.InteractionDataModule`; the model is made in ``configure_model``, when the items are
    known. ``item_emb`` holds the item vectors, ``encoder`` makes the vectors that meet them: names that callbacks
    look for.

    Logs ``train/loss`` (nats), ``train/nonfinite`` (steps skipped so far), ``train/self_logit`` (how much more than the
    average item the model expects the last one again, in nats; high at the start means that it begins by repeating),
    ``val/`` and ``test/`` ``hr@k``, ``ndcg@k``, ``mrr@k``. ``predict`` writes ``recommendations.parquet`` into the run
    folder.

    Args:
        encoder: ``"gru4rec"``, ``"sasrec"``, ``"bert4rec"``, ``"mf"`` or ``"lightgcn"``.
        dim: width of item vectors.
        encoder_args: further arguments of the encoder's class.
        loss: ``"full"``, ``"sampled"``, ``"bce"`` or ``"bpr"``, see :func:`evolute.models.recommender.item_loss`.
        negatives: items drawn for the sampled losses.
        log_q: draw them by popularity and correct for it; False draws evenly.
        init: first values of the item table, see :func:`evolute.geometry.initial_table`.
        trade_off: of Rec-PCA.
        form: of Rec-PCA.
        row_norm: root mean square length that the rows of the table start with; ``None`` leaves what ``init`` gives,
            the raw lengths of text vectors for example.
        adapter: map vectors of the text encoder's width (``init`` of ``"text"`` or ``"gaussian"``) to ``dim``.
        freeze: do not train the table.
        optimizer: ``"adamw"`` or ``"sgd"`` (momentum 0.9).
        lr: peak learning rate.
        weight_decay: decoupled; leave it at 0 where item vectors are normalised, whose lengths mean nothing.
        warmup: optimizer steps if at least 1, else share of the run.
        schedule: ``"cosine"``, ``"wsd"`` or ``"constant"``.
        filter_seen: leave items of the history out of rankings; results with and without do not compare.
        ks: where the rankings are cut.
        top_k: items that ``predict`` writes for each user.
        on_nonfinite: what a non-finite loss does: ``"skip"`` takes no optimizer step (on any rank, for the whole
            accumulation window), ``"raise"`` ends the run.
        max_nonfinite: skips in a row after which ``"skip"`` raises as well.
        n_items: filled in from the data.
        n_users: likewise.

    Raises:
        ValueError: if an argument is out of range, or does not go with another.
    """

    def __init__(
        self,
        encoder: EncoderName = "gru4rec",
        dim: int = 64,
        encoder_args: dict[str, Any] | None = None,
        loss: Loss = "full",
        negatives: int = 256,
        log_q: bool = True,
        init: TableMethod | Literal["text"] = "random",
        trade_off: float = 0.95,
        form: Form = "difference",
        row_norm: float | None = None,
        adapter: Literal["linear", "mlp"] | None = None,
        freeze: bool = False,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        warmup: float = 0.0,
        schedule: Schedule = "constant",
        filter_seen: bool = False,
        ks: Sequence[int] = (10, 20),
        top_k: int = 20,
        on_nonfinite: Literal["skip", "raise"] = "skip",
        max_nonfinite: int = 5,
        n_items: int | None = None,
        n_users: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("encoder", encoder, ENCODERS),
            ("loss", loss, LOSSES),
            ("adapter", adapter, (None, "linear", "mlp")),
            ("optimizer", optimizer, ("adamw", "sgd")),
            ("on_nonfinite", on_nonfinite, ("skip", "raise")),
        ):
            if value not in known:
                raise ValueError(f"Recommend({name}={value!r}): must be one of {', '.join(map(repr, known))}")
        for name, value in (
            ("dim", dim), ("negatives", negatives), ("top_k", top_k), ("ks", min(ks, default=0)),
            ("max_nonfinite", max_nonfinite),
        ):  # fmt: skip
            if value < 1:
                raise ValueError(f"Recommend({name}={value}): must be at least 1")
        for name, value in (("lr", lr), ("row_norm", 1.0 if row_norm is None else row_norm)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"Recommend({name}={value}): must be positive")
        if (adapter is not None) != (init in ("text", "gaussian")):
            raise ValueError(
                f"Recommend(init={init!r}, adapter={adapter!r}): 'text' and 'gaussian' are as wide as the text "
                "encoder and need an adapter; the other methods make a table of width dim and take none"
            )
        self.save_hyperparameters()
        self.item_emb: Any = None
        self.encoder: Any = None
        self.loss_name: Loss = loss
        self.ks = list(ks)
        self._log_q: Tensor | None = None
        self._window_losses: list[Tensor] = []
        self._nonfinite = self._nonfinite_in_a_row = 0
        self._ranks: list[Tensor] = []
        self._written: list[dict[str, Tensor]] = []
        self.ranks = torch.zeros(0, dtype=torch.long)
        self._blank = False

    @override
    def configure_model(self) -> None:
        if self.item_emb is not None:
            return
        a: Any = self.hparams
        data: Any = None if self._trainer is None else getattr(self._trainer, "datamodule", None)
        if data is None and a.n_items is None:
            raise ValueError("Recommend: it needs an InteractionDataModule, which knows the items")
        if data is not None:
            a.n_items, a.n_users = data.n_items, data.n_users
            counts = torch.from_numpy(data.train_counts).double() + 1
            self._log_q = (counts / counts.sum()).log().float() if a.log_q else None
        self.encoder = build_encoder(a.encoder, a.dim, a.n_users, data, a.encoder_args or {})
        fn = None if self._trainer is None else self._trainer.state.fn
        self._blank = fn in (TrainerFn.TESTING, TrainerFn.PREDICTING)
        if fn != TrainerFn.PREDICTING:
            seen = "left out" if a.filter_seen else "kept in"
            rank_zero_info(f"ranking all {a.n_items:,} items, those of the history {seen}")
        restored = fn not in (None, TrainerFn.FITTING) and a.adapter is None
        if a.init == "random" or data is None or restored:
            vectors = torch.zeros(a.n_items, a.dim)
        else:
            vectors = data.vectors.table
        if a.init == "text" and a.adapter is not None:
            self.item_emb = AdaptedItems(vectors, a.dim, a.adapter, a.freeze, self.encoder.extra)
            return
        graph = data.graph if a.init == "rec_pca" and data is not None and not restored else None
        seed = int(torch.randint(2**31, ()))
        init: TableMethod = "random" if restored else cast(TableMethod, a.init)  # a checkpoint brings the rows
        table = initial_table(vectors, a.dim, init, graph, a.trade_off, a.form, a.row_norm, seed)
        if a.adapter is not None:
            self.item_emb = AdaptedItems(table, a.dim, a.adapter, a.freeze, self.encoder.extra)
        else:
            self.item_emb = ItemEmbedding(table, self.encoder.extra, a.freeze)

    def _table(self, whole: bool = True) -> Any:
        """Return the rows that are scored: all, or where a few are enough and hooks make them, those looked up."""
        lookup = scored_by_lookup(self.item_emb)
        return LookedUp(self.item_emb) if lookup and not whole else all_items(self.item_emb, lookup)

    def queries(self, batch: dict[str, Tensor]) -> tuple[Tensor, Any, Tensor]:
        """Return queries [m, d], the table they meet [n, d] and their targets [m], of a training batch."""
        whole = self.loss_name == "full"
        items, n = batch["items"], self.item_emb.padding_idx
        match self.encoder.objective:
            case "causal":
                inputs, targets = items[:, :-1], items[:, 1:]
                chosen = targets < n
                encoded = self.encoder(self.item_emb(inputs), inputs < n)
                table = self._table(whole)
            case "masked":
                items = items[:, 1:] if (items[:, 0] < n).all() else items[:, :-1]
                chosen = (torch.rand(items.shape, device=items.device) < 0.2) & (items < n)
                chosen[:, 0] |= ~chosen.any(1)
                inputs, targets = items.masked_fill(chosen, n + 1), items
                encoded = self.encoder(self.item_emb(inputs), items < n)
                table = self._table(whole)
            case _:
                chosen, targets = items < n, items
                users, table = self.encoder(batch["user"], self._table())
                encoded = users[:, None].expand(-1, items.shape[1], -1)
        return encoded[chosen], table, targets[chosen]

    def loss_on(self, batch: dict[str, Tensor]) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Return the mean loss; under a full softmax also the logits [m, n] and the targets [m]."""
        with parametrize.cached():
            queries, table, targets = self.queries(batch)
            if self.loss_name == "full" and len(queries) * len(table) <= 1 << 25:
                logits = queries @ table.T
                return F.cross_entropy(logits.float(), targets), logits, targets
            a: Any = self.hparams
            log_q = None if self._log_q is None else self._log_q.to(table.device)
            return item_loss(self.loss_name, queries, table, targets, a.negatives, log_q)

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        found = self.loss_on(batch)
        loss, logits = (found[0], found[1].detach()) if isinstance(found, tuple) else (found, None)
        self.log("train/loss", loss.detach(), prog_bar=True)
        if logits is not None and self.encoder.objective == "causal" and self._logs_now():
            items = batch["items"]
            last = items[:, :-1][items[:, 1:] < self.item_emb.padding_idx]
            self.log("train/self_logit", (logits.gather(1, last[:, None])[:, 0] - logits.mean(1)).mean())
        self._window_losses.append(loss.detach())
        return loss

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        # One host synchronisation an optimizer step, and one decision for all ranks.
        finite = torch.stack(self._window_losses).isfinite().all()
        self._window_losses.clear()
        good = bool(self.trainer.strategy.reduce(finite.float(), reduce_op="mean") == 1)
        self._nonfinite += not good
        self._nonfinite_in_a_row = 0 if good else self._nonfinite_in_a_row + 1
        self.log("train/nonfinite", float(self._nonfinite))
        if good:
            return
        a: Any = self.hparams
        if a.on_nonfinite == "raise" or self._nonfinite_in_a_row >= a.max_nonfinite:
            raise RuntimeError(
                f"the loss was not finite {self._nonfinite_in_a_row} step(s) in a row, last at step "
                f"{self.trainer.global_step}: lower lr={a.lr}, set row_norm, or clip gradients"
            )
        for parameter in self.parameters():  # an optimizer passes over parameters without a gradient
            parameter.grad = None

    def _logs_now(self) -> bool:
        trainer: Any = self.trainer
        return (trainer.global_step + 1) % trainer.log_every_n_steps == 0 or trainer.global_step == 0

    def user_queries(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return one query a history [b, d] and the table it meets [n, d], of a batch to rank."""
        items, length, n = batch["items"], batch["length"], self.item_emb.padding_idx
        if self.encoder.objective == "user":
            return self.encoder(batch["user"], self._table())
        if self.encoder.objective == "masked":  # a mask after the last event
            items = F.pad(items, (0, 1), value=n).scatter(1, length[:, None], n + 1)
            real, at = items != n, length
        else:
            real, at = items < n, length - 1
        return self.encoder(self.item_emb(items), real, at), self._table()

    def _rank(self, batch: dict[str, Tensor]) -> None:
        with parametrize.cached():
            queries, table = self.user_queries(batch)
            seen = batch["seen"] if self.hparams["filter_seen"] else None
            self._ranks.append(target_ranks(queries.float(), table.float(), batch["target"], seen))

    @override
    def on_test_model_eval(self) -> None:  # the last hook before anything starts
        self._refuse_blank("test")
        super().on_test_model_eval()

    @override
    def on_predict_model_eval(self) -> None:
        self._refuse_blank("predict")
        super().on_predict_model_eval()

    def _refuse_blank(self, command: str) -> None:
        if self._blank:
            raise ValueError(f"{command}: the model has not been trained; name a checkpoint with --ckpt_path")

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._rank(batch)

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._rank(batch)

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_ranking("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_ranking("test")

    def _log_ranking(self, stage: str) -> None:
        self.ranks = torch.cat(self._ranks) if self._ranks else torch.zeros(0, dtype=torch.long, device=self.device)
        self._ranks.clear()
        metrics = ranking_metrics(self.ranks, self.ks) if len(self.ranks) else {}
        names = [f"{metric}@{k}" for k in self.ks for metric in ("hr", "ndcg", "mrr")]
        count = float(len(self.ranks))
        sums = torch.tensor(
            [count, *(float(metrics[n]) * count if metrics else 0.0 for n in names)], device=self.device
        )
        total: Any = self.trainer.strategy.reduce(sums.double(), reduce_op="sum")
        values = {f"{stage}/{n}": (s / total[0]).float() for n, s in zip(names, total[1:], strict=True)}
        self.log_dict(values, prog_bar=False, sync_dist=False)

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        with parametrize.cached():
            queries, table = self.user_queries(batch)
            scores, items = top_items(queries.float(), table.float(), self.hparams["top_k"], batch["seen"])
        found = {"user": batch["user"], "item": items, "score": scores}
        self._written.append({name: value.cpu() for name, value in found.items()})
        return found

    @override
    def on_predict_epoch_end(self) -> None:
        written, self._written = self._written, []
        write_recommendations(self.trainer, written)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        checkpoint["item_names"] = list(data.item_names) if data is not None else []
        checkpoint["nonfinite"] = {"total": self._nonfinite, "in_a_row": self._nonfinite_in_a_row}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        counts = checkpoint.get("nonfinite", {})
        self._nonfinite, self._nonfinite_in_a_row = counts.get("total", 0), counts.get("in_a_row", 0)
        self._blank = False
        if self._trainer is None:
            return
        data: Any = getattr(self._trainer, "datamodule", None)
        if data is not None:
            check_items(checkpoint.get("item_names", []), data.item_names)
        check_table(checkpoint, self.state_dict(), self._trainer.callbacks)  # pyright: ignore

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        a: Any = self.hparams
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer: Optimizer
        if a.optimizer == "sgd":
            optimizer = torch.optim.SGD(trained, lr=a.lr, momentum=0.9, weight_decay=a.weight_decay)
        else:
            optimizer = torch.optim.AdamW(trained, lr=a.lr, weight_decay=a.weight_decay)
        factor = lr_factor(a.schedule, a.warmup, self.trainer.estimated_stepping_batches)
        scheduler = {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}  # pyright: ignore[reportReturnType]

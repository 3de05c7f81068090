"""Rec-PCA: a projection of text vectors that keeps their variance and follows what users consume together."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse
from scipy.sparse.linalg import eigsh

from evolute.geometry.items.cooccurrence import normalised_graph

Form = Literal["difference", "trace_ratio", "generalized"]
Array = NDArray[Any]

BLOCK = 8192
"""Rows of the vectors in memory at once."""
DENSE = 4096
"""Up to this many dimensions eigenvectors come from a dense solver, beyond it from Lanczos iteration."""
NATIVE = ("float32", "float64")
"""Types that sparse products take as they are."""
NULL = 1e-8
"""Directions whose variance is below this share of the largest are taken for empty: text encoders have some."""


class RecPCA:
    """Project item vectors onto directions of large variance and small total variation on a co-occurrence graph.

    With centred vectors ``Xc`` [n, D], ``S = Xc^T Xc / n``, the normalised Laplacian ``L`` of the graph (zero for items
    without an edge) and ``T = Xc^T L Xc / n``, the projection ``P`` [D, d] is, for a trade-off ``lam`` in [0, 1]:

    - ``"difference"``: ``max tr(P^T (S - lam T) P)``, ``P^T P = I``. T is close to S on a dense graph, so that little
      changes below ``lam`` of about 0.75.
    - ``"trace_ratio"``: ``max tr(P^T S P) / tr(P^T B P)``, ``P^T P = I``, ``B = lam T + (1 - lam) tr(S)/D I``, by
      Dinkelbach's iteration.
    - ``"generalized"``: ``min tr(P^T B P)``, ``P^T S P = I`` with the same ``B``: the output is whitened.

    Directions that hold no variance (below 1e-8 of the largest) are never taken. ``lam = 0`` is the subspace of PCA in
    every form. The paper (arXiv 2604.20490) names the two terms, variance kept and total variation; these three forms,
    and the interpolation by ``B``, are ours.

    The vectors are read twice, in blocks of rows, and may be memory-mapped; sums are float64 whatever they are.

    Example::

        graph = cooccurrence_graph(train_sequences, n_items)
        table = RecPCA(64, trade_off=0.95).fit(vectors, graph).transform(vectors)

    Args:
        n_components: dimensions of the output, d.
        trade_off: weight of the graph, lam.
        form: one of the three.
        whiten: give the output of the first two forms unit covariance, by a rotation that stays within the subspace.
        block: rows in memory at once.

    Attributes:
        mean_: [D].
        components_: ``P^T``, [d, D]; the largest entry of each row is positive.
        eigenvalues_: of the problem solved, in the order of the components, [d].
        retained_variance_: share of the variance of X inside the subspace.
        tv_ratio_: total variation of the output over its value without edges; NaN without a graph.
        iterations_: of Dinkelbach (1 for the other forms).
        hash_: of the components, for names of files.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        n_components: int,
        trade_off: float = 0.95,
        form: Form = "difference",
        whiten: bool = False,
        block: int = BLOCK,
    ) -> None:
        if n_components < 1:
            raise ValueError(f"RecPCA(n_components={n_components}): must be at least 1")
        if not 0.0 <= trade_off <= 1.0:
            raise ValueError(f"RecPCA(trade_off={trade_off}): must lie in [0, 1]")
        if form not in ("difference", "trace_ratio", "generalized"):
            raise ValueError(f"RecPCA(form={form!r}): 'difference', 'trace_ratio' or 'generalized'")
        if block < 1:
            raise ValueError(f"RecPCA(block={block}): must be at least 1")
        self.n_components = n_components
        self.trade_off = trade_off
        self.form: Form = form
        self.whiten = whiten
        self.block = block

    def fit(self, X: Any, graph: Any = None) -> "RecPCA":
        """Find the projection.

        Args:
            X: item vectors, array or memory map or CPU tensor, [n, D].
            graph: symmetric CSR array [n, n]; None or without edges gives PCA.

        Raises:
            ValueError: if shapes disagree, a value is not finite, or the vectors span fewer dimensions than
                ``n_components``.
        """
        x = _array(X)
        n, dims = x.shape
        if graph is not None and graph.shape != (n, n):
            raise ValueError(f"RecPCA.fit: {n} vectors, and a graph of {graph.shape[0]} items; they must be the same")
        if self.n_components > min(n - 1, dims):
            raise ValueError(
                f"RecPCA(n_components={self.n_components}): {n} vectors of {dims} dimensions span at most "
                f"{max(min(n - 1, dims), 0)} after centring"
            )
        self.mean_ = self._mean(x)
        s, t = self._moments(x, graph)
        self.iterations_ = 1
        spread = np.trace(s) / dims
        p, self.eigenvalues_ = self._solve(s, t, spread)
        variances = np.einsum("ij,ij->j", p, s @ p)
        if variances.min() <= NULL * variances.max():  # empty directions cost no variation: leave them out
            held = self._held(s)
            p, self.eigenvalues_ = self._solve(held.T @ s @ held, held.T @ t @ held, spread)
            p = held @ p
        if self.whiten and self.form != "generalized":
            p = p @ _inverse_root(p.T @ s @ p)
        p = p * np.sign(p[np.abs(p).argmax(0), np.arange(p.shape[1])])
        self.components_ = np.ascontiguousarray(p.T)
        basis: Array = linalg.qr(p, mode="economic")[0]  # pyright: ignore[reportAssignmentType]
        self.retained_variance_ = float(np.trace(basis.T @ s @ basis) / np.trace(s))
        linked = np.trace(p.T @ self._linked @ p)
        self.tv_ratio_ = float(np.trace(p.T @ t @ p) / linked) if linked > 0 else float("nan")
        del self._linked
        self.hash_ = hashlib.sha256(self.components_.tobytes() + self.mean_.tobytes()).hexdigest()
        return self

    def transform(self, X: Any) -> Any:
        """Return ``(X - mean) P``, [n, d], in float32 or wider; a tensor for a tensor. New items go through it too."""
        array = _array(X)
        if array.shape[1] != len(self.mean_):
            raise ValueError(f"RecPCA.transform: vectors of {array.shape[1]} dimensions, fitted on {len(self.mean_)}")
        out = np.empty((len(array), len(self.components_)), np.promote_types(array.dtype, np.float32))
        for rows in self._blocks(array):
            out[rows] = (array[rows].astype(np.float64) - self.mean_) @ self.components_.T
        if hasattr(X, "detach"):
            import torch

            return torch.from_numpy(out).to(X.device)
        return out

    def fit_transform(self, X: Any, graph: Any = None) -> Any:
        """Fit, then project the same vectors."""
        return self.fit(X, graph).transform(X)

    def save(self, path: str | Path) -> None:
        """Write the fitted projection as .npz, whole or not at all."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        fitted = {name: value for name, value in vars(self).items() if name.endswith("_")}
        arguments = {k: getattr(self, k) for k in ("n_components", "trade_off", "form", "whiten", "block")}
        with part.open("wb") as file:
            np.savez(file, allow_pickle=False, **arguments, **fitted)
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "RecPCA":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file is not one of RecPCA, or its content does not match its hash.
        """
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name][()] for name in file.files}
        if "components_" not in held:
            raise ValueError(f"{path}: not a projection of RecPCA")
        made = cls(int(held["n_components"]), float(held["trade_off"]), str(held["form"]), bool(held["whiten"]))  # type: ignore[arg-type]
        for name, value in held.items():
            if name.endswith("_"):
                setattr(made, name, value.item() if isinstance(value, np.generic) else value)
        if hashlib.sha256(made.components_.tobytes() + made.mean_.tobytes()).hexdigest() != made.hash_:
            raise ValueError(f"{path}: its components do not match their hash; the file is damaged")
        return made

    def _blocks(self, X: Array) -> Iterator[slice]:
        return (slice(i, min(i + self.block, len(X))) for i in range(0, len(X), self.block))

    def _mean(self, X: Array) -> NDArray[np.float64]:
        total = np.zeros(X.shape[1])
        for rows in self._blocks(X):
            total += X[rows].sum(0, dtype=np.float64)
        if not np.isfinite(total).all():
            raise ValueError(f"RecPCA.fit: dimension {int(np.flatnonzero(~np.isfinite(total))[0])} holds NaN or inf")
        return total / len(X)

    def _moments(self, X: Array, graph: Any) -> tuple[Array, Array]:
        """Return S and T [D, D]; keeps ``Xc^T D' Xc / n`` for the total variation."""
        n, dims = X.shape
        s, isolated, k = np.zeros((dims, dims)), np.zeros((dims, dims)), np.zeros((dims, dims))
        half: Any = None if graph is None or graph.nnz == 0 else sparse.triu(normalised_graph(graph), 1, format="csr")
        linked = np.zeros(n, bool) if half is None else np.diff(sparse.csr_array(graph).indptr) > 0
        if half is not None and X.dtype.name in NATIVE:
            half = half.astype(X.dtype)  # scipy would copy all of X to the wider type
        for rows in self._blocks(X):
            centred = X[rows].astype(np.float64) - self.mean_
            s += _gram(centred)
            alone = ~linked[rows]
            if half is None:
                continue
            if alone.any():
                isolated += _gram(centred[alone])
            k += centred.T @ self._neighbours(X, half[rows])
        # Only half of each edge was summed, and of each gram matrix only the upper half.
        s, isolated = _whole(s) / n, _whole(isolated) / n
        self._linked = s - isolated if half is not None else np.zeros_like(s)
        return s, self._linked - (k + k.T) / n

    def _neighbours(self, X: Array, half: Any) -> NDArray[np.float64]:
        """Return the centred weighted sums of neighbours, [rows, D], without copying X."""
        sums = half.sum(1, dtype=np.float64)
        if X.dtype.name not in NATIVE:
            used, places = np.unique(half.indices, return_inverse=True)
            small = sparse.csr_array((half.data, places, half.indptr), shape=(half.shape[0], len(used)))
            return small @ X[used].astype(np.float64) - np.outer(sums, self.mean_)
        return (half @ X).astype(np.float64) - np.outer(sums, self.mean_)

    def _held(self, s: Array) -> Array:
        """Return an orthonormal basis [D, r] of the directions that hold variance."""
        values, vectors = linalg.eigh(s)
        held = values > NULL * max(values[-1], 1e-300)
        if held.sum() < self.n_components:
            raise ValueError(
                f"RecPCA(n_components={self.n_components}): the vectors hold variance in {held.sum()} directions only"
            )
        return vectors[:, held]

    def _solve(self, s: Array, t: Array, spread: float) -> tuple[Array, Array]:
        d, lam = self.n_components, self.trade_off
        if self.form == "difference":
            return _largest(s - lam * t, d)
        b = lam * t + (1 - lam) * spread * np.eye(len(s))
        if self.form == "generalized":
            return self._generalized(s, b)
        p, values = _largest(s, d)
        for self.iterations_ in range(1, 101):
            bottom = np.trace(p.T @ b @ p)
            ratio = np.trace(p.T @ s @ p) / max(bottom, 1e-300)
            p, values = _largest(s - ratio * b, d)
            # At the solution the d largest eigenvalues sum to nothing (Wang et al. 2007).
            if abs(values.sum()) <= 1e-10 * np.trace(p.T @ s @ p):
                break
        return p, values

    def _generalized(self, s: Array, b: Array) -> tuple[Array, Array]:
        """Solve ``B v = mu S v`` for the smallest ``mu``, within the directions that hold variance."""
        held = self._held(s)
        white = held / np.sqrt(np.einsum("ij,ij->j", held, s @ held))
        p, mu = _largest(-(white.T @ b @ white), self.n_components)
        return white @ p, -mu


def _array(X: Any) -> Array:
    array = X.detach().cpu().numpy() if hasattr(X, "detach") else X if isinstance(X, np.ndarray) else np.asarray(X)
    if array.ndim != 2:
        raise ValueError(f"RecPCA: vectors [n, D] are needed, not an array of shape {array.shape}")
    return array


def _gram(rows: Array) -> Array:
    """Return the upper half of ``rows^T rows``: half of the work of a product."""
    blas: Any = linalg.blas
    return blas.dsyrk(1.0, rows.T)


def _whole(upper: Array) -> Array:
    return np.triu(upper) + np.triu(upper, 1).T


def _largest(m: Array, d: int) -> tuple[Array, Array]:
    """Return the eigenvectors [D, d] of the d largest eigenvalues of a symmetric matrix, and these, descending."""
    size = len(m)
    if size <= DENSE or d > size // 4:
        values, vectors = linalg.eigh(m, subset_by_index=[size - d, size - 1])
    else:
        start = np.cos(np.arange(size))  # any fixed vector: the result must not depend on a random one
        values, vectors = eigsh(m, k=d, which="LA", v0=start, ncv=min(size, 2 * d + 20))
    order = np.argsort(values)[::-1]
    return vectors[:, order], values[order]


def _inverse_root(m: Array) -> Array:
    values, vectors = linalg.eigh(m)
    if values[0] <= NULL * values[-1]:
        raise ValueError("RecPCA(whiten=True): a direction of the output holds no variance; take fewer n_components")
    return (vectors / np.sqrt(values)) @ vectors.T

"""What is wrong, or right, with a table of item vectors: norms, angles, spectrum, and its graph."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from evolute.geometry.items.cooccurrence import normalised_graph
from evolute.geometry.items.softmax import condition_number, effective_rank

NEIGHBOURS = 10


def embedding_geometry(table: Tensor, graph: Any = None, sample: int = 2048) -> dict[str, float]:
    """Return the geometry of item vectors, as plain numbers.

    Rows of zeros are counted and left out of everything else. Keys, all unitless:

    - ``norm_mean``, ``norm_ratio`` (largest over smallest), ``norm_cv`` (standard deviation over mean),
      ``norm_p99_p01``;
    - ``mean_cos``: mean cosine over all pairs, exact in O(n d): ``(|sum e_hat|^2 - n) / (n (n - 1))``;
    - ``nn_cos``: mean cosine to the 10 nearest of evenly spaced rows; well above ``mean_cos``, there are clusters;
    - ``eff_rank``: exponential of the entropy of the covariance's spectrum;
    - ``kappa_cov``: condition number of the covariance, damped by 1e-6 of its mean eigenvalue; ``null_dims``:
      eigenvalues below 1e-8 of the largest;
    - with a graph: ``tv_ratio``, total variation over what it would be without edges (0 smooth, about 1 unrelated),
      and ``misalign``, one minus the correlation of cosine and edge weight over the edges;
    - ``zero_rows``.

    Args:
        table: item vectors, [n, d], n >= 2.
        graph: symmetric CSR array [n, n] of :func:`cooccurrence_graph`.
        sample: rows whose neighbours are looked for.

    Raises:
        ValueError: if the table has fewer than two rows that are not zero, or values that are not finite.
    """
    e = table.detach().double()
    if e.ndim != 2 or not bool(e.isfinite().all()):
        raise ValueError(f"embedding_geometry: a finite table [n, d] is needed, not {tuple(e.shape)} with NaN or inf")
    norms = torch.linalg.vector_norm(e, dim=1)
    alive = norms > 0
    zero_rows = int((~alive).sum())
    if len(e) - zero_rows < 2:
        raise ValueError(f"embedding_geometry: {len(e)} rows, {zero_rows} of them zero; at least two are needed")
    rows, norms = e[alive], norms[alive]
    unit = rows / norms[:, None]
    n = len(rows)
    low, high = torch.quantile(_thin(norms, 1_000_000), torch.tensor([0.01, 0.99], dtype=e.dtype, device=e.device))
    mean_cos = (unit.sum(0).square().sum() - n) / (n * (n - 1))
    nn_cos = _nearest(unit, min(NEIGHBOURS, n - 1), sample)
    centred = rows - rows.mean(0)
    covariance = centred.T @ centred / n
    values = torch.linalg.eigvalsh(covariance).clamp_min(0)
    result = {
        "norm_mean": norms.mean(),
        "norm_ratio": norms.max() / norms.min(),
        "norm_cv": norms.std(correction=0) / norms.mean(),
        "norm_p99_p01": high / low,
        "mean_cos": mean_cos,
        "nn_cos": nn_cos,
        "eff_rank": effective_rank(values) if values[-1] > 0 else torch.ones(()),
        "kappa_cov": condition_number(covariance),
        "null_dims": (values < 1e-8 * values[-1]).sum(),
    }
    found = {name: float(value) for name, value in result.items()}
    if graph is not None:
        found |= _on_graph(e, graph)
    return found | {"zero_rows": float(zero_rows)}


def total_variation(table: Tensor, graph: Any) -> tuple[float, float]:
    """Return ``tr(E^T L E)`` and ``tr(E^T D' E)`` of a table [n, d] on a symmetric graph [n, n].

    ``L = D' - D^-1/2 W D^-1/2``, with ``D'`` one for items that have an edge and zero for others. The first is
    ``1/2 sum_ij w_ij |e_i / sqrt(d_i) - e_j / sqrt(d_j)|^2``, the second its value were all edges' ends unrelated.
    """
    e = table.detach().double().cpu().numpy()
    normalised = normalised_graph(graph)
    linked = np.diff(normalised.indptr) > 0
    whole = float((e[linked] ** 2).sum())
    return whole - float(((normalised @ e) * e).sum()), whole


def _on_graph(e: Tensor, graph: Any) -> dict[str, float]:
    if graph.shape != (len(e), len(e)):
        raise ValueError(f"embedding_geometry: the graph is {graph.shape}, the table has {len(e)} rows")
    variation, whole = total_variation(e, graph)
    unit = torch.nn.functional.normalize(e, dim=1).cpu().numpy()
    edges = normalised_graph(graph).tocoo()
    rows, columns = edges.coords
    chunks = [slice(i, i + 100_000) for i in range(0, edges.nnz, 100_000)]
    cosine = np.concatenate([np.zeros(0), *(np.einsum("ij,ij->i", unit[rows[c]], unit[columns[c]]) for c in chunks)])
    varied = len(cosine) > 0 and cosine.std() > 0 and edges.data.std() > 0
    correlation = float(np.corrcoef(cosine, edges.data)[0, 1]) if varied else 0.0
    return {"tv_ratio": variation / whole if whole else 1.0, "misalign": 1.0 - correlation}


def _thin(values: Tensor, limit: int) -> Tensor:
    """Return every so many-th of the sorted values: torch's quantile takes no more than 16 million."""
    return values.sort().values[:: max(1, len(values) // limit)]


def _nearest(unit: Tensor, k: int, sample: int) -> Tensor:
    """Return the mean cosine of evenly spaced rows to their ``k`` nearest others."""
    chosen = torch.linspace(0, len(unit) - 1, min(sample, len(unit)), device=unit.device).long()
    total = torch.zeros((), dtype=unit.dtype, device=unit.device)
    for some in chosen.split(max(1, 50_000_000 // len(unit))):
        cosines = unit[some] @ unit.T
        cosines[torch.arange(len(some), device=unit.device), some] = -2.0
        total += cosines.topk(k, dim=1).values.sum()
    return total / (len(chosen) * k)

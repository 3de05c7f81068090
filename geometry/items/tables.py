"""First values of an item table: random, or made from text vectors."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from evolute.geometry.items.rec_pca import Form, RecPCA

TableMethod = Literal[
    "random", "gaussian", "truncate", "even", "variance", "random_projection", "pca", "whitened_pca", "rec_pca"
]
Adapter = Literal["linear", "mlp"]
TABLE_METHODS: tuple[TableMethod, ...] = (
    "random",
    "gaussian",
    "truncate",
    "even",
    "variance",
    "random_projection",
    "pca",
    "whitened_pca",
    "rec_pca",
)
RANDOM_STD = 0.02
"""Standard deviation of a random table, so that its rows are about ``0.02 sqrt(d)`` long."""


def initial_table(
    vectors: Tensor,
    dim: int,
    method: TableMethod = "rec_pca",
    graph: Any = None,
    trade_off: float = 0.95,
    form: Form = "difference",
    row_norm: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Return the item table that a method makes of text vectors.

    Args:
        vectors: one text vector an item, [n, D].
        dim: width of the table, d.
        method: ``"random"``: normal, standard deviation 0.02, the text ignored; ``"gaussian"``: a normal of the text
            vectors' own width D (the control for a frozen table: no text in it, everything else alike);
            ``"truncate"``: the first d dimensions; ``"even"``: d evenly spaced ones; ``"variance"``: the d of largest
            variance; ``"random_projection"``: onto a random orthonormal basis; ``"pca"``, ``"whitened_pca"``,
            ``"rec_pca"``: see :class:`RecPCA`.
        graph: co-occurrence graph for ``"rec_pca"``.
        trade_off: weight of the graph, see :class:`RecPCA`.
        form: of ``"rec_pca"``, see there.
        row_norm: rescale the whole table, so that its rows have this root mean square length; None leaves it.
        seed: of the two random methods.

    Returns:
        [n, d] ([n, D] for ``"gaussian"``), float32.

    Raises:
        ValueError: if the vectors are too narrow for the method, or not finite.
    """
    if method not in TABLE_METHODS:
        raise ValueError(f"method={method!r}: must be one of {', '.join(map(repr, TABLE_METHODS))}")
    if not bool(vectors.isfinite().all()):
        bad = int((~vectors.isfinite().all(1)).nonzero()[0])
        raise ValueError(f"the vector of item {bad} holds NaN or inf")
    wide = vectors.shape[1]
    if dim > wide and method not in ("random", "gaussian"):
        raise ValueError(f"method={method!r} makes {dim} dimensions of {wide}: take a smaller one, or an adapter")
    table = _made(vectors.float(), dim, method, graph, trade_off, form, torch.Generator().manual_seed(seed))
    if row_norm is not None:
        rms = table.square().sum(1).mean().sqrt().clamp_min(1e-12)
        table = table * (row_norm / rms)
    return table


def _made(
    x: Tensor, dim: int, method: TableMethod, graph: Any, trade_off: float, form: Form, generator: torch.Generator
) -> Tensor:
    n, wide = x.shape
    match method:
        case "random":
            return RANDOM_STD * torch.randn(n, dim, generator=generator)
        case "gaussian":
            return torch.randn(n, wide, generator=generator)
        case "truncate":
            return x[:, :dim].clone()
        case "even":
            return x[:, torch.linspace(0, wide - 1, dim).long()].clone()
        case "variance":
            return x[:, x.double().var(0).argsort(descending=True, stable=True)[:dim].sort().values].clone()
        case "random_projection":
            basis, _ = torch.linalg.qr(torch.randn(wide, dim, generator=generator))
            return x @ basis
        case "pca":
            return RecPCA(dim, 0.0).fit(x).transform(x)
        case "whitened_pca":
            return RecPCA(dim, 0.0, whiten=True).fit(x).transform(x)
        case "rec_pca":
            return RecPCA(dim, trade_off, form).fit(x, graph).transform(x)


def text_adapter(kind: Adapter, wide: int, dim: int) -> nn.Module:
    """Return the map of text vectors of width ``wide`` to item vectors of width ``dim`` that is trained with the model.

    One linear map, or two with a GELU between them (hidden width ``2 dim``).
    """
    if kind == "linear":
        return nn.Linear(wide, dim)
    return nn.Sequential(nn.Linear(wide, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))


def unit_rows(table: Tensor, padding_idx: int | None = None, eps: float = 1e-12) -> Tensor:
    """Return the rows divided by their lengths; rows of zeros, and the padding row, are zeros with gradient zero.

    The division is done in float32 or wider; the result has the table's type. The Jacobian of a row is
    ``(I - e_hat e_hat^T) / |e|``: a gradient is orthogonal to its row, and shrinks with its length.

    Args:
        table: [n, d].
        padding_idx: row that stays zero.
        eps: rows shorter than this count as zero.
    """
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    norms = torch.linalg.vector_norm(wide.detach(), dim=-1, keepdim=True)
    keep = norms > eps
    if padding_idx is not None:
        keep = keep.clone()
        keep[padding_idx] = False
    # where() before the division as well: the gradient of a dead branch would be NaN.
    safe = torch.where(keep, wide, torch.ones_like(wide))
    unit = safe / torch.linalg.vector_norm(safe, dim=-1, keepdim=True)
    return torch.where(keep, unit, torch.zeros_like(unit)).to(table.dtype)

"""First values of a table of item vectors: random, or made of text vectors; the table trained, frozen, or adapted."""

import math
import re
import time
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

from evolute.callbacks.access import backend_for
from evolute.callbacks.named import ITEMS, make_plain, matrix_of, parametrizations, sharing, tables_named, when_built
from evolute.callbacks.record import record
from evolute.geometry import Form, initial_table, read_vectors, text_adapter, vectors_of

InitMethod = Literal[
    "keep", "random", "truncate", "even", "variance", "random_projection", "pca", "whitened_pca", "rec_pca",
    "linear", "mlp",
]  # fmt: skip
METHODS: tuple[InitMethod, ...] = InitMethod.__args__


class AdaptedRows(nn.Module):
    """The parametrization: item rows are a trained map of text vectors, other rows (mask tokens) are their own.

    Args:
        adapter: maps [n, D] to [n, d].
        rest: the rows that are no items, in their order, [r, d].
        first: how many of them come before the items.
        padding: which of them pads: it stays zero.
    """

    rest: Tensor

    def __init__(self, adapter: nn.Module, rest: Tensor, first: int, padding: int | None) -> None:
        super().__init__()
        self.adapter, self.first, self.padding = adapter, first, padding
        if len(rest) > (padding is not None):
            self.rest = nn.Parameter(rest.clone())
        else:
            self.register_buffer("rest", torch.zeros_like(rest), persistent=False)

    @override
    def forward(self, vectors: Tensor) -> Tensor:
        """Return the whole table [first + n + ..., d] that the text vectors [n, D] make, in their type."""
        rest = self.rest.to(vectors)  # a buffer stays float32 where DeepSpeed makes the parameters bfloat16
        if self.padding is not None:
            pads = torch.arange(len(rest), device=rest.device) == self.padding
            rest = rest.masked_fill(pads[:, None], 0.0)
        return torch.cat([rest[: self.first], self.adapter(vectors).to(vectors), rest[self.first :]])


class ItemInit(Callback):
    """Give the item vectors of any module their first values before training begins.

    It acts on an embedding table or a linear head whose name matches ``target``, in ``setup``, or right after
    ``configure_model``: before a checkpoint is restored, which then overwrites what it wrote, and before optimizers
    are made. A table is filled when it is first fitted, never again, and not by validate, test or predict. With
    :class:`ItemEmbeddingNorm` it may stand in either order: tables are filled first.

    Vectors are matched to rows by the names of the items. Where the data module has ``item_names``, a list in the
    order of the rows, vectors of a file are looked up by them; without it the names in the file must be numbers of
    rows. The padding row is no item, and stays zero.

    Records once, at step 0, under ``item_init/``: ``rows`` filled in the first table, ``missing`` (those without text,
    which hold the mean vector), ``row_norm`` (root mean square length), ``time_ms``.

    Example::

        init = ItemInit("vectors.parquet", method="pca", row_norm=0.16)  # written by evolute item-vectors
        Trainer(callbacks=[init, ItemEmbeddingNorm()]).fit(module, data)

    Args:
        vectors: file of text vectors (.parquet, .safetensors or .npy, see :func:`evolute.geometry.read_vectors`); None
            takes ``vectors`` of the data module, a tensor [n, D] in the order of its ``item_names``.
        method: ``"random"``, ``"truncate"``, ``"even"``, ``"variance"``, ``"random_projection"``, ``"pca"``,
            ``"whitened_pca"`` and ``"rec_pca"`` fill the table, see :func:`evolute.geometry.initial_table`; the last
            needs the data module's ``graph``. ``"linear"`` and ``"mlp"`` put a trained adapter between text vectors
            and table, by a parametrization of ``weight``. ``"keep"`` leaves the table as it is.
        frozen: do not train the table; under an adapter, the text vectors.
        target: regular expression over whole names of modules.
        trade_off: of ``"rec_pca"``.
        form: of ``"rec_pca"``.
        row_norm: root mean square length of the rows; None leaves what the method gives.
        control: put normal numbers in place of the text vectors and leave all else alike. Frozen vectors plateau
            whether or not they hold text: this says which it was.
        first_row: row of the first item, where the module does not tell: it has no ``padding_idx``, and more rows than
            there are items.
        seed: of what is drawn.
        dry_run: compute and record, change nothing.

    Raises:
        MisconfigurationException: if a value is out of range, nothing matches, vectors or graph are missing, the items
            do not fit the rows, or the strategy has sharded the table already.
        ValueError: if the vectors are too narrow for the method, not finite, or an item has none.
    """

    def __init__(
        self,
        vectors: str | None = None,
        method: InitMethod = "pca",
        frozen: bool = False,
        target: str = ITEMS,
        trade_off: float = 0.95,
        form: Form = "difference",
        row_norm: float | None = None,
        control: bool = False,
        first_row: int | None = None,
        seed: int = 0,
        dry_run: bool = False,
    ) -> None:
        who = "ItemInit"
        for name, value, known in (
            ("method", method, METHODS),
            ("form", form, ("difference", "trace_ratio", "generalized")),
        ):
            if value not in known:
                raise MisconfigurationException(f"{who}({name}={value!r}): must be one of {known}")
        if not 0.0 <= trade_off <= 1.0:
            raise MisconfigurationException(f"{who}(trade_off={trade_off}): must lie in [0, 1]")
        if row_norm is not None and not (row_norm > 0 and math.isfinite(row_norm)):
            raise MisconfigurationException(f"{who}(row_norm={row_norm}): a positive length, or None")
        if row_norm is not None and method in ("keep", "linear", "mlp"):
            raise MisconfigurationException(f"{who}(row_norm={row_norm}, method={method!r}): rows are as they come")
        if control and method in ("keep", "random"):
            raise MisconfigurationException(f"{who}(control=True, method={method!r}): uses no text vectors anyway")
        if first_row is not None and first_row < 0:
            raise MisconfigurationException(f"{who}(first_row={first_row}): must not be negative")
        try:
            re.compile(target)
        except re.error as error:
            raise MisconfigurationException(f"{who}(target={target!r}): no regular expression ({error})") from error
        self.vectors, self.method, self.frozen, self.target = vectors, method, frozen, target
        self.trade_off, self.row_norm = trade_off, row_norm
        self.form: Form = form
        self.control, self.first_row, self.seed, self.dry_run = control, first_row, seed, dry_run
        self._values: dict[str, float] = {}
        self._recorded = False

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        backend_for(trainer, "ItemInit")
        data: Any = getattr(trainer, "datamodule", None)
        when_built(pl_module, self.target, lambda: self._install(pl_module, data, fill=stage == "fit"))

    def install(self, module: nn.Module, data: Any = None) -> None:
        """Fill the tables of a module, as :meth:`setup` does before a fit; a second call changes nothing.

        Args:
            module: any module.
            data: anything with the attributes that are asked of a data module: ``item_names``, ``vectors``, ``graph``.
        """
        self._install(module, data, fill=True)

    def _install(self, module: nn.Module, data: Any, fill: bool) -> None:
        tables = [(n, child) for n, child in tables_named(module, self.target) if matrix_of(child) is not None]
        if not tables:
            raise MisconfigurationException(
                f"ItemInit(target={self.target!r}) matches no table of {type(module).__name__}; its tables are "
                + (", ".join(n for n, child in module.named_modules() if n and matrix_of(child) is not None) or "none")
            )
        done = _filled.setdefault(module, WeakSet())
        if self in done or not (fill or self.method in ("linear", "mlp")):
            return
        start = time.perf_counter()
        seen: list[Any] = []
        for name, child in tables:
            weight: Any = matrix_of(child)
            if any(weight is other for other in seen):
                continue
            seen.append(weight)
            if len(weight.shape) != 2 or weight.numel() == 0 or hasattr(weight, "full_tensor"):
                raise MisconfigurationException(
                    f"ItemInit fills whole tables, and the strategy shards {name} already: build it in __init__ "
                    "instead of configure_model, or use --config strategy/ddp or strategy/zero2"
                )
            values = self._fill(module, name, child, weight, data, fill)
            self._values = self._values or values
        self._values["time_ms"] = 1e3 * (time.perf_counter() - start)
        done.add(self)

    @torch.no_grad()
    def _fill(
        self, module: nn.Module, name: str, child: nn.Module, weight: nn.Parameter, data: Any, fill: bool
    ) -> dict[str, float]:
        """Fill one table, or put an adapter before it; return what is recorded of it."""
        if any(isinstance(p, AdaptedRows) for p in parametrizations(child)):
            if fill:
                raise MisconfigurationException(f"ItemInit: {name} has an adapter already; export it, or make it anew")
            return {}
        padding: int | None = getattr(child, "padding_idx", None)
        missing = 0
        if self.method in ("keep", "random"):
            first, rows = 0, torch.arange(len(weight), device=weight.device) != padding
            wide = torch.zeros(len(weight), weight.shape[1])
            made = weight if self.method == "keep" else self._table(wide, weight.shape[1], None).to(weight)
            made = made[rows]
        else:
            vectors, first, missing = self._vectors(name, child, weight, data)
            rows = torch.arange(first, first + len(vectors), device=weight.device)
            if self.method in ("linear", "mlp"):
                made = self._adapt(module, weight, vectors, first, padding)
            else:
                made = self._table(vectors, weight.shape[1], getattr(data, "graph", None)).to(weight)
        if not self.dry_run:
            if self.method not in ("linear", "mlp"):
                weight[rows] = made
            if self.frozen:
                weight.requires_grad_(False)
        rms = made.double().square().sum(1).mean().sqrt()
        return {"rows": float(len(made)), "missing": float(missing), "row_norm": float(rms)}

    def _table(self, vectors: Tensor, dim: int, graph: Any) -> Tensor:
        if self.method == "rec_pca" and graph is None:
            raise MisconfigurationException(
                "ItemInit(method='rec_pca'): needs an attribute 'graph' of the data module (cooccurrence_graph of its "
                "training histories); or write projected vectors with evolute item-vectors --rec-pca, and truncate"
            )
        method: Any = self.method
        return initial_table(vectors, dim, method, graph, self.trade_off, self.form, self.row_norm, self.seed)

    def _adapt(
        self, module: nn.Module, weight: nn.Parameter, vectors: Tensor, first: int, padding: int | None
    ) -> Tensor:
        """Make the table a map of the text vectors, for all who share it; return the rows it begins with."""
        kind: Any = self.method
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            adapter = text_adapter(kind, vectors.shape[1], weight.shape[1]).to(weight)
        vectors = vectors.to(weight)
        made = adapter(vectors)
        if self.dry_run:
            return made
        rest = torch.cat([weight[:first], weight[first + len(vectors) :]])
        at = None if padding is None else padding if padding < first else padding - len(vectors)
        rows = AdaptedRows(adapter, rest, first, at)
        users = sharing(module, weight)
        weight.data = vectors.clone()
        for user in users:
            parametrize.register_parametrization(user, "weight", rows, unsafe=True)
        return made

    def _vectors(self, name: str, child: nn.Module, weight: Tensor, data: Any) -> tuple[Tensor, int, int]:
        """Return text vectors [n, D] in the order of the rows, the first of these, and how many stand for no text."""
        padding: int | None = getattr(child, "padding_idx", None)
        first = self.first_row if self.first_row is not None else int(padding == 0)
        names: Any = getattr(data, "item_names", None)
        missing = 0
        if self.vectors is not None:
            path = Path(self.vectors).expanduser()
            names = _row_numbers(path, first, padding) if names is None else names
            vectors = torch.from_numpy(vectors_of(path, names))
        else:
            given: Any = getattr(data, "vectors", None)
            if given is None:
                raise MisconfigurationException(
                    f"ItemInit(method={self.method!r}): needs text vectors: name a file (evolute item-vectors writes "
                    "one), or give the data module an attribute 'vectors'"
                )
            vectors, missing = getattr(given, "table", given), int(getattr(given, "missing", 0))
            if names is not None and len(names) != len(vectors):
                raise MisconfigurationException(
                    f"ItemInit: the data module has {len(names)} item_names and {len(vectors)} vectors"
                )
        last, rows = first + len(vectors), len(weight)
        where = f"ItemInit: {len(vectors)} items in the {rows} rows of {name} (padding_idx {padding}): "
        if self.first_row is None and padding is None and rows != len(vectors):
            raise MisconfigurationException(where + "set first_row to the row of the first one")
        if last > rows or (padding is not None and first <= padding < last):
            raise MisconfigurationException(where + f"rows {first} to {last - 1} are not theirs")
        if self.control:
            vectors = initial_table(vectors, vectors.shape[1], "gaussian", seed=self.seed)
        return vectors, first, missing

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._recorded:
            record(trainer, "item_init", self._values, 0)
            self._recorded = True

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        pl_module.__dict__.pop("configure_model", None)

    def export(self, module: nn.Module) -> None:
        """Make adapted tables plain again: their weight becomes what the adapter, and a normalisation, made of it."""
        for _, child in tables_named(module, self.target):
            make_plain(module, child)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"recorded": self._recorded}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._recorded = state_dict["recorded"]


_filled: "WeakKeyDictionary[nn.Module, WeakSet[ItemInit]]" = WeakKeyDictionary()
"""Who filled which modules: a second fit, a validation or a test must not fill them again."""


def _row_numbers(path: Path, first: int, padding: int | None) -> list[str]:
    """Return the numbers of rows from the first item's to the largest that a file names."""
    names, _ = read_vectors(path)
    odd = next((n for n in names if not n.isdecimal() or int(n) < first or int(n) == padding), None)
    if odd is not None:
        raise MisconfigurationException(
            f"ItemInit(vectors={str(path)!r}): the data module has no item_names, so the names must be rows of items "
            f"({first} upwards), and {odd!r} is none"
        )
    return [str(row) for row in range(first, max(map(int, names)) + 1) if row != padding]

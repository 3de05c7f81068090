"""Geometry of the item vectors while they train, and of the loss that meets them."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

from evolute.callbacks.access import Action, OptimizerStep, Stage, attach, backend_for, detach, stepping
from evolute.callbacks.item_embedding_norm import scored_by_lookup
from evolute.callbacks.named import ITEMS, QUERIES, modules_named, tables_named
from evolute.callbacks.pace import Pace
from evolute.callbacks.record import record, record_arrays, run_folder
from evolute.geometry import condition_number, embedding_geometry, softmax_covariance


class ItemGeometry(Callback):
    """Record what norms and angles of item vectors do, and how well conditioned the loss in the query is.

    A monitor: it changes nothing. It looks at the vectors as the model uses them, normalised if something normalises
    them, after the optimizer step. Records, under ``item_geometry/``:

    - all keys of :func:`evolute.geometry.embedding_geometry`: ``norm_ratio``, ``norm_cv``, ``mean_cos``, ``nn_cos``,
      ``eff_rank``, ``kappa_cov``, ...; with a graph ``tv_ratio`` and ``misalign``;
    - ``kappa_hess``: condition number of the softmax loss's Hessian in the query (damped), mean logarithm over a few
      queries of the batch, and ``hess_top``, its largest eigenvalue; from the output of ``query``;
    - ``loss_gap``: training loss less that of a reference run at the same step, at every step that run logged.

    The vectors themselves go to ``arrays/item_geometry`` of the run folder at the first and the last measurement's
    step, up to ``keep`` items, for the report's map and neighbours.

    Args:
        target: regular expression over whole names of modules: an embedding or linear head, or a module that makes item
            vectors from ids.
        query: regular expression over names of modules, the first of which makes queries; None, or no such module,
            leaves ``kappa_hess`` out.
        graph: use the data module's co-occurrence graph, if it has one.
        queries: how many are taken of a batch.
        sample: rows whose neighbours are looked for.
        keep: largest table that is written to the run folder.
        reference: run folder to compare the training loss with.
        every_n_steps: optimizer steps between two measurements; the first is measured.
        budget: largest share of wall-clock to spend; None for no limit.

    Raises:
        MisconfigurationException: if a value is out of range, no module matches, or the reference is no run.
    """

    def __init__(
        self,
        target: str = ITEMS,
        query: str | None = QUERIES,
        graph: bool = True,
        queries: int = 16,
        sample: int = 1024,
        keep: int = 20000,
        reference: str | None = None,
        every_n_steps: int = 100,
        budget: float | None = 0.05,
    ) -> None:
        for name, value in (("queries", queries), ("sample", sample)):
            if value < 1:
                raise MisconfigurationException(f"ItemGeometry({name}={value}): must be at least 1")
        self.target, self.query, self.graph = target, query, graph
        self.queries, self.sample, self.keep = queries, sample, keep
        self.reference = reference
        self._pace = Pace("ItemGeometry", every_n_steps, budget)
        self._action = Action(Stage.OBSERVE, self._after_update)
        self._reference: dict[int, float] = {}
        self._handle: Any = None
        self._captured: Tensor | None = None
        self._met: Tensor | None = None
        self._last: tuple[int, Tensor] | None = None
        self._stepped: int | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._backend = backend_for(trainer, "ItemGeometry")
        if self.reference is not None:
            self._reference = _losses(Path(self.reference))

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trainer, self._module = trainer, pl_module
        found = next(tables_named(pl_module, self.target), None)
        if found is None:
            raise MisconfigurationException(
                f"ItemGeometry(target={self.target!r}) matches no item vectors of {type(pl_module).__name__}"
            )
        data: Any = getattr(trainer, "datamodule", None)
        self._graph = getattr(data, "graph", None) if self.graph else None
        self._items = found[1]
        encoders = modules_named(pl_module, self.query) if self.query else iter(())
        for _, encoder in encoders:
            self._handle = encoder.register_forward_hook(self._capture)
            break
        attach(trainer, self._action)

    def _capture(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if not self._pace.now or self._captured is not None or not torch.is_grad_enabled():
            return
        query = output[0] if isinstance(output, tuple) else output
        self._met = output[1].detach() if isinstance(output, tuple) else None
        rows = query.detach().reshape(-1, query.shape[-1])
        rows = rows[rows.abs().sum(1) > 0]
        chosen = torch.linspace(0, max(len(rows) - 1, 0), min(self.queries, len(rows)), device=rows.device)
        self._captured = rows[chosen.long()].clone()

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pace.begin(trainer)

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if stepping(trainer):
            self._pace.open(trainer)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, self._stepped = self._stepped, None
        if step is None or step not in self._reference:
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            whole = float(loss) * trainer.accumulate_grad_batches  # Lightning has divided it
            record(trainer, "item_geometry", {"loss_gap": whole - self._reference[step]}, step)

    def _after_update(self, step: OptimizerStep) -> None:
        if self._pace.now:
            with self._pace.timed():
                values = self._measure()
            record(self._trainer, "item_geometry", {**values, "time_ms": self._pace.time_ms()}, self._pace.step)
        self._captured = self._met = None
        self._stepped = self._pace.step
        self._pace.close(self._trainer)

    @torch.no_grad()
    def _measure(self) -> dict[str, Tensor | float]:
        with self._backend.unsharded(self._module) as whole:
            table = self._table(whole)
        if not bool(table.isfinite().all()):
            return {"nonfinite": 1.0}
        graph = self._graph if self._graph is not None and self._graph.shape[0] == len(table) else None
        values: dict[str, Tensor | float] = dict(embedding_geometry(table, graph, self.sample))
        if self._captured is not None and len(self._captured) and self._captured.shape[1] == table.shape[1]:
            met = table if self._met is None else self._met
            probs = torch.softmax(self._captured.double() @ met.double().T, dim=1)
            if bool(probs.isfinite().all()):
                hessian = softmax_covariance(met, probs)
                values["kappa_hess"] = condition_number(hessian).log().mean().exp()
                values["hess_top"] = torch.linalg.eigvalsh(hessian)[:, -1].mean()
        if len(table) <= self.keep:
            values["kept"] = float(len(table))
            if self._last is None:
                record_arrays(self._trainer, "item_geometry", {"table": table.float()}, self._pace.step)
                self._record_names()
            self._last = (self._pace.step, table.float().cpu())
        return values

    def _record_names(self) -> None:
        """Write what the data module knows of its items, ``items.json``, for the report."""
        data: Any = getattr(self._trainer, "datamodule", None)
        folder = run_folder(self._trainer)
        if folder is None or not self._trainer.is_global_zero or not hasattr(data, "item_titles"):
            return
        known = {"title": data.item_titles, "genre": data.item_genres, "count": data.train_counts.tolist()}
        (folder / "items.json").write_text(json.dumps(known), encoding="utf-8")

    def _table(self, whole: dict[str, Tensor] | None) -> Tensor:
        """Return the item vectors as they are used, [n, d], without the rows that pad."""
        module: Any = self._items
        n: int | None = getattr(module, "padding_idx", None)
        name = next(name for name, child in self._module.named_modules() if child is module) + "."
        own = {k.removeprefix(name): w for k, w in (whole or {}).items() if k.startswith(name)}
        looked_up = isinstance(module, nn.Embedding) and scored_by_lookup(module)
        if looked_up or not isinstance(getattr(module, "weight", None), Tensor):
            rows: int = module.num_embeddings if looked_up else n or 0
            ids = torch.arange(rows, device=self._module.device)
            table: Any = torch.func.functional_call(module, own, (ids,)) if own else module(ids)
        elif parametrize.is_parametrized(module, "weight"):
            held: Any = module.parametrizations
            made, prefix = held.weight, "parametrizations.weight."
            own = {k.removeprefix(prefix): w for k, w in own.items() if k.startswith(prefix)}
            table = torch.func.functional_call(made, own, ()) if own else made()
        else:
            table = own.get("weight", module.weight)
        if n is None:
            return table.detach()
        return table.detach()[1:] if n == 0 else table.detach()[:n]

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._last is not None:
            record_arrays(trainer, "item_geometry", {"table": self._last[1]}, self._last[0])

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        detach(trainer, self._action)
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._captured = self._met = None

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"pace": self._pace.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pace.load_state_dict(state_dict["pace"])


def _losses(folder: Path) -> dict[int, float]:
    """Return the training loss of a run by step."""
    path = folder / "metrics.csv"
    if not path.is_file():
        raise MisconfigurationException(f"ItemGeometry(reference={str(folder)!r}): holds no metrics.csv")
    with path.open(newline="") as file:
        rows = [(r.get("step"), r.get("train/loss")) for r in csv.DictReader(file)]
    found = {int(float(step)): float(loss) for step, loss in rows if step and loss}
    return {step: loss for step, loss in found.items() if math.isfinite(loss)}

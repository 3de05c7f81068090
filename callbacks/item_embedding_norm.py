"""Item vectors of one length: the condition under which the softmax loss has bounded curvature in the query."""

import itertools
import math
import re
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from typing_extensions import override

from evolute.callbacks.access import Action, Backend, OptimizerStep, Stage, attach, backend_for, detach, recover
from evolute.callbacks.access import stepping as about_to_step
from evolute.callbacks.item_init import ItemInit
from evolute.callbacks.named import (
    ITEMS,
    QUERIES,
    make_plain,
    matrix_of,
    modules_named,
    parametrizations,
    sharing,
    tables_named,
    when_built,
)
from evolute.callbacks.pace import Pace
from evolute.callbacks.record import record
from evolute.geometry import unit_rows

LARGEST_SCALE = 100.0
"""Of logits, where the temperature is learned."""


class UnitRows(nn.Module):
    """The parametrization: rows of length one, in float32 or wider; the padding row stays zero.

    Args:
        padding_idx: the row that stays zero.
    """

    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.padding_idx = padding_idx

    @override
    def forward(self, weight: Tensor) -> Tensor:
        """Return the rows of ``weight`` [n, d] divided by their lengths."""
        return unit_rows(weight, self.padding_idx)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return a table whose unit rows those of ``weight`` are: itself. It keeps the lengths that it has."""
        return weight


class ItemEmbeddingNorm(Callback):
    """Give item vectors length one wherever the model uses them, and scores a temperature.

    For ``logits = <e_i, h> / tau`` the Hessian of the loss in ``h`` is ``Cov_p(e) / tau^2``: long items take the
    softmax's mass, and its condition number grows with ``exp`` of the spread of the logits. Equal lengths bound both.

    It acts on any module with an embedding table or a linear head whose name matches ``target``, and, if a module's
    name matches ``query``, on that module's output: it becomes ``h / (|h| tau)``, so that scores are cosines over
    ``tau``. Installed in ``setup``, or right after ``configure_model``, optimizers and checkpoints see it. It stays
    when the fit ends, for the model is trained with it: attach the callback to validate, test and predict as well, or
    call :meth:`export`.

    Example::

        norm = ItemEmbeddingNorm(target=r"model\\.item_embedding", query=r"model\\.encoder")
        Trainer(callbacks=[norm]).fit(module, data)
        norm.export(module)  # a plain embedding, equal logits

    Args:
        target: regular expression over whole names of modules. One with a matrix ``weight`` is normalised by mode; of
            one without (an adapter over text vectors), the output is.
        query: regular expression over whole names of modules whose output meets the item vectors; None, or no module of
            the usual names, leaves queries as they are.
        where: ``"both"`` sides of a tied table, ``"output"`` (inputs look up the rows as they are), ``"input"`` (only
            looked-up rows are normalised), or ``"none"``: nothing is.
        mode: ``"parametrize"``: the weight is a function of the stored one, for every use of it; ``"hook"``: looked-up
            rows are normalised, for tables too large to go through at each step, or sharded, and models that look up
            the rows they score (see :func:`scored_by_lookup`); ``"project"``: the stored
            rows are brought back to length after each optimizer step, moments untouched.
        temperature: ``tau``.
        learn_temperature: train ``log(1 / tau)``, at most 100; a parameter ``item_norm_log_scale`` of the module.
        input_scale: looked-up rows are multiplied by this.
        row_norm: length that stored rows start with under ``"parametrize"``: the gradient of a row is divided by it,
            so that a long row learns slowly; ``"auto"`` is ``0.02 sqrt(d)``, ``None`` keeps the lengths.
        every_n_steps: optimizer steps between two records of the stored rows' lengths.
        dry_run: install nothing, record.

    Raises:
        MisconfigurationException: if a value is out of range, nothing matches, the module optimises manually, or the
            strategy shards weights (ZeRO stage 3, FSDP2).
    """

    def __init__(
        self,
        target: str = ITEMS,
        query: str | None = QUERIES,
        where: Literal["both", "output", "input", "none"] = "both",
        mode: Literal["parametrize", "hook", "project"] = "parametrize",
        temperature: float = 0.1,
        learn_temperature: bool = False,
        input_scale: float = 1.0,
        row_norm: float | Literal["auto"] | None = "auto",
        every_n_steps: int = 50,
        dry_run: bool = False,
    ) -> None:
        who = "ItemEmbeddingNorm"
        for name, value, known in (
            ("where", where, ("both", "output", "input", "none")),
            ("mode", mode, ("parametrize", "hook", "project")),
        ):
            if value not in known:
                raise MisconfigurationException(f"{who}({name}={value!r}): must be one of {known}")
        for name, value in (("temperature", temperature), ("input_scale", input_scale)):
            if not (value > 0 and math.isfinite(value)):
                raise MisconfigurationException(f"{who}({name}={value}): must be positive")
        if row_norm is not None and row_norm != "auto" and not (isinstance(row_norm, int | float) and row_norm > 0):
            raise MisconfigurationException(f"{who}(row_norm={row_norm!r}): a positive length, 'auto' or None")
        for name, pattern in (("target", target), ("query", query)):
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise MisconfigurationException(
                    f"{who}({name}={pattern!r}): no regular expression ({error})"
                ) from error
        if (where == "output" and mode != "parametrize") or (where == "input" and mode == "project"):
            raise MisconfigurationException(f"{who}(where={where!r}, mode={mode!r}): needs mode='parametrize'")
        self.target, self.query = target, query
        self.where, self.mode = where, mode
        self.temperature, self.learn_temperature = temperature, learn_temperature
        self.input_scale, self.row_norm = input_scale, row_norm
        self.dry_run = dry_run
        self._pace = Pace(who, every_n_steps)
        self._action = Action(Stage.TRANSFORM, self._after_update)
        self._handles: list[Any] = []  # those of the module it was last installed in
        self._rows: dict[str, nn.Parameter] = {}
        self._trainer: Any = None

    @property
    def _off(self) -> bool:
        return self.dry_run or self.where == "none"

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Before checkpoints are restored and optimizers made: the only hook where a parametrization can go in.
        self._backend: Backend = backend_for(trainer, "ItemEmbeddingNorm")
        self._trainer = trainer
        strategy: Any = trainer.strategy
        sharded = isinstance(strategy, ModelParallelStrategy) or (
            isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3
        )
        if sharded:
            raise MisconfigurationException(
                "ItemEmbeddingNorm reads whole rows, and ZeRO stage 3 and FSDP2 shard weights: use --config "
                "strategy/ddp or strategy/zero2"
            )
        if stage == "fit" and not pl_module.automatic_optimization:
            raise MisconfigurationException("ItemEmbeddingNorm does not support manual optimisation")
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, ItemInit):  # tables are filled before they are normalised, whatever comes first
                other.setup(trainer, pl_module, stage)
        when_built(pl_module, self.target, lambda: self.install(pl_module))

    def install(self, module: nn.Module) -> None:
        """Normalise the item vectors of a module, as :meth:`setup` does; a second call changes nothing.

        Raises:
            MisconfigurationException: if no module matches ``target``.
        """
        found = list(tables_named(module, self.target))
        if not found:
            raise MisconfigurationException(
                f"ItemEmbeddingNorm(target={self.target!r}) matches no module of {type(module).__name__} that holds "
                "item vectors; its modules are "
                + ", ".join(name for name, child in module.named_modules() if name and matrix_of(child) is not None)
            )
        for handle in _installed.pop(module, []):
            handle.remove()
        self._handles = _installed.setdefault(module, [])
        self._rows = {name: weight for name, child in found if (weight := matrix_of(child)) is not None}
        if self._off:
            return
        queries = list(modules_named(module, self.query)) if self.query else []
        if not queries and (self.learn_temperature or self.query not in (None, QUERIES)):
            raise MisconfigurationException(
                f"ItemEmbeddingNorm(query={self.query!r}) matches no module of {type(module).__name__}, and the "
                "temperature acts on its output; its modules are "
                + ", ".join(name for name, _ in module.named_children())
            )
        for name, child in found:
            if isinstance(child, nn.Linear) and (self.mode == "hook" or self.where == "input"):
                raise MisconfigurationException(
                    f"ItemEmbeddingNorm(mode={self.mode!r}, where={self.where!r}): {name} is a linear head, whose rows "
                    "nobody looks up: use mode='parametrize'"
                )
        for _, child in found:
            self._install_table(module, child)
        for _, child in queries:
            self._install_query(module, child)

    def _install_table(self, module: nn.Module, child: nn.Module) -> None:
        weight = matrix_of(child)
        padding = getattr(child, "padding_idx", None)
        if weight is None or self.mode == "hook" or self.where == "input":
            self._handles.append(child.register_forward_hook(_UnitLookup(self.where == "both")))
        elif self.mode == "project":
            if parametrizations(child):
                raise MisconfigurationException(
                    "ItemEmbeddingNorm(mode='project'): the weight is made by an adapter, and what is stored is not "
                    "what the model uses: use mode='parametrize'"
                )
            with torch.no_grad():
                weight.copy_(unit_rows(weight, padding))
        elif not any(isinstance(p, UnitRows) for p in parametrizations(child)):
            if not parametrizations(child):
                self._rescale(weight, padding)
            # Whatever shares the weight, a tied head, goes on sharing it.
            for other in sharing(module, weight):
                parametrize.register_parametrization(other, "weight", UnitRows(padding))
        if self.where == "output":
            self._handles.append(child.register_forward_hook(_raw_lookup))
        elif self.input_scale != 1.0:
            self._handles.append(child.register_forward_hook(_Times(self.input_scale)))

    @torch.no_grad()
    def _rescale(self, weight: Tensor, padding: int | None) -> None:
        if self.row_norm is None:
            return
        length = 0.02 * math.sqrt(weight.shape[1]) if self.row_norm == "auto" else float(self.row_norm)
        weight.copy_(length * unit_rows(weight, padding))

    def _install_query(self, module: nn.Module, child: nn.Module) -> None:
        if self.learn_temperature and not hasattr(module, "item_norm_log_scale"):
            start = torch.tensor([-math.log(self.temperature)])  # DeepSpeed takes no parameter without a dimension
            module.register_parameter("item_norm_log_scale", nn.Parameter(start))

        learned = module if self.learn_temperature else None
        self._handles.append(child.register_forward_hook(_UnitQuery(learned, 1 / self.temperature)))

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trainer = trainer
        attach(trainer, self._action)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pace.begin(trainer)

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if about_to_step(trainer):
            self._pace.open(trainer)

    def _after_update(self, step: OptimizerStep) -> None:
        stored = {n: p for n, p in step.params.items() if any(p is w for w in self._rows.values())}
        with self._pace.timed():
            if self.mode == "project" and not self._off and stored:
                self._project(step, stored)
            values = self._measure(stored) if self._pace.now else {}
        if self._pace.now:
            record(self._trainer, "item_norm", {**values, "time_ms": self._pace.time_ms()}, self._pace.step)
        self._pace.close(self._trainer)

    def _project(self, step: OptimizerStep, stored: dict[str, Tensor]) -> None:
        parts = self._backend.weights(stored)
        whole = self._backend.whole(stored, parts)
        with torch.no_grad():
            unit = {name: unit_rows(w.to(torch.float32)).to(w.dtype) for name, w in whole.items()}
            for name, part in self._backend.part(stored, unit).items():
                parts[name].copy_(part)
        self._backend.publish(step.optimizer)

    def _measure(self, stored: dict[str, Tensor]) -> dict[str, Tensor | float]:
        """Return lengths of the stored rows of the first table, that of zero rows left out."""
        values: dict[str, Tensor | float] = {"scale": 1 / self.temperature}
        if self.learn_temperature and not self._off:
            module: Any = self._trainer.lightning_module
            values["scale"] = module.item_norm_log_scale.detach().exp().clamp(max=LARGEST_SCALE)
        for whole in self._backend.whole(stored, self._backend.weights(stored)).values():
            lengths = torch.linalg.vector_norm(whole.float(), dim=1)
            lengths = lengths[lengths > 0]
            if len(lengths):
                values |= {"stored_mean": lengths.mean(), "stored_ratio": lengths.max() / lengths.min()}
            break
        return values

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        recover(trainer)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        detach(trainer, self._action)
        pl_module.__dict__.pop("configure_model", None)

    def export(self, module: nn.Module) -> None:
        """Make the tables plain again: the stored weight becomes the normalised one, equal wherever it was used.

        Hooks are removed, so queries are no longer normalised: of one user the order of the items stays as it was, the
        scores are divided by ``tau |h|`` no more.
        """
        for handle in _installed.pop(module, []):
            handle.remove()
        for _, child in tables_named(module, self.target):
            if parametrize.is_parametrized(child, "weight"):
                make_plain(module, child)
            elif matrix_of(child) is not None and not self._off:
                weight = cast(Tensor, child.weight)
                with torch.no_grad():
                    weight.copy_(unit_rows(weight, getattr(child, "padding_idx", None)))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"pace": self._pace.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pace.load_state_dict(state_dict["pace"])


_installed: "WeakKeyDictionary[nn.Module, list[Any]]" = WeakKeyDictionary()
"""Hooks by the module they were installed for, so that another callback takes the place of one, not joins it."""


class _Times:
    """A forward hook that multiplies."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * self.factor


class _UnitQuery:
    """A forward hook that gives queries length ``scale``, fixed or learned by a parameter of ``learned``."""

    def __init__(self, learned: nn.Module | None, scale: float) -> None:
        self.learned, self.scale = learned, scale

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        scale: Any = self.scale
        if self.learned is not None:
            scale = cast(Tensor, self.learned.item_norm_log_scale).exp().clamp(max=LARGEST_SCALE)
        if isinstance(output, tuple):  # a query and the items it meets, propagated along a graph
            head, *rest = output
            return (unit_rows(head) * scale, *(unit_rows(x) for x in rest))
        return unit_rows(output) * scale


def _raw_lookup(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Look the rows up as they are before normalisation."""
    rows: Any = matrix_of(module)
    if rows is None or not isinstance(module, nn.Embedding):
        return output
    for made in itertools.takewhile(lambda p: not isinstance(p, UnitRows), parametrizations(module)):
        rows = made(rows)
    return F.embedding(args[0], rows, module.padding_idx)


class _UnitLookup:
    """A forward hook that normalises looked-up rows; ``scored``: those that meet a query as well."""

    def __init__(self, scored: bool) -> None:
        self.scored = scored

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return unit_rows(output)


def scored_by_lookup(module: nn.Module) -> bool:
    """Say whether a table is normalised as its rows are looked up, so that a model must look up those it scores."""
    return any(isinstance(hook, _UnitLookup) and hook.scored for hook in module._forward_hooks.values())

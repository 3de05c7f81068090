"""Evaluate the loss of the live module on a captured batch, as often as a probe needs, without a trace."""

import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.nn.utils import stateless
from torch.overrides import TorchFunctionMode

from evolute.callbacks.access.backend import Backend, named_parameters
from evolute.callbacks.access.untouched import muted, untouched
from evolute.callbacks.protocols import ProbeLoss

_probed: list[L.LightningModule] = []


def being_probed() -> bool:
    """Say whether what runs now is a probe, not training: nothing is decided in it."""
    return bool(_probed)


SHARE = 16
"""A probe batch is this fraction of the training batch unless a number of samples is asked for."""


def batch_tensors(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch: in tuples, lists, mappings (a tokenizer's output too) and dataclasses."""
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    return found


def batch_size(batch: Any) -> int | None:
    """Return the length of the first tensor of a batch, None if it has none."""
    tensors = batch_tensors(batch)
    return tensors[0].shape[0] if tensors and tensors[0].ndim else None


def take_samples(batch: Any, samples: int | None = None) -> Any:
    """Return a detached copy of the first samples of a batch, whatever its nesting of tensors.

    A leaf is cut along its first dimension if that has the size of the first tensor's; other leaves are kept whole.

    Args:
        batch: any nesting of tensors and other things.
        samples: how many; a number above the batch's size keeps all, None takes a sixteenth of the batch, at least one.
    """
    size = batch_size(batch)
    if samples is None and size is not None:
        samples = max(1, size // SHARE)

    def take(leaf: Tensor) -> Tensor:
        if samples is not None and size is not None and leaf.ndim and leaf.shape[0] == size:
            leaf = leaf[:samples]
        return leaf.detach().clone()

    return apply_to_collection(batch, Tensor, take)


def with_tensors(batch: Any, tensors: Sequence[Tensor]) -> Any:
    """Return a batch of the structure of ``batch`` that holds ``tensors``, in the order of :func:`batch_tensors`.

    This brings a captured batch back from a checkpoint, which may hold tensors but no foreign containers.

    Raises:
        ValueError: if the number of tensors differs.
    """
    places = batch_tensors(batch)
    if len(places) != len(tensors):
        raise ValueError(f"the batch holds {len(places)} tensors, {len(tensors)} were given")
    given = iter(tensors)
    return apply_to_collection(batch, Tensor, lambda leaf: next(given).to(leaf.device))


@dataclass(frozen=True)
class Head:
    """The linear layer behind large logits, and what entered it: much smaller than what came out.

    Attributes:
        hidden: inputs [n, d] of the terms that count.
        weight: [K, d].
        bias: [K] or None.
        weight_name, bias_name: under which they are trained; None for a frozen one.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    weight_name: str | None = None
    bias_name: str | None = None


class RecordLogits(TorchFunctionMode):
    """Record what goes into ``cross_entropy`` and ``binary_cross_entropy_with_logits`` while it is active.

    Args:
        head_from: logits of so many classes or more are left alone if the linear layer that made them is found.

    Attributes:
        rows: one tensor [n, K] a call: the logits of the terms that count (``ignore_index`` left out). A binary loss
            gives [n, 2] with a zero column: each logit is a two-class problem of its own.
        heads: one :class:`Head` a call whose logits were left alone.
    """

    def __init__(self, head_from: int = sys.maxsize) -> None:
        super().__init__()
        self.rows: list[Tensor] = []
        self.heads: list[Head] = []
        self._head_from = head_from
        self._linear: Head | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let the call through, after noting its logits."""
        kwargs = kwargs or {}
        if func is F.linear:
            self._note_linear(*args, **kwargs)
        elif func is F.cross_entropy:
            counted = _counted(*args, **kwargs)
            logits = _logit_rows(args[0] if args else kwargs["input"])
            head = self._head_of(logits)
            if head is None:
                self.rows.append(logits if counted is None else logits[counted])
            else:
                hidden = head.hidden if counted is None else head.hidden[counted]
                self.heads.append(Head(hidden.detach().clone(), head.weight, head.bias))
        elif func is F.binary_cross_entropy_with_logits:
            z = (args[0] if args else kwargs["input"]).reshape(-1, 1)
            self.rows.append(torch.cat([torch.zeros_like(z), z], dim=1))
        return func(*args, **kwargs)

    def _note_linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        if weight.ndim == 2 and weight.shape[0] >= self._head_from:
            self._linear = Head(input.reshape(-1, input.shape[-1]), weight, bias)

    def _head_of(self, logits: Tensor) -> Head | None:
        """Return the last large linear layer if its outputs are these logits: in number, and in the first row."""
        head, self._linear = self._linear, None
        if head is None or logits.shape != (head.hidden.shape[0], head.weight.shape[0]) or not len(logits):
            return None
        made = F.linear(head.hidden[:1], head.weight, head.bias).to(logits.dtype)
        return head if torch.allclose(made, logits[:1], rtol=1e-2, atol=1e-2) else None


def _logit_rows(logits: Tensor) -> Tensor:
    classes = 0 if logits.ndim == 1 else 1
    return logits.movedim(classes, -1).reshape(-1, logits.shape[classes])


def _counted(input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """Return which terms of a cross-entropy count, None for all."""
    if target.is_floating_point():  # class probabilities
        return None
    ignore = kwargs.get("ignore_index", args[2] if len(args) > 2 else -100)
    return target.reshape(-1) != ignore


class Probe:
    """The loss of a module on one batch, as a closure, and the logits behind it.

    Use inside :func:`probing`. The module is in eval mode there, so dropout and batch statistics do not make the loss
    random, and it runs uncompiled, in full precision (mixed precision is off; half-precision weights are widened).

    Attributes:
        params: the parameters of the loss by name; float32 copies of half-precision ones, and tensors of their own
            where the strategy shards or hooks the module's.
    """

    def __init__(
        self, module: L.LightningModule, batch: Any, batch_idx: int, weights: Mapping[str, Tensor] | None
    ) -> None:
        self._module = module
        self._batch = batch
        self._batch_idx = batch_idx
        live = named_parameters(module)
        self.params: dict[str, Tensor] = dict(live)
        self._others: dict[str, Tensor] = {}  # frozen weights that the strategy shards
        widened = any(p.dtype in (torch.bfloat16, torch.float16) for p in live.values())
        if widened:
            self._batch = apply_to_collection(batch, Tensor, _widen)
        self._swapped = widened or weights is not None
        if self._swapped:
            given = dict(module.named_parameters()) if weights is None else weights
            known = {name.replace("_orig_mod.", ""): _widen(w.detach()) for name, w in given.items()}
            self.params = {name: known[name].requires_grad_() for name in live}
            self._others = {n: w for n, w in known.items() if n not in live} if weights is not None else {}

    def loss(self, params: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the loss at ``params`` (default: this probe's own), with a graph."""
        result = self._run(params)
        return result[0] if isinstance(result, tuple) else result

    def head(self, head_from: int) -> Head | None:
        """Return the linear layer behind the logits and its inputs, if there are ``head_from`` classes or more.

        None if there are fewer, if no such layer made them, if its weight is computed from others, or if the loss has
        several parts.
        """
        with RecordLogits(head_from) as recorder:
            self._run()
        if len(recorder.heads) != 1 or recorder.rows:
            return None
        head = recorder.heads[0]
        name_of = {id(p): name for name, p in self.params.items()}
        frozen = {id(p) for p in (*self._module.parameters(), *self._others.values())}
        if any(t is not None and id(t) not in name_of and id(t) not in frozen for t in (head.weight, head.bias)):
            return None
        return replace(head, weight_name=name_of.get(id(head.weight)), bias_name=name_of.get(id(head.bias)))

    def logits(self, params: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the logits [n, K] that the loss is taken of, at ``params`` (default: this probe's own).

        Raises:
            MisconfigurationException: if the loss goes through no torch cross-entropy and ``loss_on`` returns no
                logits.
        """
        with RecordLogits() as recorder:
            result = self._run(params)
        if isinstance(result, tuple) and len(result) == 3:
            rows, targets = result[1].reshape(-1, result[1].shape[-1]), result[2]
            return rows if targets.is_floating_point() else rows[targets.reshape(-1) != -100]
        kinds = {rows.shape[1] for rows in recorder.rows}
        if len(kinds) == 1:
            return torch.cat(recorder.rows)
        found = (
            "no torch cross-entropy call"
            if not kinds
            else f"cross-entropy calls over different class counts {sorted(kinds)}"
        )
        raise MisconfigurationException(
            f"{type(self._module).__name__}: {found} found in its loss, so the logits are unknown. Add to the module\n"
            "    def loss_on(self, batch):\n"
            "        logits, targets = ...\n"
            "        return torch.nn.functional.cross_entropy(logits, targets), logits, targets"
        )

    def _run(self, params: Mapping[str, Tensor] | None = None) -> Any:
        module = self._module
        swap = params if params is not None else (self.params if self._swapped else None)
        with ExitStack() as stack:
            if swap is not None:
                own = _own_names(module)
                full = {own[name]: p for name, p in {**self._others, **swap}.items()}
                stack.enter_context(stateless._reparametrize_module(module, full, tie_weights=True))
            if isinstance(module, ProbeLoss):
                return module.loss_on(self._batch)
            return _loss_of_step(module, self._batch, self._batch_idx)


def _own_names(module: torch.nn.Module) -> dict[str, str]:
    """Return the module's own name of every parameter, by that name with and without its ``_orig_mod.``."""
    names = [name for name, _ in module.named_parameters()]
    return {**{name.replace("_orig_mod.", ""): name for name in names}, **{name: name for name in names}}


def _widen(leaf: Tensor) -> Tensor:
    return leaf.float() if leaf.dtype in (torch.bfloat16, torch.float16) else leaf


def _loss_of_step(module: L.LightningModule, batch: Any, batch_idx: int) -> Tensor:
    # torch.compile over a whole LightningModule replaces training_step; the original is kept here.
    compiled: Mapping[str, Any] = getattr(module, "_compiler_ctx", None) or {}
    step = cast("Callable[..., Any]", compiled.get("original_training_step", module.training_step))
    takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    output = step(batch, batch_idx) if takes_index else step(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise MisconfigurationException(
            f"{type(module).__name__}.training_step returned {type(loss).__name__}, not a loss: "
            "define loss_on(batch) for probes"
        )
    return loss


@contextmanager
def probing(
    trainer: L.Trainer, module: L.LightningModule, backend: Backend, batch: Any, batch_idx: int = 0
) -> Generator[Probe]:
    """Open a :class:`Probe` on ``batch``; on leaving, module, generators and gradients are as they were."""
    with ExitStack() as stack:
        _probed.append(module)
        stack.callback(_probed.pop)
        weights = stack.enter_context(backend.unsharded(module))
        stack.enter_context(untouched(module))
        stack.enter_context(muted(module))
        if not isinstance(trainer.precision_plugin, MixedPrecision):
            stack.enter_context(_full_precision_default(trainer))
        stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:  # nothing can be compiled before it is imported, and importing it is slow
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        module.eval()  # the flags come back with the other attributes
        yield Probe(module, batch, batch_idx, weights)


@contextmanager
def _full_precision_default(trainer: L.Trainer) -> Generator[None]:
    """Keep ``64-true`` runs in double; half-precision runs are widened to float32, the default."""
    double = getattr(trainer.precision_plugin, "precision", "") == "64-true"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def refuse_reentrant_checkpointing(loss: Tensor, module: L.LightningModule, who: str, instead: str = "") -> None:
    """Refuse a loss behind reentrant activation checkpointing: it can be differentiated only into ``.grad``.

    Args:
        loss: with its graph.
        module: that computed it.
        who: the callback's name, for the message.
        instead: another way out, to end the message with.

    Raises:
        MisconfigurationException: saying what to change.
    """
    seen: set[Any] = set()
    stack: list[Any] = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise MisconfigurationException(
                f"{who} needs second derivatives, and {type(module).__name__} uses reentrant activation checkpointing, "
                "which has none: call torch.utils.checkpoint.checkpoint with use_reentrant=False"
                + (f", {instead}" if instead else "")
            )
        stack.extend(following for following, _ in node.next_functions)


def refuse_manual_without_loss(module: L.LightningModule, who: str) -> None:
    """Refuse a module under manual optimisation that has no ``loss_on``: its ``training_step`` would step the
    optimizer.

    Raises:
        MisconfigurationException: with the lines to add.
    """
    if not module.automatic_optimization and not isinstance(module, ProbeLoss):
        raise MisconfigurationException(
            f"{who} re-evaluates the loss, and {type(module).__name__} optimises manually, so its training_step "
            "cannot be called again. Add a method loss_on(self, batch) that returns the loss to watch"
        )

"""Losses over tokens, opened: who takes tokens out of one, decided once a micro-batch and replayed ever after."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from evolute.callbacks.access.probe import being_probed
from evolute.callbacks.protocols import is_token_loss

BYTES = 2**22
"""Size of the logits that exist at once while a mask looks at them."""


@dataclass
class TokenCall:
    """One call of a loss over tokens [B, T], before any mask of ours.

    Attributes:
        loss: the module that is called.
        arguments: its keyword arguments.
        micro_batch: position of the call in its optimizer step, from 0.
        mixed: whether the call runs in mixed precision. Masks do not: shifts of 1e-4 would not survive it.
        proposals: what those asked earlier in this call would keep [B, T], by the name of their class.
    """

    loss: nn.Module
    arguments: Mapping[str, Any]
    micro_batch: int
    mixed: bool = False
    proposals: dict[str, Tensor] = field(default_factory=dict)

    @property
    def actions(self) -> Tensor:
        """Sampled tokens [B, T]."""
        return self.arguments["actions"]

    @property
    def mask(self) -> Tensor:
        """Tokens that take part [B, T]."""
        return self.arguments["mask"].bool()

    @property
    def advantages(self) -> Tensor:
        """Advantages [B, T], in float32 or wider."""
        given = self.arguments["advantages"].detach()
        return given.to(torch.promote_types(given.dtype, torch.float32)).expand(self.actions.shape)

    @property
    def temperature(self) -> float:
        """By which the loss divides logits."""
        return float(getattr(self.loss, "temperature", 1.0))

    def of(self, name: str, rows: Tensor) -> Tensor | None:
        """Return an argument [B, T] at some tokens, counted along B T; None if it was not given."""
        given = self.arguments.get(name)
        return None if given is None else given.detach().expand(self.actions.shape).flatten()[rows]

    def hidden(self, rows: Tensor) -> Tensor:
        """Return the inputs of the head at some tokens [n, H], as they are."""
        return self.arguments["hidden"].detach().flatten(0, 1)[rows]

    def logits(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield some of ``rows`` at a time, and their logits over the temperature [n, V], in float32 or wider.

        They may be the loss's own: not to be written to.
        """
        given, head = self.arguments.get("logits"), self.arguments.get("head")
        width = given.shape[-1] if given is not None else _outputs(head)
        for some in rows.split(max(1, BYTES // (4 * width))):
            z = self.scores(self.hidden(some)) if given is None else _taken(given.detach().flatten(0, 1), some)
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            yield some, z if self.temperature == 1.0 else z / self.temperature

    def scores(self, hidden: Tensor) -> Tensor:
        """Return what the head makes of hidden states [n, H], in the precision of the run and without its dropout."""
        head = self.arguments["head"]
        training = [m for m in head.modules() if m.training]
        try:
            head.eval()
            with torch.autocast(hidden.device.type, enabled=self.mixed):
                return head(hidden).detach()
        finally:
            for m in training:
                m.training = True


def _taken(table: Tensor, rows: Tensor) -> Tensor:
    """Return rows [n, V] in ascending order; neighbours are not copied, which would take as long as their softmax."""
    first, last = int(rows[0]), int(rows[-1])
    return table[first : last + 1] if last - first + 1 == len(rows) else table[rows]


def _outputs(head: Any) -> int:
    width = getattr(head, "out_features", None)
    return int(width) if isinstance(width, int) else 2**16


class Mask(Protocol):
    """What the door asks of those who take tokens out."""

    denominator: Literal["kept", "original"]
    order: int

    @property
    def acting(self) -> bool:
        """Whether what it says is done, or only noted."""
        ...

    def choose(self, call: TokenCall) -> Tensor:
        """Return the tokens to keep [B, T]; those outside the call's mask do not matter."""
        ...

    def settled(self, call: TokenCall, kept: Tensor) -> None:
        """Hear which tokens all together kept [B, T]."""
        ...

    def probed(self, call: TokenCall) -> None:
        """Hear of a call of the loss in a probe."""
        ...


class Decision(NamedTuple):
    """What was decided about some completions, and how to know them again."""

    actions: Tensor
    mask: Tensor
    kept: Tensor

    def about(self, actions: Tensor, mask: Tensor) -> Tensor | None:
        """Return what was decided about these completions, or the first of them; None if they are others."""
        rows, width = actions.shape
        if rows > self.actions.shape[0] or width != self.actions.shape[1]:
            return None
        same = torch.equal(actions, self.actions[:rows]) and torch.equal(mask.bool(), self.mask[:rows])
        return self.kept[:rows] if same else None


class TokenDoor:
    """One pre-hook on every loss over tokens of a module, shared by all masks.

    The first call of a training batch decides, and any further one about other tokens. Whatever calls again with tokens
    that were decided in this optimizer step (activation checkpointing, a probe, on all or on the first samples) gets
    the same mask. Other calls (validation, a probe on an older batch) pass as they are.
    """

    def __init__(self, module: L.LightningModule) -> None:
        losses = [m for m in module.modules() if m is not module and is_token_loss(m)]
        self.found = bool(losses)
        self._handles = [m.register_forward_pre_hook(self._hook, with_kwargs=True) for m in losses]
        self._masks: list[Mask] = []
        self._decisions: list[Decision] = []
        self._batch: Any = None
        self._awaiting = self._open = self._stepped = False

    def attach(self, mask: Mask) -> None:
        """Ask ``mask`` from now on; the lowest ``order`` is asked first."""
        self._masks.append(mask)
        self._masks.sort(key=lambda m: m.order)

    def detach(self, mask: Mask) -> bool:
        """Ask it no more; say whether none is left. The last one out removes the hooks."""
        self._masks = [m for m in self._masks if m is not mask]
        if not self._masks:
            for handle in self._handles:
                handle.remove()
        return not self._masks

    def begin(self, batch: Any) -> None:
        """Note that a training batch begins; every mask says so."""
        if self._open and self._batch is batch:
            return
        self._batch, self._open, self._awaiting = batch, True, True
        if self._stepped:
            self._decisions, self._stepped = [], False

    def end(self) -> None:
        """Note that it is over."""
        self._open, self._batch = False, None

    def stepped(self) -> None:
        """Note that the optimizer has stepped: its decisions stand until the next batch begins."""
        self._stepped = True

    def _hook(self, loss: nn.Module, args: Any, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        actions, mask = arguments["actions"], arguments["mask"]
        probed = being_probed()
        kept = self._replayed(actions, mask) if probed or not self._awaiting else None
        device = actions.device.type
        call = TokenCall(loss, arguments, len(self._decisions), torch.is_autocast_enabled(device))
        if probed:
            with torch.no_grad(), torch.autocast(device, enabled=False):
                for each in self._masks:
                    each.probed(call)
        if kept is None and self._open and not probed:
            self._awaiting = False
            with torch.no_grad(), torch.autocast(device, enabled=False):
                kept = self._decide(call)
            self._decisions.append(Decision(actions.clone(), mask.bool().clone(), kept))
        if kept is None or not self._masks:
            return None
        changed = {**arguments, "mask": mask.bool() & kept}
        if any(m.acting and m.denominator == "original" for m in self._masks):
            changed["denominator_mask"] = arguments.get("denominator_mask", mask)
        return args, changed

    def _replayed(self, actions: Tensor, mask: Tensor) -> Tensor | None:
        found = (decision.about(actions, mask) for decision in reversed(self._decisions))
        return next((kept for kept in found if kept is not None), None)

    def _decide(self, call: TokenCall) -> Tensor:
        kept = torch.ones_like(call.mask)
        for mask in self._masks:
            wanted = mask.choose(call)
            call.proposals[type(mask).__name__] = wanted
            if mask.acting:
                kept = kept & wanted
        for mask in self._masks:
            mask.settled(call, kept)
        return kept


_doors: "WeakKeyDictionary[L.Trainer, TokenDoor]" = WeakKeyDictionary()


def attach_mask(trainer: L.Trainer, mask: Mask) -> TokenDoor:
    """Let ``mask`` take tokens out of every loss over tokens of the trained module; call it in ``on_fit_start``.

    Raises:
        MisconfigurationException: if there is no such loss, with the lines to add.
    """
    module = trainer.lightning_module
    if trainer not in _doors:
        door = TokenDoor(module)
        if not door.found:
            raise MisconfigurationException(
                f"{type(mask).__name__} takes tokens out of a policy loss, and {type(module).__name__} has none. Add\n"
                "    self.policy_loss = PolicyLoss()  # in __init__; evolute's models have it\n"
                "    loss = self.policy_loss(hidden=hidden, head=self.head, actions=actions, advantages=advantages,\n"
                "                            mask=mask).loss  # in training_step, at the predicting positions"
            )
        _doors[trainer] = door
    _doors[trainer].attach(mask)
    return _doors[trainer]


def detach_mask(trainer: L.Trainer, mask: Mask) -> None:
    """Undo :func:`attach_mask`; detaching what was never attached does nothing."""
    if trainer in _doors and _doors[trainer].detach(mask):
        del _doors[trainer]

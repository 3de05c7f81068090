"""torch's Muon for hidden matrices and torch's AdamW for the rest, as one optimizer."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from typing_extensions import override

from evolute.optim.groups import parameter_groups, refuse_pieces, refuse_shards

Algorithm = Literal["muon", "adamw"]


class MuonAdamW(Optimizer):
    """One torch optimizer that steps some groups by ``torch.optim.Muon`` and the others by ``torch.optim.AdamW``.

    A group says which by its key ``"algorithm"``. This object owns ``param_groups`` and ``state``; a step lends both to
    the torch optimizers as they are at that moment. So whoever edits or splits ``param_groups``, before the step or
    inside it, is obeyed; schedulers, clipping and checkpoints see one ordinary optimizer; and the result is that of
    the two torch optimizers, bit for bit.

    Example::

        optimizer = MuonAdamW(model, lr=2e-3, adamw_lr=1e-3)

    Args:
        params: a module, sorted by :func:`~evolute.optim.groups.parameter_groups` (hidden 2D matrices to Muon;
            embeddings, heads and filters to AdamW; vectors to AdamW without weight decay); or groups, each with
            ``"algorithm"``.
        lr: of the Muon groups.
        adamw_lr: of the AdamW groups; None takes ``lr``, which suits ``match_rms_adamw``.
        weight_decay: decoupled, of both.
        momentum: of Muon's running mean of the gradient.
        nesterov: of Muon.
        betas: of AdamW.
        eps: of AdamW.
        adjust_lr_fn: of Muon; ``"match_rms_adamw"`` gives its update the RMS of an AdamW update (arXiv 2502.16982),
            ``"original"`` multiplies it by ``sqrt(max(1, out/in))``.
        overrides: with a module, regular expression over whole names to norm; ``"spectral"`` means Muon.

    Raises:
        ValueError: if a hyper-parameter is out of range, a group has no known ``"algorithm"``, a Muon group holds a
            parameter that is not 2D or is sharded (FSDP2), or ``overrides`` come without a module.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[dict[str, Any]],
        lr: float | Tensor = 2e-3,
        adamw_lr: float | Tensor | None = None,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        adjust_lr_fn: str = "match_rms_adamw",
        overrides: Mapping[str, str] | None = None,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum}: must be in [0, 1)")
        # torch refuses an optimizer without parameters; the true ones are lent at every step.
        nothing = [torch.empty(1, 1)]
        self._inner: dict[str, Optimizer] = {
            "muon": Muon(
                nothing,
                lr=lr,  # pyright: ignore[reportArgumentType]
                weight_decay=weight_decay,
                momentum=momentum,
                nesterov=nesterov,
                adjust_lr_fn=adjust_lr_fn,
            ),
            "adamw": AdamW(
                nothing, lr=lr if adamw_lr is None else adamw_lr, betas=betas, eps=eps, weight_decay=weight_decay
            ),
        }
        if isinstance(params, nn.Module):
            params = _algorithms(params, overrides)
        elif overrides:
            raise ValueError(f"overrides={dict(overrides)!r} sort the parameters of a module: pass the module")
        # Only what schedulers look up in the defaults; the rest is filled in by algorithm.
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with a key ``"algorithm"``; what it leaves open is filled in with that algorithm's defaults."""
        algorithm = param_group.get("algorithm") if isinstance(param_group, dict) else None
        if algorithm not in self._inner:
            raise ValueError(f"a parameter group needs the key 'algorithm', 'muon' or 'adamw', got {algorithm!r}")
        for key, value in self._inner[algorithm].defaults.items():
            param_group.setdefault(key, value)
        super().add_param_group(param_group)
        try:
            if algorithm == "muon":
                _check_matrices(param_group["params"])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; ``closure``, if given, is evaluated once, before ``param_groups`` is read.

        Raises:
            RuntimeError: if a Muon group's matrix was replaced by a flat piece (DeepSpeed ZeRO).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        refuse_pieces(
            (p for group in self.param_groups if group["algorithm"] == "muon" for p in group["params"]), "MuonAdamW"
        )
        for algorithm, inner in self._inner.items():
            inner.param_groups = [group for group in self.param_groups if group["algorithm"] == algorithm]
            inner.state = self.state
            if inner.param_groups:
                # Beneath the wrapper torch puts around every step: global step hooks shall see one step, not three.
                step = type(inner).step
                getattr(step, "__wrapped__", step)(inner)
        return loss

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_inner": self._inner}


def _check_matrices(params: list[Tensor]) -> None:
    refuse_shards(params, "MuonAdamW")
    shapes = [tuple(p.shape) for p in params if p.ndim != 2]
    if shapes:
        raise ValueError(f"Muon steps matrices, got a parameter of shape {shapes[0]}: put it in an 'adamw' group")


def _algorithms(module: nn.Module, overrides: Mapping[str, str] | None) -> list[dict[str, Any]]:
    """Sort a module's parameters: hidden matrices to Muon, the rest to AdamW, vectors among it without decay."""
    muon: list[Any] = []
    adamw: list[Any] = []
    vectors: list[Any] = []
    for group in parameter_groups(module, overrides):
        for name, p in group["params"]:
            if group["norm"] == "spectral" and p.ndim == 2:
                muon.append((name, p))
            else:
                (vectors if group["norm"] == "rms" else adamw).append((name, p))
    groups: list[dict[str, Any]] = [
        {"params": muon, "algorithm": "muon"},
        {"params": adamw, "algorithm": "adamw"},
        {"params": vectors, "algorithm": "adamw", "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]

"""Scion: steepest descent in the norm of each layer, by its linear minimisation oracle (arXiv 2502.07529)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from evolute.geometry.norms.lmo import METHODS, NORMS, Method, batched_lmo, norm_scale
from evolute.optim.groups import parameter_groups, refuse_pieces, refuse_shards

# Radius of each norm relative to lr, in the scaled norms: a hidden layer's output moves by at most lr (RMS to RMS), a
# gain by lr, an entry of an embedding or head by SIGN_SCALE * lr / width.
SIGN_SCALE = 60.0
DEFAULT_SCALES: dict[str, float] = {"spectral": 1.0, "sign": SIGN_SCALE, "rms": 1.0}


class Scion(Optimizer):
    """Step every parameter to the minimiser of its momentum over a ball of its own norm.

    For momentum ``B <- momentum B + (1 - momentum) g`` the step is ``p <- (1 - lr weight_decay) p + lr scale lmo(B)``,
    with the scaled oracle of the group's ``norm`` (see :mod:`evolute.geometry.norms.lmo`). Its size depends on ``lr``
    and ``scale`` alone, not on the gradient. With ``weight_decay=1`` this is the paper's constrained form: weights in
    the ball of radius ``scale`` never leave it (in general the radius is ``scale / weight_decay``).

    All spectral parameters of one shape (or its transpose), of whatever group, are orthogonalised in one batched call,
    so cutting groups up changes neither speed nor a bit of the result. Filters count as matrices [out, in * k * k].

    Example::

        optimizer = Scion(model, lr=0.02)

    Args:
        params: a module, sorted by :func:`~evolute.optim.groups.parameter_groups`; or named or plain parameters, or
            groups, which may set each option below and ``"norm"`` (``"spectral"``, the default, ``"sign"``, ``"rms"``).
        lr: step length in the scaled norm of each group, number or one-element tensor.
        momentum: usual convention, share of the old mean that is kept (Scion's own code calls 0.1 what is 0.9 here).
        weight_decay: decoupled. 0 is the paper's unconstrained form; with a module, vectors are not decayed.
        nesterov: step along the mean of gradient and momentum, ``lerp(g, B, momentum)``, as Muon does by default.
        scale: radius of the ball, in units of ``lr``; None takes 1 for spectral and rms and 60 for sign. The ratio of
            60 is that of the paper's language-model runs (radius 50 and 3000), whose absolute radii belong to the
            constrained form.
        method: ``"newton_schulz"`` (Muon's quintic), ``"polar_express"`` or ``"svd"``.
        overrides: with a module, regular expression over whole names to norm.

    The momentum buffer has the dtype of its parameter, bfloat16 included, because loading a torch state dict would
    cast any other; the orthogonalisation runs in the precision that is fast on the device.

    Raises:
        ValueError: if an option is out of range or unknown, a parameter is complex or sharded (FSDP2), a spectral
            parameter has fewer than two dimensions, or ``overrides`` come without a module.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        scale: float | None = None,
        method: Method = "newton_schulz",
        overrides: Mapping[str, str] | None = None,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method={method!r}: must be one of {', '.join(METHODS)}")
        if isinstance(params, nn.Module):
            groups = parameter_groups(params, overrides)
            params = [{**g, "weight_decay": 0.0} if g["norm"] == "rms" else g for g in groups]
        elif overrides:
            raise ValueError(f"overrides={dict(overrides)!r} sort the parameters of a module: pass the module")
        self.method: Method = method
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "scale": scale,
                "norm": "spectral",
            },
        )

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; what it leaves open is filled in with the optimizer's options, then checked."""
        super().add_param_group(param_group)
        try:
            _check(param_group)
        except ValueError:
            self.param_groups.pop()
            raise
        if param_group["scale"] is None:
            param_group["scale"] = DEFAULT_SCALES[param_group["norm"]]

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; ``closure``, if given, is evaluated once, before ``param_groups`` is read.

        Parameters without a gradient are left alone, momentum included.

        Raises:
            RuntimeError: if a gradient is sparse, or a matrix was replaced by a flat piece (DeepSpeed ZeRO).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(p, p.grad, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not work:
            return loss
        params = [p for p, _, _ in work]
        grads = [g for _, g, _ in work]
        groups = [group for _, _, group in work]
        refuse_pieces((p for p, group in zip(params, groups, strict=True) if group["norm"] == "spectral"), "Scion")
        if any(g.is_sparse for g in grads):
            raise RuntimeError("Scion does not step sparse gradients: build the embedding with sparse=False")
        buffers = [self._momentum(p) for p in params]
        torch._foreach_lerp_(buffers, grads, [1.0 - group["momentum"] for group in groups])
        towards = [
            g.lerp(b, group["momentum"]) if group["nesterov"] else b
            for g, b, group in zip(grads, buffers, groups, strict=True)
        ]
        directions = batched_lmo(towards, [group["norm"] for group in groups], self.method)
        _multiply(
            params, [1 - group["lr"] * group["weight_decay"] if group["weight_decay"] else 1.0 for group in groups]
        )
        _multiply(directions, [_step_length(p, group) for p, group in zip(params, groups, strict=True)])
        torch._foreach_add_(params, directions)
        return loss

    def _momentum(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state["momentum_buffer"]

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "method": self.method}


def _step_length(p: Tensor, group: dict[str, Any]) -> float | Tensor:
    shape = p.shape if p.ndim <= 2 else (p.shape[0], p[0].numel())
    return group["lr"] * (group["scale"] * norm_scale(shape, group["norm"]))


def _multiply(tensors: list[Tensor], factors: list[Any]) -> None:
    """Multiply in place. A tensor among the factors (a captured or compiled lr) is used without reading it out."""
    if any(isinstance(factor, Tensor) for factor in factors):
        for tensor, factor in zip(tensors, factors, strict=True):
            tensor.mul_(factor)
    elif any(factor != 1.0 for factor in factors):
        torch._foreach_mul_(tensors, factors)


def _check(group: dict[str, Any]) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr has {lr.numel()} elements: must be a number or a one-element tensor")
    if not lr >= 0:
        raise ValueError(f"lr={lr}: must not be negative")
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum={group['momentum']}: must be in [0, 1)")
    if not group["weight_decay"] >= 0:
        raise ValueError(f"weight_decay={group['weight_decay']}: must not be negative")
    if group["scale"] is not None and not group["scale"] > 0:
        raise ValueError(f"scale={group['scale']}: must be positive")
    if group["norm"] not in NORMS:
        raise ValueError(f"norm={group['norm']!r}: must be one of {', '.join(NORMS)}")
    refuse_shards(group["params"], "Scion")
    for p in group["params"]:
        if torch.is_complex(p):
            raise ValueError(f"Scion does not step complex parameters, got {p.dtype} of shape {tuple(p.shape)}")
        if group["norm"] == "spectral" and p.ndim < 2:
            raise ValueError(
                f"norm='spectral' needs matrices, got shape {tuple(p.shape)}: pass the module, or give vectors a "
                "group with norm='rms'"
            )

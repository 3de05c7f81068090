"""Which sharpness an optimizer cares about, and where its edge of stability lies."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Muon

from evolute.callbacks.access import Backend, FlatOperator, OptimizerStep, base_optimizer
from evolute.geometry import (
    Norm,
    SymmetricOperator,
    adam_diagonal,
    adam_threshold,
    batched_lmo,
    generalized_sharpness,
    heavy_ball_threshold,
    nesterov_threshold,
    norm_scale,
    preconditioned,
    top_eigenpairs,
)


@dataclass(frozen=True)
class Edge:
    """Sharpness in the optimizer's own metric, and its threshold.

    Attributes:
        name: metric name of the sharpness.
        sharpness: its value.
        threshold: the value above which the optimizer is unstable on the quadratic model.
        direction: [P], where it was found: a warm start for the next time.
        settled: whether theory or simulation backs the threshold; else it is a yardstick only.
    """

    name: str
    sharpness: Tensor
    threshold: Tensor
    direction: Tensor
    settled: bool = True


Rates = Mapping[str, float]
Group = Mapping[str, Any]
Ball = tuple[Norm, float]


def edge_of_stability(
    H: FlatOperator,
    params: Mapping[str, Tensor],
    step: OptimizerStep,
    rates: Rates,
    backend: Backend,
    sharpness: Tensor,
    start: Tensor | None,
    products: int,
) -> Edge | None:
    """Return the sharpness that the optimizer is bounded by and its threshold, or None where theory has none.

    Plain SGD and its momentum forms: the largest eigenvalue of H, against 2/lr and its relatives; if layers differ in
    rate or decay, in the metric of the rates. Adam and AdamW: that of ``P^-1 H``. Weight decay that is added to the
    gradient counts as curvature. Optimizers whose groups carry a ``norm`` (steps of fixed size in it): the generalised
    sharpness, against ``2 ||g||_* / lr``, because such a step equals gradient descent in that norm with rate ``lr /
    ||g||_*``; their momentum is neglected, for no threshold with it is known. Muon, alone or beside AdamW in one
    optimizer: the same, with the spectral ball of Muon's own step for its matrices and the cube ``|d_i| <= lr``, which
    Adam's steps fill at most, for the rest; a yardstick without a claim (``settled`` is False), for it neglects the
    momentum that both live by. Sources: papers cited in ``evolute.geometry``.

    Args:
        H: Hessian at the current weights.
        params: the probe's parameters by name, whole, in the order of H.
        step: the last step, of the only optimizer of the run.
        rates: learning rate of each parameter in the last step; the largest enters the threshold, the others the
            metric.
        backend: gives the optimizer's state.
        sharpness: largest eigenvalue of H.
        start: direction of the previous call, or None.
        products: at most so many products with H.
    """
    lr = max(rates.values(), default=0.0)
    if start is not None and start.shape != H.shape[:1]:  # kept from a time when no direction was needed
        start = None
    slowest = min(rates.values(), default=0.0)
    optimizer = base_optimizer(step.optimizer)
    if slowest <= 0 or set(params) - set(rates) or any(g.get("maximize") for g in optimizer.param_groups):
        return None
    groups = _groups(params, step, backend)
    if type(optimizer) is SGD and _alike(groups, "momentum", "dampening", "nesterov"):
        return _sgd(H, params, groups, rates, lr, sharpness, start, products)
    if type(optimizer) in (Adam, AdamW) and _alike(groups, "betas", "decoupled_weight_decay"):
        if any(g["amsgrad"] for g in groups.values()):
            return None
        states = {name: backend.optimizer_state(step.optimizer, step.params[name]) for name in params}
        return _adam(H, params, groups, states, rates, lr, start, products)
    # Radius of each layer's ball: the largest move the optimizer makes there, over its rate.
    balls: dict[str, Ball] = {}
    if all("norm" in g for g in groups.values()):
        balls = {n: _scion_ball(p, groups[n]) for n, p in params.items()}
    elif type(optimizer) is Muon or all(g.get("algorithm") in ("muon", "adamw") for g in groups.values()):
        balls = {n: _muon_ball(p, groups[n]) for n, p in params.items()}
    if not balls:
        return None
    settled = all("norm" in g for g in groups.values())
    return _fixed_size(H, balls, {n: rates[n] / lr for n in params}, lr, start, products, settled)


def _groups(params: Mapping[str, Tensor], step: OptimizerStep, backend: Backend) -> dict[str, Group]:
    """Return the optimizer's options for each parameter."""
    group_of = {id(p): group for group, members in backend.groups(step.optimizer) for p in members}
    return {name: group_of[id(step.params[name])] for name in params}


def _alike(groups: Mapping[str, Group], *options: str) -> bool:
    """Say whether all groups share some options: the thresholds hold for one value of each."""
    first = _first(groups)
    return all(g[option] == first[option] for g in groups.values() for option in options)


def _first(groups: Mapping[str, Group]) -> Group:
    return next(iter(groups.values()))


class _Decayed:
    """H plus the weight decay that an optimizer adds to the gradient, which is curvature to it."""

    def __init__(self, H: FlatOperator, decay: Tensor) -> None:
        self._H, self._decay = H, decay
        self.shape, self.dtype, self.device = H.shape, H.dtype, H.device

    def __matmul__(self, v: Tensor, /) -> Tensor:
        return self._H @ v + self._decay * v


def _filled(H: FlatOperator, params: Mapping[str, Tensor], values: Mapping[str, float]) -> Tensor:
    """Return one value a parameter, spread over its entries, flat [P]."""
    return H.flatten([torch.full_like(p, values[n], dtype=H.dtype) for n, p in params.items()])


def _sgd(
    H: FlatOperator,
    params: Mapping[str, Tensor],
    groups: Mapping[str, Group],
    rates: Rates,
    lr: float,
    sharpness: Tensor,
    start: Tensor | None,
    products: int,
) -> Edge:
    group = _first(groups)
    if group["nesterov"]:
        threshold = nesterov_threshold(lr, group["momentum"])
    else:
        threshold = heavy_ball_threshold(lr, group["momentum"], group["dampening"] if group["momentum"] else 0.0)
    decays = {name: float(g["weight_decay"]) for name, g in groups.items()}
    if len(set(rates.values())) == 1 and len(set(decays.values())) == 1:
        return Edge("sharpness", sharpness, torch.tensor(threshold - float(group["weight_decay"])), torch.empty(0))
    # A layer with a smaller rate takes smaller steps: the same as a larger preconditioner.
    diagonal = _filled(H, params, {n: lr / rates[n] for n in params})
    return _in_metric(_Decayed(H, _filled(H, params, decays)), diagonal, threshold, start, products)


def _in_metric(H: SymmetricOperator, diagonal: Tensor, threshold: float, start: Tensor | None, products: int) -> Edge:
    pairs = top_eigenpairs(preconditioned(H, diagonal), tol=1e-2, which="largest", max_products=products, start=start)
    return Edge("preconditioned_sharpness", pairs.values[0], torch.tensor(threshold), pairs.vectors[:, 0])


def _adam(
    H: FlatOperator,
    params: Mapping[str, Tensor],
    groups: Mapping[str, Group],
    states: Mapping[str, Mapping[str, Any]],
    rates: Rates,
    lr: float,
    start: Tensor | None,
    products: int,
) -> Edge | None:
    if any("exp_avg_sq" not in state for state in states.values()):
        return None
    first = _first(groups)
    beta1, beta2 = first["betas"]
    # A layer with a smaller rate takes smaller steps: the same as a larger preconditioner.
    diagonal = [
        (lr / rates[name])
        * adam_diagonal(state["exp_avg_sq"], float(state["step"]), (beta1, beta2), groups[name]["eps"])
        for name, state in states.items()
    ]
    decays = {name: float(g["weight_decay"]) for name, g in groups.items()}
    if first.get("decoupled_weight_decay", False):
        # Where layers decay differently the largest decay gives the lowest threshold; all are near 38 / lr.
        threshold = adam_threshold(lr, float(beta1), max(rates[n] * decays[n] for n in params) / lr)
        return _in_metric(H, H.flatten(diagonal), threshold, start, products)
    decayed = _Decayed(H, _filled(H, params, decays))
    return _in_metric(decayed, H.flatten(diagonal), adam_threshold(lr, float(beta1)), start, products)


def _scion_ball(p: Tensor, group: Group) -> Ball:
    return group["norm"], group.get("scale", 1.0) * norm_scale(_matrix_shape(p), group["norm"])


def _muon_ball(p: Tensor, group: Group) -> Ball:
    if group.get("algorithm", "muon") == "adamw":
        return "sign", 1.0
    rows, columns = _matrix_shape(p)
    if group["adjust_lr_fn"] == "match_rms_adamw":
        return "spectral", 0.2 * max(rows, columns) ** 0.5
    return "spectral", max(1.0, rows / columns) ** 0.5


def _fixed_size(
    H: FlatOperator,
    balls: Mapping[str, Ball],
    shares: Mapping[str, float],
    lr: float,
    start: Tensor | None,
    products: int,
    settled: bool,
) -> Edge:
    norms: list[Norm] = [norm for norm, _ in balls.values()]
    radii = [radius * shares[name] for name, (_, radius) in balls.items()]

    def steepest(m: Tensor) -> Tensor:
        best = batched_lmo([part.float() for part in H.unflatten(m)], norms)
        return H.flatten([-radius * d for radius, d in zip(radii, best, strict=True)])

    gradient = H.gradient
    down = steepest(gradient)
    dual = torch.dot(gradient, down)  # what a step of unit rate gains to first order: the dual norm of the gradient
    found = generalized_sharpness(H, steepest, down if start is None else start, iterations=products)
    return Edge("generalized_sharpness", found.value, 2.0 * dual / lr, found.direction, settled)


def _matrix_shape(p: Tensor) -> tuple[int, ...]:
    return (p.shape[0], p.numel() // p.shape[0]) if p.ndim > 2 else tuple(p.shape)

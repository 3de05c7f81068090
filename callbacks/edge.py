"""Which sharpness an optimizer cares about, and where its edge of stability lies."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from evolute.callbacks.access import Backend, FlatOperator
from evolute.geometry import (
    SymmetricOperator,
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
    """

    name: str
    sharpness: Tensor
    threshold: Tensor
    direction: Tensor


Rates = Mapping[str, float]


def edge_of_stability(
    H: FlatOperator,
    names: list[str],
    optimizer: Optimizer,
    params: Mapping[str, Tensor],
    rates: Rates,
    backend: Backend,
    sharpness: Tensor,
    start: Tensor | None,
    products: int,
) -> Edge | None:
    """Return the sharpness that ``optimizer`` is bounded by and its threshold, or None where theory has none.

    Plain SGD and its momentum forms: the largest eigenvalue of H, against 2/lr and its relatives; if layers differ in
    rate or decay, in the metric of the rates. Adam and AdamW: that of ``P^-1 H``. Weight decay that is added to the
    gradient counts as curvature. Optimizers whose groups carry a ``norm`` (steps of fixed size in it): the generalised
    sharpness, against ``2 ||g||_* / lr``, because such a step equals gradient descent in that norm with rate ``lr /
    ||g||_*``; their momentum is neglected, for no threshold with it is known. Sources: papers cited in
    ``evolute.geometry``.

    Args:
        H: Hessian at the current weights.
        names: parameter names in the order of H.
        optimizer: the only optimizer of the run.
        params: live parameters by name.
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
    if slowest <= 0 or set(names) - set(rates) or any(g.get("maximize") for g in optimizer.param_groups):
        return None
    if type(optimizer) is SGD and _alike(optimizer, "momentum", "dampening", "nesterov"):
        return _sgd(H, names, optimizer, params, rates, lr, sharpness, start, products)
    if type(optimizer) in (Adam, AdamW) and _alike(optimizer, "betas", "decoupled_weight_decay"):
        if any(g["amsgrad"] for g in optimizer.param_groups):
            return None
        return _adam(H, names, optimizer, params, rates, lr, backend, start, products)
    if all("norm" in g for g in optimizer.param_groups):
        return _fixed_size(H, names, optimizer, params, rates, lr, start, products)
    return None


def _alike(optimizer: Optimizer, *options: str) -> bool:
    """Say whether all groups share some options: the thresholds hold for one value of each."""
    first = optimizer.param_groups[0]
    return all(g[option] == first[option] for g in optimizer.param_groups for option in options)


class _Decayed:
    """H plus the weight decay that an optimizer adds to the gradient, which is curvature to it."""

    def __init__(self, H: FlatOperator, decay: Tensor) -> None:
        self._H, self._decay = H, decay
        self.shape, self.dtype, self.device = H.shape, H.dtype, H.device

    def __matmul__(self, v: Tensor, /) -> Tensor:
        return self._H @ v + self._decay * v


def _filled(H: FlatOperator, names: list[str], params: Mapping[str, Tensor], values: Mapping[str, float]) -> Tensor:
    """Return one value a parameter, spread over its entries, flat [P]."""
    return H.flatten([torch.full_like(params[n], values[n], dtype=H.dtype) for n in names])


def _decays(optimizer: Optimizer, names: list[str], params: Mapping[str, Tensor]) -> dict[str, float]:
    group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    return {n: float(group_of[id(params[n])]["weight_decay"]) for n in names}


def _sgd(
    H: FlatOperator,
    names: list[str],
    optimizer: Optimizer,
    params: Mapping[str, Tensor],
    rates: Rates,
    lr: float,
    sharpness: Tensor,
    start: Tensor | None,
    products: int,
) -> Edge:
    group = optimizer.param_groups[0]
    if group["nesterov"]:
        threshold = nesterov_threshold(lr, group["momentum"])
    else:
        threshold = heavy_ball_threshold(lr, group["momentum"], group["dampening"] if group["momentum"] else 0.0)
    decays = _decays(optimizer, names, params)
    if len(set(rates.values())) == 1 and len(set(decays.values())) == 1:
        return Edge("sharpness", sharpness, torch.tensor(threshold - decays[names[0]]), torch.empty(0))
    # A layer with a smaller rate takes smaller steps: the same as a larger preconditioner.
    diagonal = _filled(H, names, params, {n: lr / rates[n] for n in names})
    return _in_metric(_Decayed(H, _filled(H, names, params, decays)), diagonal, threshold, start, products)


def _in_metric(H: SymmetricOperator, diagonal: Tensor, threshold: float, start: Tensor | None, products: int) -> Edge:
    pairs = top_eigenpairs(preconditioned(H, diagonal), tol=1e-2, which="largest", max_products=products, start=start)
    return Edge("preconditioned_sharpness", pairs.values[0], torch.tensor(threshold), pairs.vectors[:, 0])


def _adam(
    H: FlatOperator,
    names: list[str],
    optimizer: Optimizer,
    params: Mapping[str, Tensor],
    rates: Rates,
    lr: float,
    backend: Backend,
    start: Tensor | None,
    products: int,
) -> Edge | None:
    group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    diagonal: list[Tensor] = []
    for name in names:
        p, state = params[name], backend.optimizer_state(optimizer, params[name])
        if "exp_avg_sq" not in state:
            return None
        group = group_of[id(p)]
        beta1, beta2 = group["betas"]
        t = float(state["step"])
        second = state["exp_avg_sq"]
        root = (second.to(torch.promote_types(second.dtype, torch.float32)) / (1 - beta2**t)).sqrt() + group["eps"]
        # A layer with a smaller rate takes smaller steps: the same as a larger preconditioner.
        diagonal.append((1 - beta1**t) * root * (lr / rates[name]))
    decays = _decays(optimizer, names, params)
    beta1 = float(optimizer.param_groups[0]["betas"][0])
    if optimizer.param_groups[0].get("decoupled_weight_decay", False):
        # Where layers decay differently the largest decay gives the lowest threshold; all are near 38 / lr.
        threshold = adam_threshold(lr, beta1, max(rates[n] * decays[n] for n in names) / lr)
        return _in_metric(H, H.flatten(diagonal), threshold, start, products)
    decayed = _Decayed(H, _filled(H, names, params, decays))
    return _in_metric(decayed, H.flatten(diagonal), adam_threshold(lr, beta1), start, products)


def _fixed_size(
    H: FlatOperator,
    names: list[str],
    optimizer: Optimizer,
    params: Mapping[str, Tensor],
    rates: Rates,
    lr: float,
    start: Tensor | None,
    products: int,
) -> Edge:
    group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    norms = [group_of[id(params[n])]["norm"] for n in names]
    # Radius of each layer's ball: the largest move the optimizer makes there, over lr.
    radii = [
        group_of[id(params[n])].get("scale", 1.0) * norm_scale(_matrix_shape(params[n]), norm) * rates[n] / lr
        for n, norm in zip(names, norms, strict=True)
    ]

    def steepest(m: Tensor) -> Tensor:
        best = batched_lmo([part.float() for part in H.unflatten(m)], norms)
        return H.flatten([-radius * d for radius, d in zip(radii, best, strict=True)])

    gradient = H.gradient
    down = steepest(gradient)
    dual = torch.dot(gradient, down)  # what a step of unit rate gains to first order: the dual norm of the gradient
    found = generalized_sharpness(H, steepest, down if start is None else start, iterations=products)
    return Edge("generalized_sharpness", found.value, 2.0 * dual / lr, found.direction)


def _matrix_shape(p: Tensor) -> tuple[int, ...]:
    return (p.shape[0], p.numel() // p.shape[0]) if p.ndim > 2 else tuple(p.shape)

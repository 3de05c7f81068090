"""Which sharpness an optimizer cares about, and where its edge of stability lies."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from evolute.callbacks.access import Backend, FlatOperator
from evolute.geometry import (
    adam_threshold,
    batched_lmo,
    dual_norm,
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

    Plain SGD and its momentum forms: the largest eigenvalue of H, against 2/lr and its relatives. Adam and AdamW: that
    of ``P^-1 H``. Optimizers whose groups carry a ``norm`` (steps of fixed size in it): the generalised sharpness,
    against ``2 ||g||_* / lr``, because such a step equals gradient descent in that norm with rate ``lr / ||g||_*``;
    their momentum is neglected, for no threshold with it is known. Sources: papers cited in ``evolute.geometry``.

    Args:
        H: Hessian at the current weights.
        names: parameter names in the order of H.
        optimizer: the only optimizer of the run.
        params: live parameters by name.
        rates: learning rate of each parameter in the last step; the largest enters the threshold, the others its
        metric. backend: gives the optimizer's state.
        sharpness: largest eigenvalue of H.
        start: direction of the previous call, or None.
        products: at most so many products with H.
    """
    group = optimizer.param_groups[0]
    lr = max(rates.values(), default=0.0)
    if lr <= 0 or set(names) - set(rates):
        return None
    if type(optimizer) is SGD:
        if group["nesterov"]:
            threshold = nesterov_threshold(lr, group["momentum"])
        else:
            threshold = heavy_ball_threshold(lr, group["momentum"], group["dampening"])
        return Edge("sharpness", sharpness, torch.tensor(threshold), torch.empty(0))
    if type(optimizer) in (Adam, AdamW) and not group["amsgrad"]:
        return _adam(H, names, optimizer, params, rates, lr, backend, start, products)
    if all("norm" in g for g in optimizer.param_groups):
        return _fixed_size(H, names, optimizer, params, rates, lr, start, products)
    return None


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
        root = (state["exp_avg_sq"].float() / (1 - beta2**t)).sqrt() + group["eps"]
        # A layer with a smaller rate takes smaller steps: the same as a larger preconditioner.
        diagonal.append((1 - beta1**t) * root * (lr / rates[name]))
    pairs = top_eigenpairs(
        preconditioned(H, H.flatten(diagonal)), tol=1e-2, which="largest", max_products=products, start=start
    )
    beta1 = optimizer.param_groups[0]["betas"][0]
    threshold = torch.tensor(adam_threshold(lr, float(beta1)))
    return Edge("preconditioned_sharpness", pairs.values[0], threshold, pairs.vectors[:, 0])


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

    found = generalized_sharpness(H, steepest, H.gradient if start is None else start, iterations=products)
    dual = sum(
        radius * dual_norm(_as_matrix(part.float()), norm, "polar_express")
        for radius, part, norm in zip(radii, H.unflatten(H.gradient), norms, strict=True)
    )
    return Edge("generalized_sharpness", found.value, torch.as_tensor(2.0 * dual / lr), found.direction)


def _matrix_shape(p: Tensor) -> tuple[int, ...]:
    return (p.shape[0], p.numel() // p.shape[0]) if p.ndim > 2 else tuple(p.shape)


def _as_matrix(p: Tensor) -> Tensor:
    return p.flatten(1) if p.ndim > 2 else p

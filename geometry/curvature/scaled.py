"""Curvature as an optimizer sees it: in its preconditioner's metric, or in its norm."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from evolute.geometry.curvature.operator import SymmetricOperator


class Preconditioned:
    """``D^-1/2 H D^-1/2``, which has the eigenvalues of ``D^-1 H`` and is symmetric; see ``preconditioned``."""

    def __init__(self, H: SymmetricOperator, diagonal: Tensor) -> None:
        self._H = H
        self._scale = diagonal.to(H.device).rsqrt()
        self.shape = H.shape
        self.dtype = H.dtype
        self.device = H.device

    def __matmul__(self, v: Tensor, /) -> Tensor:
        scale = self._scale.unsqueeze(1) if v.ndim == 2 else self._scale
        return ((self._H @ (v * scale).to(self.dtype)) * scale).to(self.dtype)


def preconditioned(H: SymmetricOperator, diagonal: Tensor) -> Preconditioned:
    """Return ``D^-1/2 H D^-1/2`` as an operator; its largest eigenvalue is Adam's sharpness (arXiv 2207.14484).

    For Adam, ``D`` is what ``adam_preconditioner`` returns. An eigenvector ``u`` of the result is the direction
    ``D^-1/2 u`` in the parameters.

    Args:
        H: the operator, [P, P].
        diagonal: [P], positive and finite.

    Raises:
        ValueError: if the length differs from ``H`` or an entry is not positive and finite.
    """
    if diagonal.shape != H.shape[:1]:
        raise ValueError(f"diagonal has shape {tuple(diagonal.shape)}, expected [{H.shape[0]}]")
    if not bool(((diagonal > 0) & torch.isfinite(diagonal)).all()):
        worst = float(diagonal.nan_to_num(nan=-torch.inf).min())
        raise ValueError(f"the diagonal must be positive and finite; its smallest entry is {worst} (add eps)")
    return Preconditioned(H, diagonal)


def adam_diagonal(second: Tensor, step: float, betas: tuple[float, float], eps: float) -> Tensor:
    """Return ``(1 - beta1^t) (sqrt(second / (1 - beta2^t)) + eps)``, what Adam divides its first moment by.

    A step of torch's Adam is ``-lr m / D`` with ``D`` this and ``m`` the first moment as it is stored, bias included
    (Cohen et al., arXiv 2207.14484).

    Args:
        second: the second moment as it is stored (``exp_avg_sq``), any shape.
        step: ``t``, steps taken, at least 1.
        betas: decay of the first and of the second moment.
        eps: as the optimizer's.

    Returns:
        Shape of ``second``, in float32 or wider.
    """
    wide = second.to(torch.promote_types(second.dtype, torch.float32))
    return (1 - betas[0] ** step) * ((wide / (1 - betas[1] ** step)).sqrt() + eps)


def adam_preconditioner(optimizer: Optimizer, params: Mapping[str, Tensor]) -> Tensor:
    """Return the diagonal [P] that Adam or AdamW divided by in its last step, for ``preconditioned``.

    Example::

        D = adam_preconditioner(optimizer, params)
        with Hessian(loss, params) as H:
            ratio = top_eigenpairs(preconditioned(H, D)).values[0] / adam_threshold(lr, beta1)

    Weight decay is no part of it: AdamW's goes into the threshold, Adam's into the Hessian. Neither is the learning
    rate: if groups differ in it, scale the result by (largest rate / rate) to compare with the largest.

    Args:
        optimizer: after at least one step; with ``amsgrad`` the maximum it keeps is used.
        params: parameters of the optimizer, by name; those of a block for the block's diagonal.

    Returns:
        [P] in the order of ``params``, in float32 or wider, on the device of the first.

    Raises:
        ValueError: if the optimizer is no ``torch.optim.Adam``, does not hold a parameter or has not stepped it, or
            ``params`` is empty.
    """
    if not isinstance(optimizer, Adam):
        raise ValueError(f"{type(optimizer).__name__} is neither Adam nor AdamW")
    if not params:
        raise ValueError("params is empty: pass at least one named parameter")
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    parts: list[Tensor] = []
    for name, p in params.items():
        if id(p) not in groups:
            raise ValueError(f"parameter {name!r} is not among those of the optimizer")
        group, state = groups[id(p)], optimizer.state.get(p)
        if not state:
            raise ValueError(f"parameter {name!r} has not been stepped: its second moment is not known yet")
        second = cast(Tensor, state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"])
        beta1, beta2 = map(float, group["betas"])
        parts.append(adam_diagonal(second, float(state["step"]), (beta1, beta2), group["eps"]).flatten())
    return torch.cat([part.to(parts[0].device) for part in parts])


@dataclass(frozen=True)
class GeneralizedSharpness:
    """Best curvature seen, its direction in the unit ball [P], and the value at each iterate [iterations or fewer]."""

    value: Tensor
    direction: Tensor
    history: Tensor


def generalized_sharpness(
    H: SymmetricOperator, steepest: Callable[[Tensor], Tensor], start: Tensor, iterations: int = 15
) -> GeneralizedSharpness:
    """Climb towards ``max d^T H d`` over the unit ball of a norm; what is returned is a lower estimate of it.

    This is the sharpness that non-Euclidean gradient descent (sign descent, Muon without momentum) holds near ``2 /
    lr`` (arXiv 2603.05002). Frank-Wolfe with full steps, ``d <- steepest(H d)``: on a convex form every step climbs,
    but to a local maximum in general; on an indefinite form it may fall, so the best iterate is kept. One product an
    iteration.

    Args:
        H: the operator, [P, P].
        steepest: maps a flat [P] vector ``m`` to the element of the unit ball with the largest inner product with it.
            For the l2 norm ``m / ||m||`` (then this is power iteration), for the sign norm ``m.sign()``.
        start: [P], in the ball; ``steepest`` of the gradient is a good choice, the direction found last time another.
        iterations: at most so many products; it stops early where the direction repeats itself exactly.

    Raises:
        ValueError: if ``iterations`` is below 1.
        FloatingPointError: if a value is not finite.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: must be at least 1")
    direction = best_direction = start
    history: list[float] = []
    for i in range(iterations):
        product = H @ direction
        value = float(direction @ product)
        if not torch.isfinite(product).all():
            raise FloatingPointError(f"the product of iteration {i} is not finite")
        if not history or value > max(history):
            best_direction = direction
        history.append(value)
        if i == iterations - 1:
            break
        following = steepest(product)
        if torch.equal(following, direction):
            break
        direction = following
    seen = torch.tensor(history, dtype=torch.float64)
    return GeneralizedSharpness(seen.max(), best_direction, seen)

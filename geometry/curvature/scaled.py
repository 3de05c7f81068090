"""Curvature as an optimizer sees it: in its preconditioner's metric, or in its norm."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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

    For Adam, ``D = (1 - beta1^t) (sqrt(v_hat) + eps)``. An eigenvector ``u`` of the result is the direction ``D^-1/2
    u`` in the parameters.

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

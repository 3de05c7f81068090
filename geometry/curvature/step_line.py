"""The line through the weights before and after a step: how well the local models of the loss hold along it."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CriticalStep:
    """Where along an update the loss first exceeds its value at the start, in multiples of the update.

    Attributes:
        low: largest multiple tried at which it did not; 0 if there was none.
        high: smallest multiple tried at which it did; infinite if there was none.
        evaluations: losses evaluated, the start included.
    """

    low: float
    high: float
    evaluations: int

    @property
    def found(self) -> bool:
        """Whether it lies between two multiples tried."""
        return self.low > 0 and math.isfinite(self.high)

    @property
    def step(self) -> float:
        """The estimate, ``sqrt(low high)``; 0 or infinite where it was not found."""
        return math.sqrt(self.low * self.high) if self.found else (self.high if self.low else 0.0)

    @property
    def error(self) -> float:
        """Bound on the relative error of ``step``, from the width of the bracket."""
        return math.sqrt(self.high / self.low) - 1.0 if self.found else math.inf


def critical_step(
    loss: Callable[[float], float], start: float = 1.0, evaluations: int = 8, tol: float = 0.05
) -> CriticalStep:
    """Find where the loss along an update exceeds its value at the start, by forward passes alone.

    ``2 / (lr step)`` is the critical sharpness of the update (arXiv 2601.16979): a directional relative of the largest
    eigenvalue that needs no derivative. For gradient descent on a quadratic it equals ``g^T H g / ||g||^2``.

    From ``start`` the multiple is doubled (halved, if the loss is above already) until the sign changes, then the
    bracket is bisected in logarithms. A start within a factor of two needs five or six evaluations. A loss that crosses
    more than once is followed to the crossing that is met first.

    Args:
        loss: the loss at a multiple of the update; one that is not finite counts as above.
        start: multiple to begin with, for example the last one found.
        evaluations: at most so many calls, the one at 0 included.
        tol: stop once the bracket tells ``step`` to this relative error.

    Raises:
        ValueError: if ``start`` or ``tol`` is not above 0, or ``evaluations`` is below 3.
    """
    if not start > 0 or not tol > 0 or evaluations < 3:
        raise ValueError(f"start={start}, tol={tol}: both must be above 0; evaluations={evaluations}: at least 3")
    origin = loss(0.0)
    if not math.isfinite(origin):
        return CriticalStep(0.0, math.inf, 1)
    low, high, used, at = 0.0, math.inf, 1, start
    while used < evaluations:
        value = loss(at)
        used += 1
        if value > origin or not math.isfinite(value):
            high = at
        else:
            low = at
        if low == 0.0:
            at = high / 2
        elif math.isinf(high):
            at = low * 2
        else:
            at = math.sqrt(low * high)
            if math.sqrt(high / low) - 1.0 <= tol:
                break
    return CriticalStep(low, high, used)


def model_agreement(change: Tensor, slope: Tensor, curved: Tensor) -> Tensor:
    """Return the change of the loss over a step ``p`` over what the quadratic model at its end says it was.

    The model at the weights after the step, looked back along it, says ``g^T p - p^T H p / 2``. 1 where the loss is
    quadratic along the step; below 0 where the model has the wrong sign. It is the ratio of trust-region methods
    (Conn, Gould and Toint 2000), read from the other end of the step.

    Args:
        change: loss after minus loss before, scalar.
        slope: ``g^T p`` at the weights after the step, scalar.
        curved: ``p^T H p`` there, scalar.
    """
    return change / (slope - curved / 2)


def smoothness_ratio(gradient: Tensor, origin: Tensor, product: Tensor) -> Tensor:
    """Return ``||p|| / gamma_p = ||g - g_0 - H p|| / ||g||``: the part of the gradient that curvature does not explain.

    ``gamma_p`` is the gradient-normalised smoothness (arXiv 2506.13710) along one step, taken at its end: an upper
    estimate of the radius within which Newton's model of the gradient holds, for the definition asks for the smallest
    over all directions. Above 1 the quadratic model fails on this step; 0 on a quadratic.

    Args:
        gradient: after the step, [P].
        origin: before it, [P].
        product: ``H p`` at the weights after the step, [P].
    """
    return torch.linalg.vector_norm(gradient - origin - product) / torch.linalg.vector_norm(gradient)

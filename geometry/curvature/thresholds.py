"""Curvature at which an optimizer's step turns unstable on a quadratic.

Along an eigenvector of curvature ``h`` every rule here is a linear recursion of two numbers, and it diverges as soon as
an eigenvalue of that recursion passes -1. Each threshold is the curvature where the determinant of (recursion +
identity) vanishes, derived that way here; the tests simulate both sides of each with torch's own optimizers. The
papers named use the same numbers. They hold for full or large batches: small batches settle lower.

A ratio ``curvature / threshold`` of 1 is the edge of stability, where runs often hover by themselves. Weight decay that
is added to the gradient (SGD, plain Adam) is part of the curvature: add it to the eigenvalue. For non-Euclidean descent
without momentum (sign descent, Muon) compare the generalised sharpness with ``gd_threshold`` (arXiv 2603.05002).
"""


def gd_threshold(lr: float) -> float:
    """Return ``2 / lr``, for the largest eigenvalue of H under gradient descent (Cohen et al., arXiv 2103.00065)."""
    return heavy_ball_threshold(lr, 0.0)


def heavy_ball_threshold(lr: float, momentum: float, dampening: float = 0.0) -> float:
    """Return ``2 (1 + momentum) / (lr (1 - dampening))``, for the largest eigenvalue of H under SGD with momentum.

    The rule is torch's: ``b <- momentum b + (1 - dampening) g``, ``x <- x - lr b``; ``dampening = momentum`` is the
    moving average form. (torch starts with ``b = g`` whatever the dampening, which does not move the threshold.)

    Raises:
        ValueError: if ``lr <= 0``, ``momentum`` is outside [0, 1) or ``dampening`` outside [0, 1).
    """
    _check(lr, momentum=momentum, dampening=dampening)
    return 2 * (1 + momentum) / (lr * (1 - dampening))


def nesterov_threshold(lr: float, momentum: float) -> float:
    """Return ``2 (1 + momentum) / (lr (1 + 2 momentum))``, for the largest eigenvalue of H under SGD with Nesterov
    momentum.

    The rule is torch's: ``b <- momentum b + g``, ``x <- x - lr (g + momentum b)``. The threshold is lower than heavy
    ball's.

    Raises:
        ValueError: if ``lr <= 0`` or ``momentum`` is outside [0, 1).
    """
    _check(lr, momentum=momentum)
    return 2 * (1 + momentum) / (lr * (1 + 2 * momentum))


def adam_threshold(lr: float, beta1: float, weight_decay: float = 0.0) -> float:
    """Return the threshold for the largest eigenvalue of ``P^-1 H`` under Adam or AdamW.

    ``(1 + beta1) (2 - lr weight_decay) / (lr (1 - beta1))``, where ``P = (1 - beta1^t) (sqrt(v_hat) + eps)`` is held
    fixed; 38 / lr for ``beta1 = 0.9`` without decay (Cohen et al., arXiv 2207.14484; the decay term is derived here).

    Args:
        lr: learning rate.
        beta1: decay of the first moment.
        weight_decay: decoupled weight decay as in AdamW, ``x <- x - lr weight_decay x``.

    Raises:
        ValueError: if ``lr <= 0``, ``beta1`` is outside [0, 1) or ``lr * weight_decay`` outside [0, 1).
    """
    _check(lr, beta1=beta1, decay_per_step=lr * weight_decay)
    return (1 + beta1) * (2 - lr * weight_decay) / (lr * (1 - beta1))


def _check(lr: float, **fractions: float) -> None:
    if not lr > 0:
        raise ValueError(f"lr={lr}: must be positive")
    for name, value in fractions.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value}: must be in [0, 1)")

"""Products with what the Gauss-Newton matrix leaves of the Hessian."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from evolute.geometry.curvature.engines import EngineChoice, gradients, scalar
from evolute.geometry.curvature.hessian import Hessian


class HessianResidual(Hessian):
    """``R = H - G = sum_k (dl/dz_k) grad^2 z_k``: the curvature that comes from the network bending its outputs.

    The other half of the split of Sagun et al. (arXiv 1706.04454, sec. 3). ``G`` (``GaussNewton``) carries the large
    eigenvalues; ``R`` the width of the bulk and, for losses convex in the logits ``z``, all negative ones. ``R``
    vanishes with the slopes ``dl/dz``, so with the residuals of a fit.

    It is the Hessian of the loss made linear in the logits at this point, and computed as that, not as a difference: a
    product costs no more than one with ``Hessian``, and nothing cancels. ``loss``, ``gradient``, graphs and engines are
    those of ``Hessian``.

    Args:
        logits: returns the network's output, of any shape, computed from the parameters as they are.
        loss: maps that output to the scalar loss.
        params: the parameters by name; those the logits do not use contribute zeros.
        engine: ``"auto"``, ``"autograd"`` or ``"finite_difference"``, as in ``Hessian``.

    Raises:
        ValueError, RuntimeError: as ``Hessian`` does.
    """

    def __init__(
        self,
        logits: Callable[[], Tensor],
        loss: Callable[[Tensor], Tensor],
        params: Mapping[str, Tensor],
        engine: EngineChoice = "auto",
    ) -> None:
        tangent: list[Tensor] = []  # logits, loss and slope at this point, kept for evaluations elsewhere

        def linearised() -> Tensor:
            z = logits()
            if not tangent:
                leaf = z.detach().requires_grad_()
                value = scalar(loss(leaf))
                tangent.extend([leaf.detach(), value.detach(), *gradients(value, [leaf])])
            here, value, slope = tangent
            return value + torch.sum(slope * (z - here))

        super().__init__(linearised, params, engine)

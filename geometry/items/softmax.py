"""Curvature of the softmax loss in the vector that meets the item table."""

import torch
from torch import Tensor

DAMPING = 1e-6
"""Added to both ends of a spectrum before they are divided, over its mean: tables of text have null directions."""


def softmax_covariance(table: Tensor, probs: Tensor, temperature: float = 1.0, block: int = 65536) -> Tensor:
    """Return the Hessian of the cross entropy in the sequence vector, ``Cov_p(e) / temperature^2``.

    With logits ``s_i = <e_i, h> / temperature`` and ``p = softmax(s)`` the Hessian in ``h`` is
    ``(sum_i p_i e_i e_i^T - m m^T) / temperature^2``, ``m = sum_i p_i e_i``, whatever the target: a covariance of the
    item vectors under the model's own distribution (derivation in docs/cards/tf_llmer.md).

    Args:
        table: item vectors, [n, d].
        probs: probabilities, [n] or a batch [b, n].
        temperature: divides the logits.
        block: rows of the table taken at once.

    Returns:
        [d, d], or [b, d, d], in float64.
    """
    batch = probs.reshape(-1, probs.shape[-1]).double()
    d = table.shape[1]
    second = torch.zeros(len(batch), d, d, dtype=torch.float64, device=table.device)
    mean = torch.zeros(len(batch), d, dtype=torch.float64, device=table.device)
    for rows, p in zip(table.split(block), batch.split(block, dim=1), strict=True):
        rows = rows.double()
        mean += p @ rows
        for i, weights in enumerate(p):
            second[i].addmm_(rows.T * weights, rows)
    result = (second - mean[:, :, None] * mean[:, None, :]) / temperature**2
    return result.reshape(*probs.shape[:-1], d, d)


def condition_number(matrix: Tensor, damping: float = DAMPING) -> Tensor:
    """Return ``(l_max + eps) / (l_min + eps)`` with ``eps = damping tr / d`` of symmetric matrices [..., d, d] >= 0."""
    values = torch.linalg.eigvalsh(matrix.double()).clamp_min(0)
    eps = damping * values.mean(-1)
    return (values[..., -1] + eps) / (values[..., 0] + eps)


def effective_rank(values: Tensor) -> Tensor:
    """Return ``exp`` of the entropy of a spectrum [..., d]: d if it is flat, 1 if one value holds all (Roy 2007)."""
    share = values.clamp_min(0) / values.clamp_min(0).sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp()

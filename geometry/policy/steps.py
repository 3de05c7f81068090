"""How a step of the head changes the logits: each token's own step, or one step of many tokens together.

Only ``s = D h`` on the support is ever formed, a few tokens at a time; no [T, k, H], [k, k] or [V, H] tensor is.
"""

import torch
from torch import Tensor

from evolute.geometry.policy.moments import SparseMoments, mean_rows

BYTES = 2**20
"""Size of one temporary: a few of them exist at once, and fit a processor's cache."""


def logit_steps(
    hidden: Tensor, ids: Tensor, pull: Tensor, lr: float, temperature: float, moments: SparseMoments | None, eps: float
) -> Tensor:
    """Return the change of each token's logits under the step that its own gradient alone would propose [n, k].

    With moments it is Adam's step, bias corrections included, as ``torch.optim.Adam`` would make it; while
    they hold no row, and without them, it is SGD's (the paper's code does the same).

    Args:
        hidden: input of the head [n, H].
        ids: support [n, k].
        pull: ``A v / temperature`` on the support [n, k]: the token's gradient is ``pull h^T``.
        lr: learning rate of the head.
        temperature: by which the logits were divided.
        moments: of the head; None for SGD.
        eps: Adam's.
    """
    rate = lr / temperature
    if moments is None or not len(moments):
        return rate * pull * hidden.square().sum(-1, keepdim=True)
    one, two = moments.bias_corrections()
    n, k = ids.shape
    size = max(1, BYTES // (k * hidden.shape[1] * hidden.element_size()))
    steps = torch.empty_like(pull)
    for some in torch.arange(n, device=ids.device).split(size):
        h, g = hidden[some].unsqueeze(1), pull[some].unsqueeze(-1)
        first, second, a, b = moments.gather(ids[some])
        second.baddbmm_(g.square(), h.square(), beta=moments.beta2 * b / two, alpha=(1 - moments.beta2) / two)
        first.baddbmm_(g, h, beta=moments.beta1 * a / one, alpha=(1 - moments.beta1) / one)
        first.div_(second.sqrt_().add_(eps))
        steps[some] = torch.bmm(first, h.transpose(1, 2)).squeeze(-1)
    return rate * steps


def joint_logit_steps(
    hidden: Tensor, ids: Tensor, pull: Tensor, lr: float, temperature: float, moments: SparseMoments | None, eps: float
) -> Tensor:
    """Return the change of the logits under the one step that the tokens' mean gradient proposes [n, k].

    The arguments are those of :func:`logit_steps`. The step is formed some of its rows at a time.
    """
    n, k = ids.shape
    rate = lr / temperature
    flat, order = ids.flatten().sort(stable=True)
    found = torch.empty_like(pull).flatten()
    for rows, gradient in mean_rows(hidden, ids, pull, over=n):
        step = gradient if moments is None or not len(moments) else _adam(gradient, rows, moments, eps)
        begin, end = torch.searchsorted(flat, rows[[0, -1]] + torch.tensor([0, 1], device=rows.device)).tolist()
        size = max(1, BYTES // (hidden.shape[1] * hidden.element_size()))
        for pairs in torch.arange(begin, end, device=ids.device).split(size):
            local = torch.searchsorted(rows, flat[pairs])
            found[order[pairs]] = torch.linalg.vecdot(step[local], hidden[order[pairs] // k])
    return rate * found.view(n, k)


def _adam(gradient: Tensor, rows: Tensor, moments: SparseMoments, eps: float) -> Tensor:
    """Return Adam's direction of gradient rows [u, H]."""
    one, two = moments.bias_corrections()
    first, second, a, b = moments.gather(rows)
    second = second.mul_(moments.beta2 * b / two).addcmul_(gradient, gradient, value=(1 - moments.beta2) / two)
    first = first.mul_(moments.beta1 * a / one).add_(gradient, alpha=(1 - moments.beta1) / one)
    return first.div_(second.sqrt_().add_(eps))

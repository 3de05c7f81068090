"""The part of a policy that a token's gradient lives on: its most probable tokens, and the one that was sampled."""

from typing import NamedTuple

import torch
from torch import Tensor


class Support(NamedTuple):
    """A policy restricted to k tokens, renormalised.

    Attributes:
        ids: tokens of the support [n, k].
        probs: their probabilities [n, k], summing to 1.
        action: place of the sampled token in the support [n].
        mass: probability of the support in the whole vocabulary [n].
        inside: whether the sampled token is among the k most probable [n].
    """

    ids: Tensor
    probs: Tensor
    action: Tensor
    mass: Tensor
    inside: Tensor

    def score(self) -> Tensor:
        """Return ``v = e_a - p`` [n, k]; the entry of the action is the sum of the others, not a difference from 1."""
        others = self.probs.scatter(-1, self.action.unsqueeze(-1), 0.0)
        return (-others).scatter(-1, self.action.unsqueeze(-1), others.sum(-1, keepdim=True))


def token_support(logits: Tensor, actions: Tensor, k: int | None) -> Support:
    """Return the k most probable tokens; the sampled one takes the last place if it is not among them.

    Args:
        logits: [n, V], divided by the temperature.
        actions: sampled tokens [n].
        k: size of the support; None, or V and above, for the whole vocabulary.
    """
    n, V = logits.shape
    if k is None or k >= V:
        ids = torch.arange(V, device=logits.device).expand(n, V)
        probs = logits.softmax(-1)
        return Support(ids, probs, actions, torch.ones_like(probs[:, 0]), torch.ones_like(actions, dtype=torch.bool))
    ids = logits.topk(k, dim=-1).indices
    place = ids == actions.unsqueeze(-1)
    inside = place.any(-1)
    ids = torch.cat([ids[:, :-1], torch.where(inside, ids[:, -1], actions).unsqueeze(-1)], dim=1)
    action = torch.where(inside, place.int().argmax(-1), k - 1)
    mass = logits.softmax(-1).gather(-1, ids).sum(-1)  # faster than a logsumexp over V
    return Support(ids, logits.gather(-1, ids).softmax(-1), action, mass, inside)


def score_rest(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of p, p^2 and p^3 over the tokens that were not sampled, each [n]; the whole vocabulary counts.

    Args:
        logits: [n, V], divided by the temperature.
        actions: sampled tokens [n].
    """
    p = logits.softmax(-1)
    p.scatter_(-1, actions.unsqueeze(-1), 0.0)
    p2 = p.square()
    return p.sum(-1), p2.sum(-1), p2.mul_(p).sum(-1)

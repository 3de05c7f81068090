"""The part of a policy that a token's gradient lives on: its most probable tokens, and the one that was sampled."""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64
"""Entries a block of the search for the largest logits."""


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
    ids = largest(logits, k)
    place = ids == actions.unsqueeze(-1)
    inside = place.any(-1)
    ids = torch.cat([ids[:, :-1], torch.where(inside, ids[:, -1], actions).unsqueeze(-1)], dim=1)
    action = torch.where(inside, place.int().argmax(-1), k - 1)
    scores = logits.gather(-1, ids)
    within = scores.logsumexp(-1, keepdim=True)
    mass = (within.squeeze(-1) - logits.logsumexp(-1)).exp()
    return Support(ids, (scores - within).exp(), action, mass, inside)


def largest(logits: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest entries of each row [n, k], largest first.

    One pass finds the maximum of each block; the k largest entries lie in the k blocks of largest maximum, and only
    those are searched.
    """
    n, V = logits.shape
    whole = V - V % BLOCK
    if whole < 4 * k * BLOCK:
        return logits.topk(k, dim=-1).indices
    blocks = logits[:, :whole].unflatten(-1, (-1, BLOCK))
    chosen = blocks.amax(-1).topk(k, dim=-1).indices
    among = blocks.gather(1, chosen.unsqueeze(-1).expand(n, k, BLOCK)).flatten(1)
    ids = (chosen.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=logits.device)).flatten(1)
    if whole < V:
        among = torch.cat([among, logits[:, whole:]], dim=1)
        ids = torch.cat([ids, torch.arange(whole, V, device=logits.device).expand(n, -1)], dim=1)
    return ids.gather(1, among.topk(k, dim=-1).indices)


def score_rest(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of p, p^2 and p^3 over the tokens that were not sampled, each [n]; the whole vocabulary counts.

    Args:
        logits: [n, V], divided by the temperature.
        actions: sampled tokens [n].
    """
    p = logits.softmax(-1)
    p.scatter_(-1, actions.unsqueeze(-1), 0.0)
    p2 = p.square()
    return p.sum(-1), p2.sum(-1), torch.linalg.vecdot(p2, p)

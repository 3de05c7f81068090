"""Policy-gradient losses over unreduced per-token tensors, as a module that masks can attach to."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Objective = Literal["grpo", "dr_grpo", "reinforce"]


class PolicyLossOutput(NamedTuple):
    """What a policy loss returns.

    Attributes:
        loss: scalar, connected to the graph also when no token survives the mask.
        log_probs: log-probabilities of the actions at the sampling temperature [B, T], detached.
        entropy: of the policy at that temperature, nats [B, T], detached.
        kl: estimate of KL(policy || reference), nats [B, T], detached; zeros without a reference.
        metrics: detached scalars by name, over the tokens of the mask: ``entropy``, ``clip_ratio/low``,
            ``clip_ratio/high`` and ``clip_ratio/region`` (shares of tokens whose gradient the clip removes), and
            ``kl`` with a reference.
    """

    loss: Tensor
    log_probs: Tensor
    entropy: Tensor
    kl: Tensor
    metrics: dict[str, Tensor]


class PolicyLoss(nn.Module):
    """Clipped policy-gradient loss of group-relative methods, without parameters.

    Everything the loss needs enters as keyword arguments of one call, before any reduction, so a forward pre-hook
    can look at the tokens and take some of them out of ``mask``.

    - ``"grpo"`` (arXiv 2402.03300): mean over each completion's tokens, then over completions.
    - ``"dr_grpo"`` (arXiv 2503.20783): sum over tokens, divided by completions times ``max_length``.
    - ``"reinforce"``: mean over all tokens of ``-A log pi``, with no ratio and no clip.

    Args:
        objective: which of them.
        clip_low: the ratio of new to old probability is clipped at ``1 - clip_low``.
        clip_high: and at ``1 + clip_high``.
        kl_coef: weight of the KL to a reference policy (the k3 estimate), 0 for none.
        temperature: of sampling; logits are divided by it.
        chunk: tokens whose logits exist at once when the head is given instead of logits; backward recomputes them.
        max_length: constant length by which ``"dr_grpo"`` divides; by default the width T of the batch.

    Raises:
        ValueError: if a value is out of range, with the value.
    """

    def __init__(
        self,
        objective: Objective = "grpo",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        kl_coef: float = 0.0,
        temperature: float = 1.0,
        chunk: int = 1024,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        if objective not in ("grpo", "dr_grpo", "reinforce"):
            raise ValueError(f"objective={objective!r}: 'grpo', 'dr_grpo' or 'reinforce'")
        for name, value in (("clip_low", clip_low), ("clip_high", clip_high), ("kl_coef", kl_coef)):
            if not value >= 0:
                raise ValueError(f"{name}={value}: must be at least 0")
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: must be above 0")
        if chunk < 1 or (max_length is not None and max_length < 1):
            raise ValueError(f"chunk={chunk}, max_length={max_length}: must be at least 1")
        self.objective: Objective = objective
        self.clip_low, self.clip_high = clip_low, clip_high
        self.kl_coef = kl_coef
        self.temperature = temperature
        self.chunk = chunk
        self.max_length = max_length

    def forward(
        self,
        *,
        actions: Tensor,
        advantages: Tensor,
        mask: Tensor,
        hidden: Tensor | None = None,
        head: nn.Module | None = None,
        logits: Tensor | None = None,
        old_log_probs: Tensor | None = None,
        ref_log_probs: Tensor | None = None,
        denominator_mask: Tensor | None = None,
    ) -> PolicyLossOutput:
        """Return the loss of a batch of completions.

        Hidden states and logits are those of the positions that PREDICT the actions (already shifted):
        ``head(hidden[b, t])`` scores ``actions[b, t]``.

        Args:
            actions: sampled tokens [B, T], integers. What they are outside the mask does not matter.
            advantages: [B, T], or [B, 1].
            mask: tokens that take part [B, T], boolean.
            hidden: input of the head [B, T, H]. Needed if there are no logits; given beside them it serves masks.
            head: module from hidden states to logits; needed if there are no logits.
            logits: [B, T, V], before the temperature.
            old_log_probs: of the policy that sampled [B, T]; by default the present one, which makes the ratio 1.
            ref_log_probs: of the reference policy [B, T].
            denominator_mask: tokens that count in denominators [B, T]; by default those of ``mask``.

        Raises:
            ValueError: if neither logits nor hidden states with a head are given, if shapes differ, or if there is a
                ``kl_coef`` and no reference.
        """
        self._check(actions, mask, hidden, head, logits, ref_log_probs)
        log_probs, entropy = (
            _from_logits(logits, actions, self.temperature, self.chunk)
            if logits is not None
            else _from_head(hidden, head, actions, self.temperature, self.chunk)  # type: ignore[arg-type]
        )
        mask = mask.bool()
        advantages = advantages.to(log_probs).expand_as(log_probs)
        surrogate, clipped = self._surrogate(log_probs, old_log_probs, advantages, mask)
        kl = torch.zeros_like(log_probs)
        if ref_log_probs is not None:
            gap = torch.where(mask, ref_log_probs.to(log_probs) - log_probs, 0.0)
            kl = torch.expm1(gap) - gap
        token_loss = torch.where(mask, self.kl_coef * kl - surrogate if self.kl_coef else -surrogate, 0.0)
        loss = self._reduce(token_loss, mask if denominator_mask is None else denominator_mask.bool())
        with torch.no_grad():
            count = mask.sum().clamp(min=1)
            low, high = ((clipped & (advantages < 0)), (clipped & (advantages > 0)))
            metrics = {"entropy": torch.where(mask, entropy, 0.0).sum() / count}
            for name, hit in (("low", low), ("high", high), ("region", clipped)):
                metrics[f"clip_ratio/{name}"] = hit.sum() / count
            if ref_log_probs is not None:
                metrics["kl"] = kl.detach().sum() / count
        return PolicyLossOutput(loss, log_probs.detach(), entropy, kl.detach(), metrics)

    def pull(self, log_probs: Tensor, old_log_probs: Tensor | None, advantages: Tensor) -> Tensor:
        """Return the derivative of each token's objective in its log-probability, the same shape; 0 where clipped.

        The KL to a reference is left out.
        """
        if self.objective == "reinforce" or old_log_probs is None:
            return advantages
        ratio = (log_probs - old_log_probs).exp()
        beyond = torch.where(advantages > 0, ratio > 1.0 + self.clip_high, ratio < 1.0 - self.clip_low)
        return torch.where(beyond, 0.0, advantages * ratio)

    def _check(
        self,
        actions: Tensor,
        mask: Tensor,
        hidden: Tensor | None,
        head: nn.Module | None,
        logits: Tensor | None,
        ref_log_probs: Tensor | None,
    ) -> None:
        if logits is None and (hidden is None or head is None):
            raise ValueError("a policy loss needs logits, or hidden states and the head that turns them into logits")
        for name, value in (("logits", logits), ("hidden", hidden)):
            if value is not None and (value.ndim != 3 or value.shape[:2] != actions.shape):
                raise ValueError(f"{name} {tuple(value.shape)} do not belong to actions {tuple(actions.shape)}")
        if mask.shape != actions.shape:
            raise ValueError(f"mask {tuple(mask.shape)} does not belong to actions {tuple(actions.shape)}")
        if self.kl_coef and ref_log_probs is None:
            raise ValueError(f"kl_coef={self.kl_coef} needs ref_log_probs, the reference policy's log-probabilities")

    def _surrogate(
        self, log_probs: Tensor, old_log_probs: Tensor | None, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what is maximised, per token [B, T], and where the clip takes the gradient away."""
        if self.objective == "reinforce":
            return advantages * log_probs, torch.zeros_like(mask)
        old = log_probs.detach() if old_log_probs is None else old_log_probs.to(log_probs)
        ratio = torch.where(mask, log_probs - old, 0.0).exp()  # padding never overflows
        limited = ratio.clamp(1.0 - self.clip_low, 1.0 + self.clip_high)
        plain = ratio * advantages
        surrogate = torch.minimum(plain, limited * advantages)
        return surrogate, (surrogate < plain).detach() & mask

    def _reduce(self, token_loss: Tensor, counted: Tensor) -> Tensor:
        if self.objective == "grpo":
            return (token_loss.sum(-1) / counted.sum(-1).clamp(min=1)).mean() if len(token_loss) else token_loss.sum()
        if self.objective == "dr_grpo":
            rows, width = token_loss.shape
            return token_loss.sum() / max(1, rows * (self.max_length or width))
        return token_loss.sum() / counted.sum().clamp(min=1)


def _from_logits(logits: Tensor, actions: Tensor, temperature: float, chunk: int) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and detached entropies [B, T]."""
    scores = _tempered(logits, temperature)
    norm = scores.logsumexp(-1)
    log_probs = scores.gather(-1, _valid(actions, scores).unsqueeze(-1)).squeeze(-1) - norm
    with torch.no_grad():
        flat, norms = scores.detach().flatten(0, 1), norm.detach().flatten()
        parts = [_entropy(z, n) for z, n in zip(flat.split(chunk), norms.split(chunk), strict=True)]
        entropy = torch.cat(parts).view_as(norm) if parts else torch.zeros_like(norm)
    return log_probs, entropy


def _from_head(
    hidden: Tensor, head: nn.Module, actions: Tensor, temperature: float, chunk: int
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and detached entropies [B, T]; no more than ``chunk`` tokens' logits exist at once."""
    # A plain head's weights are taken here, not in the recomputation, which may run after they were swapped back.
    plain = type(head) is nn.Linear
    weights = (head.weight, head.bias) if plain else ()

    def some(h: Tensor, a: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        scores = _tempered(F.linear(h, *weights) if plain else head(h), temperature)
        norm = scores.logsumexp(-1)
        picked = scores.gather(-1, _valid(a, scores).unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            entropy = _entropy(scores, norm)
        return picked - norm, entropy

    rows, ids = hidden.flatten(0, 1), actions.flatten()
    parts = [
        checkpoint(some, h, a, *weights, use_reentrant=False, preserve_rng_state=False)
        for h, a in zip(rows.split(chunk), ids.split(chunk), strict=True)
    ]
    log_probs = torch.cat([p[0] for p in parts]).view(actions.shape)
    return log_probs, torch.cat([p[1] for p in parts]).view(actions.shape).detach()


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if temperature == 1.0 else wide / temperature


def _valid(actions: Tensor, scores: Tensor) -> Tensor:
    """Return indices that exist: padding may be marked by any number, -100 for one."""
    return actions.clamp(0, scores.shape[-1] - 1)


def _entropy(scores: Tensor, norm: Tensor) -> Tensor:
    probs = (scores - norm.unsqueeze(-1)).exp_()
    return norm - torch.linalg.vecdot(probs, scores.masked_fill(scores == -torch.inf, 0.0))

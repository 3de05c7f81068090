"""Policy losses against loops over tokens, in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evolute.models.policy_loss import PolicyLoss

B, T, H, V = 3, 5, 4, 7
LENGTHS = (5, 2, 0)


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Any], nn.Linear]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    head = nn.Linear(H, V, dtype=dtype)
    head.load_state_dict({"weight": normal(V, H), "bias": normal(V)})
    inputs: dict[str, Any] = {
        "hidden": normal(B, T, H).requires_grad_(),
        "actions": torch.randint(V, (B, T), generator=generator),
        "advantages": normal(B, T),
        "mask": torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(1),
        "old_log_probs": -2 + 0.3 * normal(B, T),
        "ref_log_probs": -2 + 0.3 * normal(B, T),
    }
    return inputs, head


def by_hand(loss: PolicyLoss, logits: Tensor, x: dict[str, Any], counted: Tensor | None = None) -> Tensor:
    """The loss, one token at a time."""
    counted = x["mask"] if counted is None else counted
    rows = []
    for b in range(B):
        terms = [torch.zeros((), dtype=logits.dtype)]
        for t in range(T):
            if not x["mask"][b, t]:
                continue
            log_prob = (logits[b, t] / loss.temperature).log_softmax(-1)[x["actions"][b, t]]
            a = x["advantages"][b, t]
            ratio = (log_prob - x["old_log_probs"][b, t]).exp()
            clipped = ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high)
            term = -a * log_prob if loss.objective == "reinforce" else -min(ratio * a, clipped * a)
            gap = x["ref_log_probs"][b, t] - log_prob
            terms.append(term + loss.kl_coef * (gap.exp() - gap - 1))
        rows.append(torch.stack(terms).sum())
    if loss.objective == "grpo":
        return sum(row / max(1, int(counted[b].sum())) for b, row in enumerate(rows)) / B
    if loss.objective == "dr_grpo":
        return sum(rows) / (B * (loss.max_length or T))
    return sum(rows) / int(counted.sum())


@pytest.mark.parametrize("options", [{}, {"kl_coef": 0.3, "temperature": 0.7}, {"clip_low": 0.05, "clip_high": 0.4}])
@pytest.mark.parametrize("objective", ["grpo", "dr_grpo", "reinforce"])
def test_loss_and_gradients_equal_a_loop_over_tokens_from_logits_and_from_a_head(objective, options):
    x, head = batch()
    loss = PolicyLoss(objective, **options, chunk=4)
    leaves = [x["hidden"], head.weight, head.bias]
    expected = by_hand(loss, head(x["hidden"]), x)
    gradients = torch.autograd.grad(expected, leaves)
    for extra in ({"head": head}, {"logits": head(x["hidden"])}):
        found = loss(**x, **extra)
        torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=1e-14)
        for ours, theirs in zip(torch.autograd.grad(found.loss, leaves), gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
        p = (head(x["hidden"]) / loss.temperature).softmax(-1)
        torch.testing.assert_close(found.entropy, -(p * p.log()).sum(-1).detach())
        assert not found.log_probs.requires_grad
        assert not found.kl.requires_grad


def test_the_clip_is_counted_by_side_over_the_tokens_of_the_mask():
    x, head = batch()
    found = PolicyLoss(clip_low=0.1, clip_high=0.3)(**x, head=head)
    ratio, a, mask = (found.log_probs - x["old_log_probs"]).exp(), x["advantages"], x["mask"]
    low, high = (mask & (ratio < 0.9) & (a < 0)), (mask & (ratio > 1.3) & (a > 0))
    assert found.metrics["clip_ratio/low"] == low.sum() / mask.sum() > 0
    assert found.metrics["clip_ratio/high"] == high.sum() / mask.sum() > 0
    assert found.metrics["clip_ratio/region"] == (low | high).sum() / mask.sum()


def test_on_the_policy_that_sampled_the_gradient_is_that_of_reinforce():
    x, head = batch()
    del x["old_log_probs"]
    counted = x["mask"].sum()
    ratio = torch.autograd.grad(PolicyLoss("dr_grpo")(**x, head=head).loss * B * T / counted, head.weight)[0]
    score = torch.autograd.grad(PolicyLoss("reinforce")(**x, head=head).loss, head.weight)[0]
    torch.testing.assert_close(ratio, score)


@pytest.mark.parametrize("objective", ["grpo", "dr_grpo", "reinforce"])
def test_without_a_surviving_token_loss_and_gradients_are_zero_and_finite(objective):
    x, head = batch()
    found = PolicyLoss(objective)(**{**x, "mask": torch.zeros(B, T, dtype=torch.bool)}, head=head)
    found.loss.backward()
    assert found.loss == 0
    assert all(g is not None and not g.any() for g in (x["hidden"].grad, head.weight.grad))


def test_what_is_outside_the_mask_has_no_effect_and_no_gradient():
    x, head = batch()
    wild = {k: v.clone() if isinstance(v, Tensor) else v for k, v in x.items()}
    for name, value in (("actions", -100), ("advantages", 1e30), ("old_log_probs", -1e4), ("ref_log_probs", 1e4)):
        wild[name][~x["mask"]] = value
    loss = PolicyLoss(kl_coef=0.1)
    found = loss(**{**wild, "hidden": x["hidden"]}, head=head)
    assert torch.equal(found.loss, loss(**x, head=head).loss)
    gradient = torch.autograd.grad(found.loss, x["hidden"])[0]
    assert not gradient[~x["mask"]].any()
    assert gradient[x["mask"]].any(-1).all()


@pytest.mark.parametrize("objective", ["grpo", "dr_grpo", "reinforce"])
def test_denominators_count_the_tokens_they_are_told_to(objective):
    x, head = batch()
    kept = x["mask"].clone()
    kept[0, 1:3] = False
    loss = PolicyLoss(objective, max_length=9)
    inputs = {**x, "mask": kept}
    for counted in (kept, x["mask"]):
        found = loss(**inputs, head=head, denominator_mask=counted).loss
        torch.testing.assert_close(found, by_hand(loss, head(x["hidden"]), inputs, counted))


def test_second_derivatives_pass_through_the_chunks():
    x, head = batch()

    def loss(weight):
        logits = nn.functional.linear(x["hidden"].detach(), weight, head.bias)
        return PolicyLoss(kl_coef=0.2)(**x, logits=logits).loss

    def chunked(weight):
        linear = nn.Linear(H, V, dtype=torch.float64)
        held = torch.func.functional_call(linear, {"weight": weight, "bias": head.bias}, (x["hidden"].detach(),))
        assert held.shape == (B, T, V)
        return torch.func.functional_call(
            Together(linear), {"head.weight": weight, "head.bias": head.bias}, (), {**x, "hidden": x["hidden"].detach()}
        )

    weight = head.weight.detach().requires_grad_()
    v = torch.ones_like(weight)
    products = []
    for function in (loss, chunked):
        gradient = torch.autograd.grad(function(weight), weight, create_graph=True)[0]
        products.append(torch.autograd.grad((gradient * v).sum(), weight)[0])
    torch.testing.assert_close(products[1], products[0])


class Together(nn.Module):
    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head, self.loss = head, PolicyLoss(kl_coef=0.2, chunk=3)

    def forward(self, **x: Any) -> Tensor:
        return self.loss(**x, head=self.head).loss


def test_half_precision_logits_are_reduced_in_single():
    x, head = batch()
    logits = head(x["hidden"]).detach().bfloat16()
    found = PolicyLoss()(**x, logits=logits)
    assert found.log_probs.dtype == torch.float32
    expected = logits.float().log_softmax(-1).gather(-1, x["actions"].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found.log_probs, expected)


def test_forbidden_tokens_have_no_part_in_the_entropy():
    x, head = batch()
    logits = head(x["hidden"]).detach()
    logits[..., 0] = -math.inf
    found = PolicyLoss()(**{**x, "actions": x["actions"].clamp(min=1)}, logits=logits)
    torch.testing.assert_close(found.entropy, torch.distributions.Categorical(logits=logits[..., 1:]).entropy())


@pytest.mark.parametrize(
    "bad",
    [
        {"objective": "ppo"},
        {"clip_low": -0.1},
        {"clip_high": -1.0},
        {"kl_coef": -1.0},
        {"temperature": 0.0},
        {"chunk": 0},
        {"max_length": 0},
    ],
)
def test_arguments_out_of_range_are_refused_with_their_value(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        PolicyLoss(**bad)


def test_inputs_that_do_not_belong_together_are_refused():
    x, head = batch()
    with pytest.raises(ValueError, match="needs logits, or hidden states"):
        PolicyLoss()(**x)
    with pytest.raises(ValueError, match="do not belong"):
        PolicyLoss()(**x, logits=torch.zeros(B, T + 1, V))
    with pytest.raises(ValueError, match="does not belong"):
        PolicyLoss()(**{**x, "mask": x["mask"][:, 1:]}, head=head)
    del x["ref_log_probs"]
    with pytest.raises(ValueError, match="ref_log_probs"):
        PolicyLoss(kl_coef=0.1)(**x, head=head)

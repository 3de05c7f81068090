"""CAPO end to end: what it rejects, what that does to gradients, its moments, its refusals; and the controls."""

import math
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from evolute.callbacks import CAPO, EntropyMask, MetricsCSV, RandomTokenMask
from evolute.callbacks.access import backend_for, gather_rows, probing
from evolute.geometry import SparseMoments, logit_steps, predicted_shifts, token_support
from evolute.models.policy_loss import PolicyLoss
from tests.conftest import fit
from tests.modules import Recorder, Regression

B, T, V, H = 4, 6, 9, 5
ALL = {"delta_f": math.inf, "delta_h": math.inf}


class Policy(L.LightningModule):
    """A policy of one hidden layer over completions of T tokens, some shorter, one with advantage 0."""

    def __init__(self, lr: float = 0.05, adam: bool = False, head: nn.Module | None = None, **call: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, H), nn.Tanh())
        self.head = head or nn.Linear(H, V, bias=False)
        self.policy_loss = PolicyLoss(call.pop("objective", "grpo"), temperature=call.pop("temperature", 1.0))
        self.lr, self.adam, self.call = lr, adam, call
        self.outputs: list[Any] = []

    def loss_on(self, batch: Any) -> Tensor:
        x, actions, advantages, mask = batch
        hidden = self.body(x)
        logits = self.head(hidden)
        out = self.policy_loss(
            **{
                "hidden": hidden,
                "head": self.head,
                "logits": logits,
                "actions": actions,
                "advantages": advantages,
                "mask": mask,
                **{k: v(hidden, logits) for k, v in self.call.items()},
            }
        )
        self.outputs.append((out, hidden, logits))
        return out.loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss_on(batch)

    def configure_optimizers(self) -> Any:
        return (torch.optim.Adam if self.adam else torch.optim.SGD)(self.parameters(), lr=self.lr)


def completions(n: int = 4 * B, seed: int = 0) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, T, 3, generator=g)
    advantages = torch.randn(n, 1, generator=g).expand(n, T).clone()
    advantages[1::B] = 0.0
    lengths = torch.randint(2, T + 1, (n, 1), generator=g)
    return TensorDataset(x, torch.randint(V, (n, T), generator=g), advantages, torch.arange(T) < lengths)


def train(callbacks: list[Any], module: Any = Policy, steps: int = 4, **kwargs: Any) -> tuple[Any, Any]:
    loader = kwargs.pop("loader", None) or DataLoader(completions(), batch_size=kwargs.pop("batch_size", B))
    return fit(callbacks, module, loader, max_steps=steps, **kwargs)


def recorded(callback: Any, module: Any = Policy, **kwargs: Any) -> Recorder:
    recorder = Recorder()
    train([callback], module, logger=recorder, **kwargs)
    return recorder


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("options", [{}, {"fisher": "expected"}, {"model": "exact"}, {"top_k": 4}])
@pytest.mark.parametrize("optimizer_model", ["sgd", "adam"])
def test_tokens_are_rejected_by_their_predicted_shifts(optimizer_model, options, temperature):
    """Every step again, from the hidden states and logits that the loss was given, with moments of the test's own."""
    limits = {"delta_f": 3e-4, "delta_h": 2e-2}
    callback = CAPO(optimizer_model=optimizer_model, **limits, **options)
    tables: list[Any] = []

    class Watched(Policy):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            tables.append((callback.last[0], batch))

    module, _ = train([callback], lambda: Watched(0.03, temperature=temperature))
    moments, rejected_at_all = SparseMoments(), 0
    for (table, batch), (_, hidden, logits) in zip(tables, module.outputs, strict=True):
        _, actions, advantages, mask = batch
        rows = (mask & (advantages != 0)).flatten()
        h, z = hidden.detach().flatten(0, 1)[rows], logits.detach().flatten(0, 1)[rows] / temperature
        k = None if optimizer_model == "sgd" and "model" not in options else options.get("top_k", 50)
        support = token_support(z, actions.flatten()[rows], k)
        A = advantages.flatten()[rows]
        pull = A.unsqueeze(-1) * support.score() / temperature
        held = moments if optimizer_model == "adam" else None
        s = logit_steps(h, support.ids, pull, module.lr, temperature, held, 1e-8)
        shifts = predicted_shifts(s, support.probs, support.action, A)
        m_f = shifts.kl if options.get("model") else shifts.expected_policy if options.get("fisher") else shifts.policy
        m_h = shifts.exact_objective if options.get("model") else shifts.objective
        torch.testing.assert_close(table.policy.flatten()[rows], m_f, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(table.objective.flatten()[rows], m_h, rtol=1e-4, atol=1e-8)
        expected = (m_f >= limits["delta_f"]) | (m_h.abs() >= limits["delta_h"])
        assert torch.equal(table.rejected.flatten()[rows], expected)
        assert not table.rejected.flatten()[~rows].any()
        assert table.policy.flatten()[~rows].isnan().all()
        rejected_at_all += int(expected.sum())
        moments.update(h[~expected], support.ids[~expected], pull[~expected])
    assert rejected_at_all
    if optimizer_model == "adam":
        found = callback._moments.dense(V)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-9) for a, b in zip(found, moments.dense(V), strict=True))


@pytest.mark.parametrize("denominator", ["kept", "original"])
def test_a_rejected_token_has_no_gradient_anywhere_and_denominators_are_as_asked(denominator):
    callback = CAPO(optimizer_model="sgd", delta_f=1e-4, denominator=denominator)
    module, _ = train([callback], Policy, steps=1)
    out, hidden, logits = module.outputs[0]
    _, actions, advantages, mask = next(iter(DataLoader(completions(), batch_size=B)))
    kept = mask & ~callback.last[0].rejected
    assert kept.any()
    assert (mask & ~kept).any()
    log_probs = logits.detach().log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    counted = kept if denominator == "kept" else mask
    by_hand = (torch.where(kept, -advantages, 0.0).sum(-1) / counted.sum(-1).clamp(min=1)).mean()
    torch.testing.assert_close(out.loss.detach(), by_hand)
    x = log_probs.new_zeros(B, T, H).copy_(hidden.detach()).requires_grad_()
    again = PolicyLoss()(hidden=x, head=module.head, actions=actions, advantages=advantages, mask=kept)
    assert not torch.autograd.grad(again.loss, x)[0][~kept].any()


@pytest.mark.parametrize("optimizer_model", ["sgd", "adam"])
def test_a_head_given_instead_of_logits_and_mixed_chunks_decide_the_same(optimizer_model, monkeypatch):
    limits = {"optimizer_model": optimizer_model, "delta_f": 1e-4, "delta_h": 5e-3}
    one = CAPO(**limits)
    train([one], lambda: Policy(0.01))
    monkeypatch.setattr("evolute.callbacks.access.tokens.BYTES", 1)
    other = CAPO(**limits)
    train([other], lambda: Policy(0.01, logits=lambda hidden, logits: None))
    for a, b in zip(one.last, other.last, strict=True):
        assert torch.equal(a.rejected, b.rejected)
        torch.testing.assert_close(a.policy, b.policy, equal_nan=True, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("optimizer_model", ["sgd", "adam"])
@pytest.mark.parametrize("granularity", ["token", "sequence", "batch"])
def test_micro_batches_decide_and_remember_like_one_batch(granularity, optimizer_model):
    def run(batch_size, accumulate):
        callback = CAPO(optimizer_model=optimizer_model, granularity=granularity, delta_f=2e-4, delta_h=1e-2)
        module, _ = train([callback], lambda: Policy(0.01, objective="grpo"), batch_size=batch_size, steps=3,
                          accumulate_grad_batches=accumulate, loader=None)  # fmt: skip
        return callback, module

    (whole, a), (parts, b) = run(B, 1), run(B // 2, 2)
    assert len(parts.last) == 2
    if granularity == "batch":
        return  # a micro-batch of another size is another group
    assert torch.equal(whole.last[0].rejected, torch.cat([t.rejected for t in parts.last]))
    if optimizer_model == "adam":
        assert whole._moments.step == parts._moments.step == 3
        for x, y in zip(whole._moments.dense(V), parts._moments.dense(V), strict=True):
            torch.testing.assert_close(x, y)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("granularity", ["sequence", "batch"])
def test_a_group_is_accepted_or_rejected_as_one(granularity):
    callback = CAPO(granularity=granularity, delta_f=1e-5, delta_h=2e-3)
    train([callback], lambda: Policy(0.05), steps=3)
    _, _, advantages, mask = list(DataLoader(completions(), batch_size=B))[2]
    counted = mask & (advantages != 0)
    assert counted.any()
    for row in range(B) if granularity == "sequence" else [slice(None)]:
        assert callback.last[0].rejected[row][counted[row]].float().std(correction=0).nan_to_num() == 0
        assert callback.last[0].policy[row][counted[row]].unique().numel() <= 1


def test_max_reject_frac_rejects_the_worst_only():
    free, capped = (CAPO(optimizer_model="sgd", delta_f=1e-5, max_reject_frac=f) for f in (None, 0.2))
    for callback in (free, capped):
        train([callback], steps=1)
    a, b = free.last[0], capped.last[0]
    counted = ~a.policy.isnan()
    assert int(b.rejected.sum()) == math.floor(0.2 * int(counted.sum())) < int(a.rejected.sum())
    limits = free.limits
    excess = limits.excess(a.objective, a.policy)
    assert excess[b.rejected].min() >= excess[counted & ~b.rejected].max()


def test_tokens_that_are_no_numbers_are_rejected_counted_and_leave_the_moments_alone():
    class Poisoned(Policy):
        def loss_on(self, batch):
            x = batch[0].clone()
            x[0, 0] = math.nan
            return super().loss_on([x, *batch[1:]])

    callback = CAPO(**ALL, max_reject_frac=0.01)
    rows = recorded(callback, lambda: Poisoned(1e-3), steps=2).of("capo/nonfinite")
    assert rows[0] == 1
    assert all(m.isfinite().all() for m in callback._moments.dense(V))


def test_without_a_surviving_token_the_loss_is_zero_and_the_weights_stay():
    start, _ = train([], steps=0)
    module, _ = train([CAPO(optimizer_model="sgd", delta_f=1e-30)], steps=3)
    assert module.outputs[-1][0].loss == 0
    kept, _ = train([CAPO(optimizer_model="sgd", delta_f=1e-30)], lambda: Policy(), steps=1)
    for p, q in zip(start.parameters(), kept.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_decision_is_replayed_by_probes_and_not_made_in_validation():
    callback = CAPO(optimizer_model="sgd", delta_f=1e-4)
    losses: list[Tensor] = []
    outputs: list[Any] = []  # the module's own list is put back after a probe

    class Probed(Policy):
        def loss_on(self, batch):
            loss = super().loss_on(batch)
            outputs.append(self.outputs[-1][0])
            return loss

        def on_before_optimizer_step(self, optimizer):
            data = next(iter(DataLoader(completions(), batch_size=B)))
            with probing(self.trainer, self, backend_for(self.trainer, "test"), data) as probe:
                losses.append(probe.loss().detach())
            first = [leaf[:2] for leaf in data]
            with probing(self.trainer, self, backend_for(self.trainer, "test"), first) as probe:
                probe.loss()

    train([callback], Probed, steps=1)
    trained, _, some = outputs
    assert torch.equal(trained.loss.detach(), losses[0])
    kept = ~callback.last[0].rejected
    mask = next(iter(DataLoader(completions(), batch_size=B)))[3]
    assert torch.equal(some.log_probs, trained.log_probs[:2])
    advantages = completions().tensors[2][:2]
    m = (mask & kept)[:2]
    torch.testing.assert_close(
        some.loss.detach(), (torch.where(m, -advantages, 0.0).sum(-1) / m.sum(-1).clamp(min=1)).mean()
    )
    assert len(callback.last) == 1


def test_clipped_tokens_of_inner_epochs_are_never_rejected():
    def old(hidden, logits):  # the old policy gave the first token of each completion a far smaller probability
        return torch.full((B, T), -2.0).index_fill_(1, torch.tensor([0]), -30.0)

    callback = CAPO(optimizer_model="sgd", delta_f=1e-12, delta_h=1e-12)
    train([callback], lambda: Policy(old_log_probs=old), steps=1)
    advantages, mask = completions().tensors[2][:B], completions().tensors[3][:B]
    up = (advantages > 0)[:, 0] & mask[:, 0]
    assert up.any()
    assert not callback.last[0].rejected[up, 0].any()
    assert (callback.last[0].policy[up, 0] == 0).all()
    assert callback.last[0].rejected[:, 1:].any()


def test_what_is_recorded_of_a_step(tmp_path):
    callback = CAPO(delta_f=2e-4, delta_h=1e-2, log_tokens=2, max_rows=6)
    train([callback], lambda: Policy(0.01), logger=MetricsCSV(tmp_path), steps=4)
    row = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    names = {"reject_frac", "reject_frac_fisher", "reject_frac_hessian", "reject_frac_pos_adv", "reject_frac_neg_adv"}
    names |= {"seq_all_rejected", "m_f/p99", "m_h/p01", "m_f_kept/max", "topk_mass", "action_in_topk", "moment_rows"}
    assert {f"capo/{name}" for name in names} <= set(row)
    found = sorted(p.name for p in (tmp_path / "arrays" / "capo").iterdir())
    assert found == ["00000000.npz", "00000002.npz"]
    with np.load(tmp_path / "arrays" / "capo" / "00000002.npz") as arrays:
        assert arrays["policy"].shape == arrays["rejected"].shape == arrays["actions"].shape == (B, T)
    assert len(callback._moments) <= 6


def test_the_kl_that_a_step_brought_is_measured_after_it_and_disturbs_nothing():
    """Of the step that was made, on the last batch before it, with all candidates: the whole distribution."""
    recorder, plain = Recorder(), train([CAPO(**ALL)], lambda: Policy(0.1), steps=3)[0]
    callback = CAPO(**ALL, top_k=None, realized_every_n_steps=2)
    watched, _ = train([callback], lambda: Policy(0.1), steps=3, logger=recorder)
    for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(p, q)
    found = recorder.of("capo/realized_kl")
    assert sorted(found) == [0, 2]
    assert set(recorder.of("capo/realized_rank_corr")) == {0, 2}
    x, _, advantages, mask = (leaf[2 * B : 3 * B] for leaf in completions().tensors)
    rows = mask & (advantages != 0)
    with torch.no_grad():
        new = watched.head(watched.body(x)).double().log_softmax(-1)[rows]
    old = watched.outputs[2][2].detach().double().log_softmax(-1)[rows]
    assert found[2] == pytest.approx(float((old.exp() * (old - new)).sum(-1).mean()), rel=1e-3)
    with pytest.raises(MisconfigurationException, match="realized_every_n_steps=1"):
        CAPO(optimizer_model="sgd", realized_every_n_steps=1)


def test_too_many_rejections_are_said_once(recwarn):
    train([CAPO(delta_f=1e-9)], steps=4)
    said = [w for w in recwarn if "CAPO rejected more than 20%" in str(w.message)]
    assert len(said) == 1


def test_before_its_first_step_nothing_is_masked():
    plain, _ = train([], steps=3)
    later, _ = train([CAPO(delta_f=1e-6, start_step=3)], steps=3)
    acting, _ = train([CAPO(delta_f=1e-6, start_step=1)], steps=3)
    pairs = [zip(plain.parameters(), other.parameters(), strict=True) for other in (later, acting)]
    assert all(torch.equal(p, q) for p, q in pairs[0])
    assert not all(torch.equal(p, q) for p, q in pairs[1])


def test_random_control_rejects_as_many_as_a_dry_run_would():
    recorder = Recorder()
    train([CAPO(delta_f=2e-4, dry_run=True), RandomTokenMask("capo")], lambda: Policy(0.01), logger=recorder)
    ours, control = recorder.of("capo/reject_frac"), recorder.of("random_mask/reject_frac")
    assert ours == control
    assert any(ours.values())
    with pytest.raises(MisconfigurationException, match="needs a CAPO"):
        train([RandomTokenMask("capo")])


def test_entropy_control_rejects_the_quantile_it_was_asked_for():
    for side in ("low", "high"):
        callback = EntropyMask(0.5, side)
        module, _ = train([callback], steps=1)
        out, *_ = module.outputs[0]
        _, _, advantages, mask = next(iter(DataLoader(completions(), batch_size=B)))
        counted = mask & (advantages != 0)
        entropy = out.entropy[counted].sort(descending=side == "high").values
        kept = entropy[int(0.5 * len(entropy)) :]
        shown = out.metrics["entropy"] * (mask.sum() - int(0.5 * len(entropy)))
        torch.testing.assert_close(shown, kept.sum() + out.entropy[mask & ~counted].sum())


class Capped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 3 * torch.tanh(super().forward(input) / 3)


def test_what_it_cannot_model_is_refused_or_said():
    with pytest.raises(MisconfigurationException, match=r"self\.policy_loss = PolicyLoss"):
        fit([CAPO()], Regression)
    with pytest.raises(MisconfigurationException, match="needs the inputs of the head"):
        train([CAPO()], lambda: Policy(hidden=lambda hidden, logits: None))
    with pytest.raises(MisconfigurationException, match="Capped is not linear"):
        train([CAPO()], lambda: Policy(head=Capped(H, V)))
    with pytest.raises(MisconfigurationException, match="one position off"):
        train([CAPO()], lambda: Policy(hidden=lambda hidden, logits: hidden.roll(1, 1)))
    with pytest.raises(MisconfigurationException, match="scale or softcap after"):
        train([CAPO()], lambda: Policy(logits=lambda hidden, logits: 0.5 * logits))
    frozen = nn.Linear(H, V).requires_grad_(False)
    with pytest.warns(UserWarning, match="is frozen"):
        train([CAPO()], lambda: Policy(head=frozen), steps=1)


def test_a_rank_without_a_row_joins_those_of_the_other():
    other = torch.arange(6.0).reshape(2, 3)
    answers = iter([torch.tensor([2, 3]), other])
    gather = lambda mine: torch.stack([mine, next(answers)])  # noqa: E731
    trainer: Any = SimpleNamespace(world_size=2, strategy=SimpleNamespace(all_gather=gather))
    assert torch.equal(gather_rows(torch.zeros(0, 0), trainer), other)

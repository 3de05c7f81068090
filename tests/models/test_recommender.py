"""Losses and rankings against their definitions, encoders against what they may not see."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR, RetrievalNormalizedDCG

from evolute.geometry import Histories
from evolute.models.recommender import (
    AdaptedItems,
    BERT4Rec,
    GRU4Rec,
    ItemEmbedding,
    LightGCN,
    MatrixFactorization,
    SASRec,
    all_items,
    cross_entropy,
    item_loss,
    ranking_metrics,
    target_ranks,
    top_items,
)


def case(m=6, n=50, d=4):
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(m, d, generator=g, dtype=torch.float64).requires_grad_(),
        torch.randn(n, d, generator=g, dtype=torch.float64).requires_grad_(),
        torch.randint(n, (m,), generator=g),
    )


def test_blockwise_softmax_has_the_loss_and_gradients_of_the_whole():
    queries, table, targets = case()
    whole = F.cross_entropy(queries @ table.T, targets)
    expected = torch.autograd.grad(whole, (queries, table))
    blocks = cross_entropy(queries, table, targets, limit=6 * 7)
    found = torch.autograd.grad(2 * blocks, (queries, table))
    assert blocks.item() == pytest.approx(whole.item(), rel=1e-12)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, 2 * b)


def test_sampled_softmax_estimates_the_full_one_whatever_the_proposal():
    queries, table, targets = case(m=4, n=30)
    full = cross_entropy(queries, table, targets)
    p = torch.linspace(1, 9, 30, dtype=torch.float64)
    torch.manual_seed(0)
    # Each of many draws stands for the whole table; the constant that the count of draws adds falls out.
    found = item_loss("sampled", queries, table, targets, 200_000, (p / p.sum()).log())
    expected = full + torch.tensor(0.0)
    s = queries @ table.T
    others = torch.stack([torch.logsumexp(s[i][torch.arange(30) != t], 0) for i, t in enumerate(targets)])
    own = s.gather(1, targets[:, None])[:, 0] - (p / p.sum()).log()[targets]
    approximate = (torch.logaddexp(own, others + math.log(200_000)) - own).mean()
    assert found.item() == pytest.approx(approximate.item(), rel=0.01)
    assert expected.isfinite()


def test_bce_and_bpr_are_their_formulas_when_there_is_one_other_item():
    queries, table, _ = case(m=3, n=2)
    targets = torch.tensor([0, 1, 0])
    s = queries @ table.T
    own, other = s.gather(1, targets[:, None])[:, 0], s.gather(1, 1 - targets[:, None])[:, 0]
    torch.manual_seed(1)
    found = item_loss("bpr", queries, table, targets, 4000)
    expected = (0.5 * F.softplus(other - own) + 0.5 * math.log(2)).mean()
    assert found.item() == pytest.approx(expected.item(), rel=0.05)
    torch.manual_seed(1)
    found = item_loss("bce", queries, table, targets, 4000)
    expected = (F.softplus(-own) + 0.5 * F.softplus(other)).mean()
    assert found.item() == pytest.approx(expected.item(), rel=0.05)


@pytest.mark.parametrize("block", [7, 100])
def test_ranks_equal_sorting_with_ties_to_the_lower_item(block):
    g = torch.Generator().manual_seed(3)
    queries = torch.randint(-2, 3, (300, 3), generator=g).float()
    table = torch.randint(-2, 3, (40, 3), generator=g).float()  # integers: many exact ties
    targets = torch.randint(40, (300,), generator=g)
    seen = torch.randint(60, (300, 8), generator=g)
    for hidden in (None, seen):
        scores = queries @ table.T
        if hidden is not None:
            for i in range(300):
                for j in hidden[i].tolist():
                    if j < 40 and j != targets[i]:
                        scores[i, j] = -math.inf
        order = torch.argsort(-scores, dim=1, stable=True)
        expected = (order == targets[:, None]).nonzero()[:, 1] + 1
        torch.testing.assert_close(target_ranks(queries, table, targets, hidden, block), expected)


def test_metrics_equal_torchmetrics():
    g = torch.Generator().manual_seed(0)
    scores, targets = torch.randn(200, 30, generator=g), torch.randint(30, (200,), generator=g)
    ranks = target_ranks(scores, torch.eye(30), targets)
    found = ranking_metrics(ranks, [5, 10])
    index = torch.arange(200).repeat_interleave(30)
    truth = F.one_hot(targets, 30).flatten().bool()
    for k in (5, 10):
        for name, metric in (("hr", RetrievalHitRate), ("ndcg", RetrievalNormalizedDCG), ("mrr", RetrievalMRR)):
            expected = metric(top_k=k)(scores.flatten(), truth, index)
            assert float(found[f"{name}@{k}"]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("block", [7, 100])
def test_top_items_are_the_best_of_those_not_seen(block):
    queries, table, _ = case(m=9)
    seen = torch.randint(70, (9, 20), generator=torch.Generator().manual_seed(1))
    scores = (queries @ table.T).detach()
    for i in range(9):
        scores[i, seen[i][seen[i] < 50]] = -math.inf
    expected, order = scores.sort(1, descending=True)
    found, items = top_items(queries.detach(), table.detach(), 5, seen, block)
    torch.testing.assert_close(found, expected[:, :5])
    assert torch.equal(items, order[:, :5])
    everything = torch.arange(50).repeat(9, 1)
    assert (top_items(queries.detach(), table.detach(), 5, everything, block)[1] == -1).all()


@pytest.mark.parametrize("make", [GRU4Rec, SASRec, BERT4Rec])
def test_encoders_see_no_padding_and_causal_ones_no_future(make):
    torch.manual_seed(0)
    encoder = make(8, **({"max_len": 6, "heads": 2, "inner": 16} if make is not GRU4Rec else {"hidden": 16})).eval()
    x = torch.randn(2, 6, 8)
    real = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    other = x.clone()
    other[0, 4:] = 7.0
    torch.testing.assert_close(encoder(x, real)[0, :4], encoder(other, real)[0, :4])
    later = x.clone()
    later[1, 5] = torch.randn(8)
    same = torch.allclose(encoder(x, real)[1, :5], encoder(later, real)[1, :5], atol=1e-6)
    assert same == (encoder.objective == "causal")


@pytest.mark.parametrize("make", [GRU4Rec, SASRec, BERT4Rec])
def test_one_position_alone_is_what_it_is_among_all(make):
    torch.manual_seed(0)
    encoder = make(8).double().eval()
    x, length = torch.randn(5, 6, 8, dtype=torch.float64), torch.tensor([1, 2, 4, 5, 6])
    real, at = torch.arange(6) < length[:, None], length - 1
    whole = encoder(x, real)
    torch.testing.assert_close(encoder(x, real, at), whole[torch.arange(5), at])


def test_a_tied_transformer_starts_by_repeating_unless_it_has_a_head():
    """Under cosine logits the residual stream alone makes the last item the first guess."""
    torch.manual_seed(0)
    table = F.normalize(torch.randn(200, 32), dim=1)
    items = torch.randint(200, (64, 10))
    real = torch.ones_like(items, dtype=torch.bool)
    guesses = {}
    for head in (False, True):
        encoder = SASRec(32, 10, dropout=0.0, inner=64, head=head).eval()
        h = F.normalize(encoder(table[items], real)[:, -1], dim=1)
        guesses[head] = ((h @ table.T).argmax(1) == items[:, -1]).float().mean().item()
    assert guesses[False] > 0.9
    assert guesses[True] < 0.2


def test_light_gcn_averages_along_the_graph():
    sequences = [[0, 1], [1, 2, 2], [0]]
    histories = Histories.of(sequences)
    torch.manual_seed(0)
    model = LightGCN(histories, 4, 5, layers=2)
    table = torch.randn(4, 5)
    r = np.zeros((3, 4))
    for u, s in enumerate(sequences):
        r[u, s] = 1
    d = np.concatenate([r.sum(1), r.sum(0)])
    a = np.block([[np.zeros((3, 3)), r], [r.T, np.zeros((4, 4))]])
    a = a / np.sqrt(np.maximum(np.outer(d, d), 1))
    e = np.concatenate([model.users.weight.detach().numpy(), table.numpy()])
    expected = (e + a @ e + a @ a @ e) / 3
    users, items = model(torch.tensor([2, 0]), table)
    np.testing.assert_allclose(users.detach(), expected[[2, 0]], atol=1e-6)
    np.testing.assert_allclose(items.detach(), expected[3:], atol=1e-6)
    users.sum().backward()
    assert model.users.weight.grad is not None
    assert MatrixFactorization(3, 5)(torch.tensor([1]), table)[1] is table


@pytest.mark.parametrize("adapter", ["linear", "mlp"])
def test_tables_pad_with_zeros_and_adapters_make_norms_of_their_own(adapter):
    vectors = F.normalize(torch.randn(20, 12), dim=1)
    items = AdaptedItems(vectors, 8, adapter, extra=1)
    rows = items(torch.tensor([3, 20, 21]))
    assert not rows[1].any()
    assert rows[2].any()
    made = all_items(items)
    torch.testing.assert_close(made[3], rows[0])
    norms = made.norm(dim=1)
    assert norms.max() / norms.min() > 1.01  # equal lengths before the adapter are not equal after it
    assert not items.vectors.requires_grad
    plain = ItemEmbedding(vectors, extra=1)
    assert not plain(torch.tensor([20])).any()
    torch.testing.assert_close(all_items(plain), vectors)

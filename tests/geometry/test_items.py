"""Item vectors: every quantity against a brute-force twin in float64."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, sparse
from sklearn.decomposition import PCA

from evolute.geometry import (
    Histories,
    RecPCA,
    condition_number,
    cooccurrence_graph,
    effective_rank,
    embedding_geometry,
    initial_table,
    normalised_graph,
    softmax_covariance,
    total_variation,
    unit_rows,
)


def histories(n_items=40, users=60, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, n_items, rng.integers(0, 15)) for _ in range(users)]


def dense_window(sequences, n, window):
    w = np.zeros((n, n))
    for s in sequences:
        for a in range(len(s)):
            for b in range(a + 1, min(len(s), a + window + 1)):
                if s[a] != s[b]:
                    w[s[a], s[b]] += 1 / (b - a)
                    w[s[b], s[a]] += 1 / (b - a)
    return w


def dense_whole(sequences, n):
    w = np.zeros((n, n))
    for s in sequences:
        kinds = sorted({int(i) for i in s})
        for i in kinds:
            for j in kinds:
                if i != j:
                    w[i, j] += 1 / np.log2(1 + len(kinds))
    return w


def cut(w, k):
    """The best k of each row by cosine weight, kept where either end keeps it."""
    d = w.sum(1)
    kept = np.zeros_like(w, dtype=bool)
    for i in range(len(w)):
        score = np.where(w[i] > 0, w[i] / np.sqrt(np.where(d > 0, d, 1)), 0).astype(np.float32)
        best = [j for j in np.argsort(-score, kind="stable")[:k] if w[i, j] > 0]
        kept[i, best] = True
    return np.where(kept | kept.T, w, 0)


@pytest.mark.parametrize("block", [7, 10**6])
@pytest.mark.parametrize("top_k", [3, None])
@pytest.mark.parametrize("window", [1, 5, None])
def test_graph_equals_counting_pairs(window, top_k, block):
    sequences = histories()
    w = dense_whole(sequences, 42) if window is None else dense_window(sequences, 42, window)
    graph = cooccurrence_graph(sequences, 42, window, top_k, block=block)
    expected = w if top_k is None else cut(w, top_k)
    np.testing.assert_allclose(graph.toarray(), expected, rtol=1e-5)
    assert (graph != graph.T).nnz == 0
    assert not graph.diagonal().any()


def test_graph_weights():
    sequences = histories()
    w = dense_window(sequences, 40, 2)
    d = w.sum(1)
    cosine = cooccurrence_graph(sequences, 40, 2, None, weight="cosine").toarray()
    np.testing.assert_allclose(cosine, w / np.sqrt(np.outer(d, d)), rtol=1e-5)
    pmi = cooccurrence_graph(sequences, 40, 2, None, weight="pmi").toarray()
    np.testing.assert_allclose(pmi, np.log(np.maximum(w * d.sum() / np.outer(d, d), 1)), rtol=1e-4, atol=1e-6)


def test_graph_refuses_items_out_of_range():
    with pytest.raises(ValueError, match=r"outside \[0, 3\)"):
        cooccurrence_graph([[0, 3]], 3)
    with pytest.raises(ValueError, match="window=0"):
        cooccurrence_graph([[0, 1]], 3, window=0)
    assert cooccurrence_graph([], 3).nnz == 0


def test_laplacian_has_its_spectrum_and_null_vector():
    graph = cooccurrence_graph(histories(), 40)
    laplacian = np.eye(40) - normalised_graph(graph).toarray()
    values = np.linalg.eigvalsh(laplacian)
    assert values[0] >= -1e-9
    assert values[-1] <= 2 + 1e-9
    root = np.sqrt(graph.sum(1))
    np.testing.assert_allclose(laplacian @ root, 0, atol=1e-6)


def test_total_variation_is_the_sum_over_edges():
    graph = cooccurrence_graph(histories(), 43)  # three items are isolated
    e = np.random.default_rng(0).normal(size=(43, 6))
    w, d = graph.toarray().astype(float), graph.toarray().astype(float).sum(1)
    root = np.sqrt(np.where(d > 0, d, 1))
    edges = sum(0.5 * w[i, j] * ((e[i] / root[i] - e[j] / root[j]) ** 2).sum() for i in range(43) for j in range(43))
    found, whole = total_variation(torch.tensor(e), graph)
    assert found == pytest.approx(edges, rel=1e-9)
    assert whole == pytest.approx((e[d > 0] ** 2).sum())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 6), st.floats(0.05, 2.0))
def test_hessian_of_the_softmax_loss_is_the_covariance_and_obeys_its_bounds(seed, d, tau):
    g = torch.Generator().manual_seed(seed)
    e, h = torch.randn(15, d, generator=g).double(), torch.randn(d, generator=g).double()
    target = torch.tensor(seed % 15)
    hessian = torch.func.hessian(lambda x: torch.nn.functional.cross_entropy(e @ x / tau, target))(h)
    p = torch.softmax(e @ h / tau, 0)
    found = softmax_covariance(e, p, tau, block=4)
    scale = e.norm(dim=1).max() ** 2 / tau**2
    torch.testing.assert_close(found, hessian, rtol=1e-6, atol=1e-9 * float(scale))
    mean = p @ e
    assert float(found.trace()) == pytest.approx(
        float((p @ e.square().sum(1) - mean.square().sum()) / tau**2), rel=1e-7, abs=1e-9 * float(scale)
    )
    assert torch.linalg.eigvalsh(found)[-1] <= scale * (1 + 1e-9)
    if p.max() / p.min() < 1e9:  # else the smallest eigenvalue is nothing but rounding
        values = torch.linalg.eigvalsh(softmax_covariance(e, torch.full((15,), 1 / 15)))
        low, high = torch.linalg.eigvalsh(found)[[0, -1]]
        assert high / low <= p.max() / p.min() * values[-1] / values[0] * (1 + 1e-4)


def test_unit_rows_trace_needs_only_the_mean_cosine():
    e = unit_rows(torch.randn(30, 5).double())
    c = embedding_geometry(e)["mean_cos"]
    trace = softmax_covariance(e, torch.full((30,), 1 / 30), 0.1).trace()
    assert float(trace) == pytest.approx((1 - c) * (1 - 1 / 30) / 0.01, rel=1e-6)


def test_embedding_geometry_against_all_pairs():
    e = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).double() + 0.5
    graph = cooccurrence_graph(histories(50), 50)
    found = embedding_geometry(e, graph)
    unit = e / e.norm(dim=1, keepdim=True)
    cosines = unit @ unit.T
    off = cosines[~torch.eye(50, dtype=bool)].reshape(50, 49)
    assert found["mean_cos"] == pytest.approx(float(off.mean()))
    assert found["nn_cos"] == pytest.approx(float(off.topk(10, dim=1).values.mean()))
    covariance = torch.cov(e.T, correction=0)
    values = torch.linalg.eigvalsh(covariance)
    assert found["kappa_cov"] == pytest.approx(float(values[-1] / values[0]), rel=1e-4)
    share = values / values.sum()
    assert found["eff_rank"] == pytest.approx(float(torch.exp(-(share * share.log()).sum())))
    assert found["norm_ratio"] == pytest.approx(float(e.norm(dim=1).max() / e.norm(dim=1).min()))
    w = normalised_graph(graph).toarray()
    pairs = w > 0
    correlation = np.corrcoef(cosines.numpy()[pairs], w[pairs])[0, 1]
    assert found["misalign"] == pytest.approx(1 - correlation)


def test_one_long_item_moves_the_norms_and_nothing_of_unit_rows():
    e = unit_rows(torch.randn(30, 5).double())
    longer = e.clone()
    longer[3] *= 8
    assert embedding_geometry(longer)["norm_ratio"] == pytest.approx(8)
    assert embedding_geometry(unit_rows(longer)) == pytest.approx(embedding_geometry(e), rel=1e-9)


def test_spectra_of_known_tables():
    assert effective_rank(torch.ones(9).double()).item() == pytest.approx(9)
    assert effective_rank(torch.tensor([3.0, 0, 0])).item() == pytest.approx(1)
    found = embedding_geometry(torch.outer(torch.arange(1.0, 9), torch.ones(4)))
    assert found["eff_rank"] == pytest.approx(1, abs=1e-6)
    assert found["null_dims"] == 3
    assert found["kappa_cov"] < 1e8  # damped
    assert condition_number(torch.eye(3).double()).item() == 1
    assert embedding_geometry(torch.cat([torch.zeros(2, 3), torch.eye(3)]))["zero_rows"] == 2
    with pytest.raises(ValueError, match="at least two"):
        embedding_geometry(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="NaN"):
        embedding_geometry(torch.full((4, 3), float("nan")))


def case(n=120, dims=12, seed=0, isolated=5):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, dims)) * np.linspace(3, 0.3, dims) + rng.normal(size=dims)
    return x, cooccurrence_graph(histories(n - isolated, 100, seed), n)


def moments(x, graph):
    xc = x - x.mean(0)
    normalised = normalised_graph(graph).toarray()
    laplacian = np.diag((normalised.sum(1) > 0).astype(float)) - normalised
    return xc.T @ xc / len(x), xc.T @ laplacian @ xc / len(x)


def angle(p, q):
    return float(linalg.subspace_angles(np.asarray(p), np.asarray(q)).max())


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_difference_form_is_the_top_of_its_matrix(lam):
    x, graph = case()
    s, t = moments(x, graph)
    values, vectors = np.linalg.eigh(s - lam * t)
    fitted = RecPCA(4, lam, block=17).fit(x, graph)
    assert angle(fitted.components_.T, vectors[:, -4:]) < 1e-7
    np.testing.assert_allclose(fitted.eigenvalues_, values[::-1][:4], rtol=1e-9)
    p = fitted.components_.T
    np.testing.assert_allclose(p.T @ p, np.eye(4), atol=1e-10)
    variation, whole = total_variation(torch.tensor(fitted.transform(x)), graph)
    assert fitted.tv_ratio_ == pytest.approx(variation / whole, rel=1e-6)


def test_trace_ratio_form_is_a_fixed_point_that_no_neighbour_beats():
    x, graph = case()
    s, t = moments(x, graph)
    lam = 0.9
    b = lam * t + (1 - lam) * np.trace(s) / len(s) * np.eye(len(s))
    fitted = RecPCA(3, lam, "trace_ratio").fit(x, graph)
    p = fitted.components_.T
    ratio = np.trace(p.T @ s @ p) / np.trace(p.T @ b @ p)
    assert abs(np.linalg.eigvalsh(s - ratio * b)[-3:].sum()) < 1e-8
    rng = np.random.default_rng(0)
    for size in (1e-2, 1.0):
        q = linalg.qr(p + size * rng.normal(size=p.shape), mode="economic")[0]
        assert np.trace(q.T @ s @ q) / np.trace(q.T @ b @ q) < ratio


def test_generalized_form_solves_its_pencil_and_whitens():
    x, graph = case()
    s, t = moments(x, graph)
    values, vectors = linalg.eigh(t, s)
    fitted = RecPCA(4, 1.0, "generalized").fit(x, graph)
    np.testing.assert_allclose(fitted.eigenvalues_, values[:4], rtol=1e-8)
    assert angle(fitted.components_.T, vectors[:, :4]) < 1e-6
    z = fitted.transform(x)
    np.testing.assert_allclose(z.T @ z / len(z), np.eye(4), atol=1e-9)


@pytest.mark.parametrize("form", ["difference", "trace_ratio", "generalized"])
def test_a_null_direction_is_never_taken(form):
    x, graph = case()
    x = np.concatenate([x, x[:, :1] + x[:, 1:2]], axis=1)  # exactly dependent, as MiniLM's vectors are
    p = RecPCA(4, 1.0, form).fit(x, graph).components_
    assert np.abs(p).max() < 100
    p = RecPCA(12, 1.0, form).fit(x, graph).components_
    assert angle(p.T, linalg.eigh(np.cov(x.T))[1][:, 1:]) < 1e-6
    with pytest.raises(ValueError, match="12 directions only"):
        RecPCA(13, 1.0, form).fit(x, graph)


@pytest.mark.parametrize("form", ["difference", "trace_ratio", "generalized"])
def test_without_trade_off_or_edges_it_is_pca(form):
    x, graph = case()
    pca = PCA(4).fit(x)
    empty = sparse.csr_array(graph.shape)
    for lam, edges in ((0.0, graph), (0.7, None), (0.7, empty)):
        fitted = RecPCA(4, lam, form).fit(x, edges)
        assert angle(fitted.components_.T, pca.components_.T) < 1e-6
        assert fitted.retained_variance_ == pytest.approx(pca.explained_variance_ratio_.sum())
    complete = sparse.csr_array(np.ones((120, 120)) - np.eye(120))
    assert angle(RecPCA(4, 0.8).fit(x, complete).components_.T, pca.components_.T) < 1e-6


@pytest.mark.parametrize("form", ["difference", "trace_ratio", "generalized"])
def test_permuting_shifting_and_rotating_change_nothing_but_the_order(form):
    x, graph = case()
    z = RecPCA(3, 0.9, form).fit_transform(x, graph)
    order = np.random.default_rng(0).permutation(len(x))
    permuted = RecPCA(3, 0.9, form).fit_transform(x[order], graph[order][:, order])
    np.testing.assert_allclose(np.abs(permuted), np.abs(z[order]), atol=1e-6)
    np.testing.assert_allclose(RecPCA(3, 0.9, form).fit_transform(x + 5, graph), z, atol=1e-6)
    q = linalg.qr(np.random.default_rng(1).normal(size=(12, 12)))[0]
    turned = RecPCA(3, 0.9, form).fit_transform(x @ q, graph)
    np.testing.assert_allclose(np.abs(turned), np.abs(z), atol=1e-6)


def test_more_trade_off_never_raises_variation_or_variance():
    x, graph = case()
    s, t = moments(x, graph)
    path = [RecPCA(3, lam).fit(x, graph).components_.T for lam in np.linspace(0, 1, 9)]
    for m in (s, t):
        values = [np.trace(p.T @ m @ p) for p in path]
        assert all(b <= a + 1e-9 for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_streamed_from_a_memory_map_equals_in_memory(tmp_path, dtype):
    x, graph = case(400, 24)
    path = tmp_path / "x.npy"
    np.save(path, x.astype(dtype))
    streamed = RecPCA(6, 0.95, block=33).fit(np.load(path, mmap_mode="r"), graph)
    whole = RecPCA(6, 0.95, block=10**6).fit(x.astype(dtype).astype(np.float64), graph)
    assert angle(streamed.components_.T, whole.components_.T) < 1e-5


def test_iteration_finds_what_the_dense_solver_does(monkeypatch):
    x, graph = case(300, 80)
    dense = RecPCA(5, 0.95).fit(x, graph)
    monkeypatch.setattr("evolute.geometry.items.rec_pca.DENSE", 10)
    iterated = RecPCA(5, 0.95).fit(x, graph)
    np.testing.assert_allclose(iterated.components_, dense.components_, atol=1e-7)


def test_whitening_gives_unit_covariance_in_the_same_subspace():
    x, graph = case()
    plain, white = RecPCA(4, 0.9).fit(x, graph), RecPCA(4, 0.9, whiten=True).fit(x, graph)
    assert angle(plain.components_.T, white.components_.T) < 1e-7
    z = white.transform(x)
    np.testing.assert_allclose(z.T @ z / len(z), np.eye(4), atol=1e-9)


def test_planted_collaboration_is_recovered_where_pca_sees_only_text():
    rng = np.random.default_rng(0)
    n, blocks = 300, 3
    block = np.arange(n) % blocks
    centres = linalg.qr(rng.normal(size=(20, 20)))[0]
    semantic, collaborative = centres[:, :6], centres[:, 6:9]
    x = 5 * rng.normal(size=(n, 6)) @ semantic.T + np.eye(blocks)[block] @ collaborative.T * 3
    x += 0.05 * rng.normal(size=x.shape)
    sequences = [rng.choice(np.flatnonzero(block == rng.integers(blocks)), 30) for _ in range(400)]
    graph = cooccurrence_graph(sequences, n, None, None)
    # A generalized eigenvector filters: it is the output that must tell the blocks, not the direction.
    who = np.eye(blocks)[block][:, :2] - 1 / blocks
    assert angle(RecPCA(2, 1.0, "generalized").fit_transform(x, graph), who) < 0.1
    assert angle(RecPCA(2, 1.0, "trace_ratio").fit_transform(x, graph), who) < 0.1
    assert angle(RecPCA(2, 0.0).fit_transform(x), who) > 1.0


def test_save_and_load(tmp_path):
    x, graph = case()
    fitted = RecPCA(4, 0.9, "trace_ratio").fit(x, graph)
    fitted.save(tmp_path / "p.npz")
    again = RecPCA.load(tmp_path / "p.npz")
    np.testing.assert_array_equal(again.transform(x), fitted.transform(x))
    assert (again.hash_, again.form, again.tv_ratio_) == (fitted.hash_, fitted.form, fitted.tv_ratio_)
    assert isinstance(fitted.transform(torch.tensor(x)), torch.Tensor)


def test_rec_pca_refuses():
    x, graph = case()
    for bad in ({"n_components": 0}, {"trade_off": 1.5}, {"form": "both"}, {"block": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            RecPCA(**{"n_components": 2, **bad})
    with pytest.raises(ValueError, match="graph of 120"):
        RecPCA(2).fit(x[:50], graph)
    with pytest.raises(ValueError, match="span at most 12"):
        RecPCA(40).fit(x, graph)
    flat = np.concatenate([x[:, :3], x[:, :3] @ np.ones((3, 9))], axis=1)
    for form in ("difference", "trace_ratio", "generalized"):
        RecPCA(3, 0.5, form).fit(flat, graph)
        with pytest.raises(ValueError, match="n_components=5"):
            RecPCA(5, 0.5, form).fit(flat, graph)
    x[3, 5] = np.nan
    with pytest.raises(ValueError, match="dimension 5"):
        RecPCA(2).fit(x, graph)


@pytest.mark.parametrize(
    "method", ["truncate", "even", "variance", "random_projection", "pca", "whitened_pca", "rec_pca"]
)
def test_tables_have_the_width_and_scale_asked_for(method):
    x, graph = case()
    table = initial_table(torch.tensor(x), 5, method, graph, row_norm=0.3)
    assert table.shape == (120, 5)
    assert float(table.square().sum(1).mean().sqrt()) == pytest.approx(0.3, rel=1e-4)
    with pytest.raises(ValueError, match="20 dimensions of 12"):
        initial_table(torch.tensor(x), 20, method)


def test_unit_rows_gradients_are_orthogonal_and_dead_rows_silent():
    table = torch.randn(6, 4, dtype=torch.float64)
    table[2] = 0
    table.requires_grad_()
    (unit_rows(table, padding_idx=0) * torch.randn(6, 4)).sum().backward()
    assert (table.grad * table).sum(1).abs().max() < 1e-12
    assert not table.grad[[0, 2]].any()
    assert unit_rows(table, 0)[[0, 2]].abs().sum() == 0


def test_histories_keep_their_order():
    joined = Histories.of([[3, 1], [], [2]])
    assert joined.items.tolist() == [3, 1, 2]
    assert joined.offsets.tolist() == [0, 2, 2, 3]

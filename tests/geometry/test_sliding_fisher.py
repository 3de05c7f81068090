"""The sliding Fisher matrix and its inverse against dense float64 algebra on the rows it should hold."""

import pytest
import torch

from evolute.geometry import SlidingFisher, hutchinson_trace, top_eigenpairs
from evolute.geometry.curvature import sliding_fisher


def gradients(count, dim, seed=0, dtype=torch.float64):
    return torch.randn(count, dim, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def filled(rows, window, damping, **options):
    F = SlidingFisher(rows.shape[1], window, damping, **{"dtype": rows.dtype, **options})
    for row in rows:
        F.add(row)
    return F


def dense(rows, damping, block_size=None):
    matrix = rows.double().T @ rows.double() / max(1, len(rows))
    if block_size is not None:
        block = torch.arange(rows.shape[1]) // block_size
        matrix = torch.where(block[:, None] == block, matrix, 0.0)
    return matrix + damping * torch.eye(rows.shape[1]).double()


def near(a, b, tol):
    return (a.double() - b).norm().item() <= tol * b.norm().item()


@pytest.fixture(params=[2**19, 24], ids=["whole", "in-pieces"])
def piece(request, monkeypatch):
    monkeypatch.setattr(sliding_fisher, "_PIECE", request.param)


@pytest.mark.parametrize("block_size", [None, 4, 7, 13, 50])
@pytest.mark.parametrize("added", [0, 1, 3, 5, 6, 13])
def test_products_solves_and_diagonals_are_those_of_the_rows_held(added, block_size, piece):
    rows, dim, window, damping = gradients(added, 13), 13, 5, 0.03
    F = filled(rows, window, damping, block_size=block_size)
    held = rows[max(0, added - window) :]
    assert len(F) == len(held)
    exact = dense(held, damping, block_size)
    inverse = torch.linalg.inv(exact)
    x = gradients(3, dim, seed=1).T
    assert near(F @ x, exact @ x, 1e-12)
    assert near(F.solve(x), inverse @ x, 1e-12)
    assert near(F.solve(x[:, 0]), inverse @ x[:, 0], 1e-12)
    assert (F @ x[:, 0]).shape == F.solve(x[:, 0]).shape == (dim,)
    assert near(F.diagonal(), exact.diagonal(), 1e-12)
    assert near(F.inverse_diagonal(), inverse.diagonal(), 1e-12)
    nonzero = torch.linalg.eigvalsh(exact - damping * torch.eye(dim).double()).flip(0)
    found = F.eigenvalues()
    assert len(found) == len(held) * -(-dim // min(block_size or dim, dim))
    assert torch.allclose(torch.nn.functional.pad(found, (0, dim))[:dim], nonzero, atol=1e-12)
    assert not found[dim:].abs().gt(1e-12).any()


def test_an_add_after_a_solve_counts():
    rows = gradients(9, 20)
    F = SlidingFisher(20, 4, 0.1, torch.float64)
    for i, row in enumerate(rows):
        F.add(row)
        assert near(F.solve(rows[0]), torch.linalg.solve(dense(rows[max(0, i - 3) : i + 1], 0.1), rows[0]), 1e-12)


def test_the_static_form_is_the_dynamic_one_in_one_step(piece):
    rows = gradients(6, 31)
    for block_size in (None, 8):
        static, dynamic = SlidingFisher.from_rows(rows, 0.2, block_size), filled(rows, 6, 0.2, block_size=block_size)
        x = gradients(1, 31, seed=2)[0]
        assert near(static.solve(x), dynamic.solve(x), 1e-13)
        new = gradients(1, 31, seed=3)[0]
        for F in (static, dynamic):
            F.add(new)
        exact = torch.linalg.solve(dense(torch.cat([rows[1:], new[None]]), 0.2, block_size), x)
        assert near(static.solve(x), exact, 1e-12)


def test_it_agrees_with_the_recursion_of_the_paper():
    rows, damping = gradients(16, 40), 1e-2
    m = len(rows)
    V, q = [], []
    for g in rows:  # M-FAC's static algorithm: one rank-one update of the inverse after the other
        v = g / damping - sum(((w @ g) / p * w for w, p in zip(V, q, strict=True)), torch.zeros(40).double())
        V.append(v)
        q.append(m + g @ v)
    F = SlidingFisher.from_rows(rows, damping)
    x = gradients(1, 40, seed=4)[0]
    assert near(F.solve(x), x / damping - sum((v @ x) / p * v for v, p in zip(V, q, strict=True)), 1e-11)
    assert near(F.inverse_diagonal(), 1 / damping - sum(v * v / p for v, p in zip(V, q, strict=True)), 1e-11)


def test_large_windows_stay_exact():
    rows = gradients(150, 500)
    F = filled(rows, 64, 1e-3)
    exact = dense(rows[-64:], 1e-3)
    x = gradients(4, 500, seed=5).T
    assert near(F.solve(x), torch.linalg.solve(exact, x), 1e-10)
    assert near(F.inverse_diagonal(), torch.linalg.inv(exact).diagonal(), 1e-10)


@pytest.mark.parametrize("relative", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("alike", [False, True])
def test_float32_rows_with_a_small_damping_lose_nothing(relative, alike):
    spread = 1e-3 if alike else 1.0
    rows = gradients(1, 400, seed=6, dtype=torch.float32) * alike + spread * gradients(32, 400, dtype=torch.float32)
    damping = relative * rows.double().square().sum(dim=1).max().item() / 32
    F = filled(rows, 32, damping)
    # F^-1 by the singular vectors of the rows, which does not cancel.
    _, s, basis = torch.linalg.svd(rows.double(), full_matrices=False)

    def exact(x):
        inside = basis @ x
        return (x - basis.T @ inside) / damping + basis.T @ torch.diag(1 / (damping + s**2 / 32)) @ inside

    generic, spanned = gradients(1, 400, seed=7)[0].float(), rows.T @ gradients(1, 32, seed=8)[0].float()
    assert F.solve(generic).dtype == torch.float32
    assert near(F.solve(generic), exact(generic.double()), 1e-7)
    assert near(F.solve(spanned), exact(spanned.double()), 1e-5 if alike and relative == 1e-9 else 1e-7)
    assert near(F.inverse_diagonal(), exact(torch.eye(400).double()).diagonal(), 1e-7)
    if relative < 1e-3:  # what the float64 arithmetic inside is for
        system = rows @ rows.T + 32 * damping * torch.eye(32)
        plain = (spanned - rows.T @ torch.linalg.solve(system, rows @ spanned)) / damping
        assert not near(plain, exact(spanned.double()), 0.05)


def test_a_damping_below_rounding_is_refused():
    rows = gradients(4, 30)
    F = filled(rows, 4, 1e-13 * rows.square().sum(dim=1).max().item())
    for invert in (lambda: F.solve(rows[0]), F.inverse_diagonal, lambda: F.saliency(rows[0])):
        with pytest.raises(FloatingPointError, match=r"damping=.*pass at least"):
            invert()
    assert near(F.diagonal(), dense(rows, F.damping).diagonal(), 1e-12)
    F.add(torch.zeros(30))  # the others are still there


def test_narrow_rows_are_rounded_once_and_give_float32():
    rows = gradients(5, 40)
    F = filled(rows, 4, 0.1, dtype=torch.bfloat16)
    assert F.dtype == F.solve(rows[0]).dtype == (F @ rows[0]).dtype == F.diagonal().dtype == torch.float32
    assert near(F.solve(rows[0]), torch.linalg.solve(dense(rows[1:].bfloat16(), 0.1), rows[0]), 1e-7)
    with pytest.raises(FloatingPointError, match="g has 1 of 40"):
        filled(rows, 4, 0.1, dtype=torch.float16).add(torch.zeros(40).index_fill(0, torch.tensor([3]), 1e6))


def test_it_serves_as_an_operator():
    rows = gradients(12, 60)
    F = filled(rows, 8, 0.5)
    exact = torch.linalg.eigvalsh(dense(rows[-8:], 0.5)).flip(0)
    top = top_eigenpairs(F, 3, tol=1e-9)
    assert torch.allclose(top.values, exact[:3], rtol=1e-9)
    assert torch.allclose(F.eigenvalues()[:3] + 0.5, exact[:3], rtol=1e-12)
    assert hutchinson_trace(F, 500).item() == pytest.approx(exact.sum().item(), rel=0.05)
    assert F.shape == (60, 60)
    with pytest.raises(ValueError, match="k=61"):
        top_eigenpairs(F, 61)


def constrained(matrix, weights, index):
    """Solve min d^T M d / 2 under d_index = -w_index by its KKT system."""
    n, q = len(weights), len(index)
    system = torch.zeros(n + q, n + q).double()
    system[:n, :n] = matrix
    system[index, n + torch.arange(q)] = 1
    system[n + torch.arange(q), index] = 1
    return torch.linalg.solve(system, torch.cat([torch.zeros(n).double(), -weights[index]]))[:n]


@pytest.mark.parametrize("block_size", [None, 6, 40])
def test_removal_is_the_constrained_minimum_and_saliency_its_value(block_size, piece):
    rows, weights = gradients(7, 25), gradients(1, 25, seed=9)[0]
    F = filled(rows, 5, 0.05, block_size=block_size)
    exact = dense(rows[-5:], 0.05, block_size)
    saliency = F.saliency(weights)
    for i in range(25):
        step = F.removal(weights, torch.tensor([i]))
        assert near(step, constrained(exact, weights, torch.tensor([i])), 1e-11)
        assert step[i] == -weights[i]
        assert saliency[i].item() == pytest.approx((step @ exact @ step / 2).item(), rel=1e-10)
    index = torch.tensor([20, 3, 4, 5, 11, 0])
    step = F.removal(weights, index)
    assert near(step, constrained(exact, weights, index), 1e-11)
    assert torch.equal((weights + step)[index], torch.zeros(6).double())
    with pytest.raises(ValueError, match="different positions"):
        F.removal(weights, torch.tensor([1, 1]))
    for outside in (-1, 25):
        with pytest.raises(ValueError, match=r"\[0, 25\)"):
            F.removal(weights, torch.tensor([outside]))
    with pytest.raises(ValueError, match=r"weights has shape \(24,\)"):
        F.removal(weights[1:], index)
    with pytest.raises(ValueError, match=r"weights has shape \(24,\)"):
        F.saliency(weights[1:])


def test_a_window_is_resumed_exactly():
    rows = gradients(9, 17)
    whole = filled(rows, 4, 0.1, block_size=5)
    first = filled(rows[:6], 4, 0.1, block_size=5)
    first.solve(rows[0])
    other = SlidingFisher(17, 4, 0.1, torch.float64, block_size=5)
    other.load_state_dict({k: v.clone() if hasattr(v, "clone") else v for k, v in first.state_dict().items()})
    for row in rows[6:]:
        other.add(row)
    assert torch.equal(other.solve(rows[0]), whole.solve(rows[0]))
    with pytest.raises(ValueError, match="state's rows"):
        SlidingFisher(17, 4, 0.1).load_state_dict(first.state_dict())


def test_bad_values_are_refused_and_leave_the_window_as_it_was():
    for options, message in (
        ({"dim": 0}, "dim=0"), ({"window": 0}, "window=0"), ({"damping": 0.0}, "damping=0"),
        ({"damping": -1.0}, "damping=-1"), ({"damping": torch.nan}, "damping=nan"), ({"damping": torch.inf}, "inf"),
        ({"dtype": torch.int32}, "int32"), ({"dtype": torch.complex64}, "complex"), ({"block_size": 0}, "block_size=0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            SlidingFisher(**{"dim": 3, "window": 2, "damping": 0.1, **options})
    rows = gradients(3, 5)
    F = filled(rows, 2, 0.1)
    before = F.solve(rows[0])
    for wrong in (torch.ones(4), torch.ones(5, 1), torch.ones(1, 5)):
        with pytest.raises(ValueError, match="g has shape"):
            F.add(wrong)
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(FloatingPointError, match="g has 5 of 5"):
            F.add(torch.full((5,), wrong))
        with pytest.raises(FloatingPointError, match="x has 5 of 5"):
            F.solve(torch.full((5,), wrong))
        with pytest.raises(FloatingPointError, match="v has 5 of 5"):
            F @ torch.full((5,), wrong)
        bad = rows.clone()
        bad[1, 2] = wrong
        with pytest.raises(FloatingPointError, match="rows has 1 of 15"):
            SlidingFisher.from_rows(bad, 0.1)
    for use in (F.solve, F.__matmul__):
        for shape in ((4,), (4, 5), (5, 1, 1), ()):
            with pytest.raises(ValueError, match="has shape"):
                use(torch.ones(shape))
    with pytest.raises(ValueError, match=r"rows has shape \(5,\)"):
        SlidingFisher.from_rows(rows[0], 0.1)
    assert len(F) == 2
    assert torch.equal(F.solve(rows[0]), before)


def test_it_holds_no_graph_and_no_reference_to_the_gradient():
    g = torch.ones(3, requires_grad=True)
    F = SlidingFisher(3, 2, 0.5)
    F.add(g * 2)
    assert not F.solve(g).requires_grad
    kept = torch.ones(3)
    F.add(kept)
    before = F.diagonal()
    kept.zero_()
    assert torch.equal(F.diagonal(), before)

"""Products against dense autograd, and what the operator promises around them."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from evolute.geometry import Hessian
from tests.geometry.networks import PROBLEMS, mlp, transformer


def close(a, b, tol):
    return (a - b).abs().max().item() <= tol * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("name", PROBLEMS)
def test_products_equal_the_dense_hessian(name):
    problem = PROBLEMS[name]()
    dense = problem.dense_hessian()
    with Hessian(problem.loss, problem.params) as H:
        assert H.shape == dense.shape
        assert (H.dtype, H.engine) == (torch.float64, "autograd")
        product = H @ torch.eye(len(dense), dtype=torch.float64)
        assert H.products == len(dense)
        assert close(product, dense, 1e-10)
        assert close(product, product.T, 1e-10)
        assert H.loss.item() == pytest.approx(problem.loss().item(), rel=1e-12)
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(problem.loss(), list(problem.params.values()))])
        assert close(H.gradient, expected, 1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
def test_finite_differences_agree_and_restore_every_bit(name):
    problem = PROBLEMS[name]()
    before = problem.flat().clone()
    v = torch.randn(3, len(before), dtype=torch.float64).T
    with (
        Hessian(problem.loss, problem.params) as exact,
        Hessian(problem.loss, problem.params, "finite_difference") as H,
    ):
        assert H.engine == "finite_difference"
        assert close(H @ (100 * v), 100 * (exact @ v), 1e-6)
        assert torch.equal(H @ torch.zeros(len(before)).double(), torch.zeros(len(before)).double())
    assert torch.equal(problem.flat(), before)
    assert all(p.grad is None for p in problem.params.values())


def test_finite_differences_restore_when_the_loss_raises():
    problem = mlp()
    before = problem.flat().clone()
    calls = []

    def loss():
        calls.append(1)
        if len(calls) > 2:
            raise KeyError("broken")
        return problem.loss()

    H = Hessian(loss, problem.params, "finite_difference")
    with pytest.raises(KeyError):
        H @ torch.ones_like(before)
    assert torch.equal(problem.flat(), before)


def test_reverse_over_reverse_is_used_because_jvp_of_jacrev_is_wrong_with_layer_norm():
    problem = transformer()
    dense = problem.dense_hessian()
    torch.manual_seed(0)
    v = torch.randn(len(dense), dtype=torch.float64)

    def forward_over(reverse):
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(reverse(problem.loss_at), (problem.flat(),), (v,))[1]

    assert close(forward_over(torch.func.grad), dense @ v, 1e-10)
    with Hessian(problem.loss, problem.params) as H:
        assert close(H @ v, dense @ v, 1e-10)
    wrong = forward_over(torch.func.jacrev)
    # When torch mends this, the rule against jvp(jacrev) may go; nothing here depends on it.
    assert not close(wrong, dense @ v, 1e-6)


def test_the_caller_need_not_choose_kernels_or_gradient_mode():
    problem = transformer()
    with torch.no_grad(), Hessian(problem.loss, problem.params) as H:
        v = torch.ones(H.shape[0], dtype=torch.float64)
        assert close(H @ v, problem.dense_hessian() @ v, 1e-10)
        assert not (H @ v).requires_grad


def test_a_block_is_a_sub_matrix_on_the_same_graph():
    problem = mlp()
    dense = problem.dense_hessian()
    names = ["2.bias", "0.weight"]
    sizes = [p.numel() for p in problem.params.values()]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    where = {n: torch.arange(e - s, e) for n, s, e in zip(problem.params, sizes, ends, strict=True)}
    index = torch.cat([where[n] for n in names])
    for engine, tol in (("autograd", 1e-10), ("finite_difference", 1e-6)):
        with Hessian(problem.loss, problem.params, engine) as H:
            block = H.block(names)
            assert close(block @ torch.eye(len(index), dtype=torch.float64), dense[index][:, index], tol)
            assert torch.equal(block.gradient, H.gradient[index])
            assert (H.products, block.products) == (0, len(index))
        with pytest.raises(RuntimeError, match="closed"):
            block @ torch.ones(len(index), dtype=torch.float64)
    with pytest.raises(ValueError, match="nothing"):
        Hessian(problem.loss, problem.params).block(["nothing"])


def test_unused_and_linear_parameters_give_zero_rows():
    a, b, c = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    for engine in ("auto", "finite_difference"):
        with Hessian(lambda: a.pow(4).sum() + 3 * b.sum(), {"b": b, "c": c, "a": a}, engine) as H:
            expected = torch.diag(torch.cat([torch.zeros(6).double(), 12 * a.detach() ** 2]))
            assert close(H @ torch.eye(9, dtype=torch.float64), expected, 1e-6)
            assert close(
                H.gradient, torch.cat([torch.full((3,), 3.0).double(), c.detach() * 0, 4 * a.detach() ** 3]), 1e-9
            )
    with Hessian(lambda: 3 * b.sum(), {"b": b}) as H:
        assert torch.equal(H @ torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))


def test_checkpointed_modules_keep_the_exact_engine():
    problem = transformer()
    with Hessian(problem.loss, problem.params) as plain:
        v = torch.randn(plain.shape[0], dtype=torch.float64)
        expected = plain @ v
    again = lambda: problem.criterion(checkpoint(problem.module, problem.inputs, use_reentrant=False))  # noqa: E731
    with Hessian(again, problem.params) as H:
        assert close(H @ v, expected, 1e-12)
        assert H.engine == "autograd"


class OnceCube(torch.autograd.Function):
    """x^3 with a backward that says that it cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class KernelCube(torch.autograd.Function):
    """x^3 with a backward that raises only when it is differentiated, as fused kernels do."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return KernelBackward.apply(x, g)


class KernelBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, g):
        return 3 * x**2 * g

    @staticmethod
    def backward(ctx, g):
        raise NotImplementedError("no derivative for the kernel's backward")


def multiplied(loss, params, v):
    H = Hessian(loss, params)
    return H, H @ v


@pytest.mark.parametrize(("function", "reason"), [(OnceCube, "once_differentiable"), (KernelCube, "no derivative")])
def test_auto_falls_back_where_double_backward_is_impossible_and_says_so(function, reason):
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    v = torch.randn(5, dtype=torch.float64)
    # The sum sends a constant gradient into the function: the case where once_differentiable raises nothing by itself.
    with pytest.warns(UserWarning, match=f"finite differences.*{reason}"):
        H, product = multiplied(lambda: function.apply(x).sum(), {"x": x}, v)
    assert close(product, 6 * x.detach() * v, 1e-6)
    assert H.engine == "finite_difference"
    with pytest.raises(RuntimeError, match=reason):
        Hessian(lambda: function.apply(x).sum(), {"x": x}, "autograd") @ v


def _fused(params):
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    torch.optim.AdamW(params, lr=1e-6, fused=True).step()


def _bump(params):
    with torch.no_grad():
        params[1][0] += 1e-3


def _swap_data(params):
    params[0].data = params[0].data + 1e-12


@pytest.mark.parametrize("move", [_fused, _bump, _swap_data])
@pytest.mark.parametrize("engine", ["autograd", "finite_difference"])
def test_moved_parameters_raise(move, engine):
    problem = mlp()
    H = Hessian(problem.loss, problem.params, engine)
    v = torch.ones(H.shape[0], dtype=torch.float64)
    block = H.block(["4.bias"])
    H @ v  # a product moves nothing
    H @ v
    move(list(problem.params.values()))
    with pytest.raises(RuntimeError, match="moved since"):
        H @ v
    with pytest.raises(RuntimeError, match="moved since"):
        block @ v[:4]


def test_a_step_at_right_angles_that_bumps_no_version_is_seen():
    # The case a norm would miss: float32 weights turned by a small angle.
    w = torch.nn.Parameter(torch.tensor([1.0, 1e-4]))
    H = Hessian(lambda: w.pow(2).sum(), {"w": w})
    w.data[1] = -1.0001e-4
    assert w.norm().item() == 1.0
    with pytest.raises(RuntimeError, match="moved"):
        H @ torch.ones(2)


class Probe:
    """An object that only an autograd node holds."""


class Holding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, probe):
        ctx.probe = probe
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * 1, None


def test_closing_frees_the_graph_and_ends_products():
    x = torch.randn(4, requires_grad=True)
    probes = [Probe()]
    alive = weakref.ref(probes[0])
    H = Hessian(lambda: Holding.apply(x, probes.pop()).exp().sum(), {"x": x})
    with H:
        H @ torch.ones(4)
        gc.collect()
        assert alive() is not None
    gc.collect()
    assert alive() is None
    with pytest.raises(RuntimeError, match="closed"):
        H @ torch.ones(4)
    H.close()


def test_grad_fields_and_training_mode_stay_as_they_are():
    problem = mlp()
    marks = [torch.ones_like(p) for p in problem.params.values()]
    for p, mark in zip(problem.params.values(), marks, strict=True):
        p.grad = mark
    for engine in ("autograd", "finite_difference"):
        with Hessian(problem.loss, problem.params, engine) as H:
            H @ torch.ones(H.shape[0], dtype=torch.float64)
    assert all(
        p.grad is m and torch.equal(m, torch.ones_like(m)) for p, m in zip(problem.params.values(), marks, strict=True)
    )
    assert problem.module.training


def test_mixed_precision_parameters_share_one_flat_vector():
    a = torch.nn.Parameter(torch.tensor([0.5, -1.0], dtype=torch.bfloat16))
    b = torch.nn.Parameter(torch.tensor([2.0]))
    with Hessian(lambda: (a.float() ** 2).sum() * b.sum(), {"a": a, "b": b}) as H:
        assert H.dtype == torch.float32
        assert torch.equal(H @ torch.eye(3), torch.tensor([[4.0, 0, 1], [0, 4, -2], [1, -2, 0]]))


def test_tied_weights_count_once():
    problem = transformer()
    assert "head.weight" not in problem.params
    both = {**problem.params, "head.weight": problem.module.head.weight}
    with pytest.raises(ValueError, match=r"head\.weight.*embed\.weight.*same tensor"):
        Hessian(problem.loss, both)


def test_refusals_name_what_is_wrong():
    problem = mlp()
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(ValueError, match="empty"):
        Hessian(problem.loss, {})
    with pytest.raises(ValueError, match="'frozen' does not require"):
        Hessian(problem.loss, {"frozen": frozen})
    with pytest.raises(ValueError, match=r"scalar.*\(9, 4\)"):
        Hessian(problem.logits, problem.params)
    with pytest.raises(ValueError, match="depend"):
        Hessian(lambda: torch.tensor(1.0), problem.params)
    with pytest.raises(ValueError, match="engine='jax'"):
        Hessian(problem.loss, problem.params, "jax")
    with Hessian(problem.loss, problem.params) as H, pytest.raises(ValueError, match=r"\(3,\)"):
        H @ torch.ones(3)


def test_non_finite_losses_give_non_finite_products():
    x = torch.tensor([0.0, 1.0], requires_grad=True)
    with Hessian(lambda: x.log().sum(), {"x": x}) as H:
        assert not torch.isfinite(H @ torch.ones(2)).all()


def test_logistic_regression_by_formula():
    torch.manual_seed(0)
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randint(0, 2, (20,)).double()
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    s = torch.sigmoid(x @ w.detach())
    with Hessian(lambda: F.binary_cross_entropy_with_logits(x @ w, y), {"w": w}) as H:
        assert close(H @ torch.eye(4, dtype=torch.float64), x.T @ torch.diag(s * (1 - s)) @ x / 20, 1e-12)

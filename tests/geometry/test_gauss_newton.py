"""Gauss-Newton products against ``J^T H_z J`` built densely."""

import pytest
import torch
import torch.nn.functional as F

from evolute.geometry import GaussNewton, Hessian
from tests.geometry.networks import PROBLEMS, mlp
from tests.geometry.test_hessian import close


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize(("engine", "tol"), [("autograd", 1e-10), ("finite_difference", 1e-6)])
def test_products_equal_the_dense_matrix(name, engine, tol):
    problem = PROBLEMS[name]()
    dense = problem.dense_gauss_newton()
    before = problem.flat().clone()
    with GaussNewton(problem.logits, problem.criterion, problem.params, engine) as G, \
            Hessian(problem.loss, problem.params) as H:  # fmt: skip
        product = G @ torch.eye(len(dense), dtype=torch.float64)
        assert G.engine == engine
        assert close(product, dense, tol)
        assert close(product, product.T, tol)
        assert torch.linalg.eigvalsh(product).min() > -tol
        assert close(G.gradient, H.gradient, 1e-12)
        assert G.loss.item() == pytest.approx(H.loss.item())
    assert torch.equal(problem.flat(), before)


def test_softmax_regression_is_its_own_hessian():
    torch.manual_seed(0)
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.randint(0, 4, (12,))
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    p = torch.softmax(x @ w.detach(), dim=1)
    expected = (
        sum(torch.kron(torch.outer(a, a), torch.diag(q) - torch.outer(q, q)) for a, q in zip(x, p, strict=True)) / 12
    )
    with GaussNewton(lambda: x @ w, lambda z: F.cross_entropy(z, y), {"w": w}) as G:
        assert close(G @ torch.eye(12, dtype=torch.float64), expected, 1e-12)


def test_a_loss_linear_in_the_logits_has_none():
    w = torch.randn(3, requires_grad=True)
    with GaussNewton(lambda: w.exp(), lambda z: z.sum(), {"w": w}) as G:
        assert torch.equal(G @ torch.ones(3), torch.zeros(3))


def test_blocks_unused_parameters_and_moves():
    problem = mlp()
    extra = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    params = {"extra": extra, **problem.params}
    dense = problem.dense_gauss_newton()
    with GaussNewton(problem.logits, problem.criterion, params) as G:
        product = G @ torch.eye(len(dense) + 2, dtype=torch.float64)
        assert torch.equal(product[:2], torch.zeros_like(product[:2]))
        block = G.block(["0.weight"]) @ torch.eye(35, dtype=torch.float64)
        assert close(block, dense[:35, :35], 1e-10)
        with torch.no_grad():
            problem.params["4.bias"].add_(1.0)
        with pytest.raises(RuntimeError, match=r"moved.*4\.bias"):
            G @ torch.ones(len(dense) + 2, dtype=torch.float64)


def test_refuses_logits_without_a_graph():
    problem = mlp()
    with pytest.raises(ValueError, match="depend"):
        GaussNewton(lambda: problem.logits().detach(), problem.criterion, problem.params)

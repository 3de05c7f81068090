"""Ways to find the ten eigenvalues of largest size, ours and those of the peers, behind one signature."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from curvature_problems import Problem
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from evolute.geometry import Hessian, top_eigenpairs

K = 10
TOL = 1e-3


@dataclass
class Found:
    """Eigenvalues [K], vectors [P, K], and the products spent where the method counts them."""

    values: Tensor
    vectors: Tensor
    products: int | None = None


def evolute(problem: Problem, budget: int) -> Found:
    """Ours: one kept graph, band Lanczos, thick restarts."""
    with Hessian(problem.loss, problem.params) as H:
        found = top_eigenpairs(H, K, TOL, max_products=400)
        return Found(found.values, found.vectors, found.products)


def curvlinops(problem: Problem, budget: int) -> Found:
    """Its Hessian, without its check for determinism, through SciPy's ARPACK."""
    eigsh = importlib.import_module("scipy.sparse.linalg").eigsh
    start = np.random.default_rng(0).standard_normal(sum(p.numel() for p in problem.params.values()))
    values, vectors = eigsh(curvlinops_operator(problem).to_scipy(), k=K, which="LM", tol=TOL, v0=start.astype("f4"))
    return Found(torch.from_numpy(values), torch.from_numpy(vectors))


def curvlinops_operator(problem: Problem) -> Any:
    return importlib.import_module("curvlinops").HessianLinearOperator(
        problem.module, nn.CrossEntropyLoss(), list(problem.module.parameters()), [(problem.inputs, problem.targets)],
        check_deterministic=False,
    )  # fmt: skip


def eigenthings(problem: Problem, budget: int) -> Found:
    """hessian-eigenthings: ``budget`` Lanczos steps with full reorthogonalisation, exact products.

    With a budget of 0, as one runs it who does not know the number: from its default of 20 steps, twice as many each
    time, until it says that all ten have converged. It cannot go on from where it stopped.
    """
    return _eigenthings(problem, budget, "autograd")


def eigenthings_differences(problem: Problem, budget: int) -> Found:
    """The same on finite differences of gradients."""
    return _eigenthings(problem, budget, "finite_difference")


def eigenthings_operator(problem: Problem, method: str = "autograd") -> Any:
    module = importlib.import_module("hessian_eigenthings")
    loss = module.supervised_loss(nn.CrossEntropyLoss())
    return module.HessianOperator(problem.module, [(problem.inputs, problem.targets)], loss, method=method)


def _eigenthings(problem: Problem, budget: int, method: str) -> Found:
    lanczos = importlib.import_module("hessian_eigenthings").lanczos
    operator, steps = eigenthings_operator(problem, method), 0
    for size in (budget,) if budget else (20, 40, 80, 160):
        found = lanczos(operator, k=K, max_iter=size, tol=TOL, reorthogonalize=True, seed=0)
        steps += found.iterations
        if bool(found.converged.all()):
            break
    return Found(found.eigenvalues, found.eigenvectors.T, steps)


def pyhessian(problem: Problem, budget: int) -> Found:
    """PyHessian: power iteration with deflation, at most ``budget`` steps a pair; it writes ``.grad``."""
    copied = problem.copied()
    hessian = importlib.import_module("pyhessian").hessian
    operator = hessian(
        copied.module, nn.CrossEntropyLoss(), data=(copied.inputs, copied.targets), cuda=False
    )  # fmt: skip
    torch.manual_seed(0)
    values, vectors = operator.eigenvalues(maxIter=budget, tol=1e-12, top_n=K)
    columns = [torch.cat([part.detach().flatten() for part in v]) for v in vectors]
    return Found(torch.tensor(values), torch.stack(columns, dim=1))


ARMS: dict[str, Callable[[Problem, int], Found]] = {
    "evolute": evolute,
    "curvlinops": curvlinops,
    "hessian-eigenthings": eigenthings,
    "hessian-eigenthings, differences": eigenthings_differences,
    "PyHessian": pyhessian,
}


def run(arm: str, problem: Problem, budget: int) -> Found:
    """Run an arm under the MATH kernel, which all exact second derivatives of attention need."""
    with sdpa_kernel(SDPBackend.MATH):
        return ARMS[arm](problem, budget)

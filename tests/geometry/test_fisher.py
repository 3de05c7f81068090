"""Fisher matrices, the residual of the split H = G + R, and blocks by name, against dense algebra in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from evolute.geometry import (
    EmpiricalFisher,
    Fisher,
    GaussNewton,
    Hessian,
    HessianResidual,
    SlidingFisher,
    hutchinson_trace,
    parameter_blocks,
    top_eigenpairs,
)
from tests.geometry.networks import PROBLEMS, mlp, transformer
from tests.geometry.test_hessian import OnceCube, close


def eye(size):
    return torch.eye(size, dtype=torch.float64)


def directions(size, count=25):
    return torch.randn(size, count, dtype=torch.float64, generator=torch.Generator().manual_seed(11))


def losses(problem):
    return F.cross_entropy(problem.logits(), problem.targets, reduction="none")


def jacobian(values, params):
    """Rows of gradients, one backward pass for each entry: the slow and plain way."""
    rows = [torch.autograd.grad(v, list(params.values()), retain_graph=True, allow_unused=True) for v in values]
    zeros = [torch.zeros_like(p) for p in params.values()]
    return torch.stack(
        [torch.cat([(z if g is None else g).flatten() for g, z in zip(row, zeros, strict=True)]) for row in rows]
    )


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize(("engine", "tol"), [("autograd", 1e-10), ("finite_difference", 1e-6)])
def test_the_empirical_fisher_is_the_mean_of_outer_products_of_sample_gradients(name, engine, tol):
    problem = PROBLEMS[name]()
    rows = jacobian(losses(problem), problem.params)
    before = problem.flat().clone()
    with EmpiricalFisher(lambda: losses(problem), problem.params, engine) as E:
        v = directions(rows.shape[1])
        assert close(E @ v, rows.T @ (rows @ v) / len(rows), tol)
        assert close(E.gradient, rows.mean(dim=0), 1e-12)
        assert E.loss.item() == pytest.approx(problem.loss().item(), rel=1e-12)
        assert (E.engine, E.dtype, E.shape) == (engine, torch.float64, (rows.shape[1],) * 2)
    assert torch.equal(problem.flat(), before)
    assert all(p.grad is None for p in problem.params.values())
    with pytest.raises(RuntimeError, match="closed"):
        E @ before


def test_a_sample_is_an_entry_of_the_losses():
    problem = transformer()
    rows = jacobian(losses(problem).view(2, 5).mean(dim=1), problem.params)
    with EmpiricalFisher(lambda: losses(problem).view(2, 5).mean(dim=1), problem.params) as E:
        v = directions(rows.shape[1])
        assert close(E @ v, rows.T @ (rows @ v) / 2, 1e-10)
    kept = torch.tensor([0, 3, 4])
    rows = jacobian(losses(problem)[kept], problem.params)
    with EmpiricalFisher(lambda: losses(problem)[kept], problem.params) as E:
        assert close(E @ v, rows.T @ (rows @ v) / 3, 1e-10)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize(("engine", "tol"), [("autograd", 1e-10), ("finite_difference", 1e-6)])
def test_the_fisher_is_the_expectation_over_every_label(name, engine, tol):
    problem = PROBLEMS[name]()
    z = problem.logits()
    expected = 0
    for label in range(z.shape[1]):  # by enumeration, with no use of the Gauss-Newton identity
        rows = jacobian(F.cross_entropy(z, torch.full((len(z),), label), reduction="none"), problem.params)
        expected = expected + rows.T @ (z.detach().softmax(1)[:, label, None] * rows) / len(z)
    with Fisher(problem.logits, problem.params, engine=engine) as A:
        v = directions(len(expected))
        assert close(A @ v, expected @ v, tol)
        assert close(A.gradient, torch.zeros(len(expected)).double(), 1e-12)
        entropy = torch.distributions.Categorical(logits=z).entropy().mean().item()
        assert A.loss.item() == pytest.approx(entropy, rel=1e-12)


REGRESSIONS = {
    "categorical": lambda z: F.cross_entropy(z, torch.arange(len(z)) % z.shape[1]),
    "bernoulli": lambda z: F.binary_cross_entropy_with_logits(z, (z.detach() > 0.3).double()),
    "gaussian": lambda z: F.mse_loss(z, torch.ones_like(z)) / 2,
}


@pytest.mark.parametrize("likelihood", REGRESSIONS)
def test_the_fisher_of_each_likelihood_is_the_gauss_newton_matrix_of_its_loss(likelihood):
    problem = mlp()
    with (
        Fisher(problem.logits, problem.params, likelihood) as A,
        GaussNewton(problem.logits, REGRESSIONS[likelihood], problem.params) as G,
    ):
        assert close(A @ eye(A.shape[0]), G @ eye(A.shape[0]), 1e-10)


@pytest.mark.parametrize("likelihood", REGRESSIONS)
def test_sampled_labels_give_an_unbiased_fisher(likelihood):
    problem = mlp()
    with (
        GaussNewton(problem.logits, REGRESSIONS[likelihood], problem.params) as G,
        Fisher(problem.logits, problem.params, likelihood, samples=400) as many,
    ):
        torch.manual_seed(0)
        v = torch.randn(G.shape[0], 5, dtype=torch.float64)
        exact = (v * (G @ v)).sum(dim=0)
        assert close((v * (many @ v)).sum(dim=0), exact, 0.15)
    drawn = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        with Fisher(problem.logits, problem.params, likelihood, samples=1, generator=generator) as A:
            drawn.append((v * (A @ v)).sum(dim=0))
    forms = torch.stack(drawn)
    stderr = forms.std(dim=0) / len(forms) ** 0.5
    assert (stderr < 0.1 * exact).all()  # sharp enough to see a factor that is wrong
    assert ((forms.mean(dim=0) - exact).abs() < 4 * stderr).all()


@pytest.mark.parametrize(("engine", "tol"), [("autograd", 1e-10), ("finite_difference", 1e-6)])
def test_sampled_labels_are_drawn_once_and_their_matrix_is_an_empirical_fisher(engine, tol):
    problem = transformer()
    generator = torch.Generator().manual_seed(7)
    twin = torch.Generator().manual_seed(7)
    labels = torch.multinomial(problem.logits().detach().softmax(1), 3, replacement=True, generator=twin)
    values = torch.cat([F.cross_entropy(problem.logits(), labels[:, s], reduction="none") for s in range(3)])
    rows = jacobian(values, problem.params)
    before = torch.random.get_rng_state()
    with Fisher(problem.logits, problem.params, samples=3, generator=generator, engine=engine) as A:
        v = directions(rows.shape[1])
        assert close(A @ v, rows.T @ (rows @ v) / 30, tol)
        assert A.loss.item() == pytest.approx(values.mean().item(), rel=1e-12)
        with Fisher(problem.logits, problem.params, samples=3, generator=generator) as other:
            assert not close(other @ rows[0], A @ rows[0], 1e-2)  # the generator has moved on
    with Fisher(problem.logits, problem.params, samples=2) as one, \
            Fisher(problem.logits, problem.params, samples=2) as two:  # fmt: skip
        assert torch.equal(one @ rows[0], two @ rows[0])  # without a generator: a fixed seed
    assert torch.equal(torch.random.get_rng_state(), before)


def test_bernoulli_labels_follow_the_predicted_probability():
    z = torch.full((4000,), 1.5, dtype=torch.float64, requires_grad=True)
    with Fisher(lambda: z, {"z": z}, "bernoulli", samples=1) as A:
        p = torch.sigmoid(z.detach())
        slopes = A.gradient * len(p)  # p - y
        ones = torch.isclose(slopes, p - 1)
        assert (ones | torch.isclose(slopes, p)).all()
        assert ones.double().mean().item() == pytest.approx(p[0].item(), abs=0.03)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize(("engine", "tol"), [("autograd", 1e-10), ("finite_difference", 1e-6)])
def test_the_residual_is_the_hessian_without_the_gauss_newton_matrix(name, engine, tol):
    problem = PROBLEMS[name]()
    before = problem.flat().clone()
    with (
        HessianResidual(problem.logits, problem.criterion, problem.params, engine) as R,
        Hessian(problem.loss, problem.params) as H,
    ):
        dense = problem.dense_hessian() - problem.dense_gauss_newton()
        v = directions(len(before))
        assert close(R @ v, dense @ v, tol)
        assert close(R.gradient, H.gradient, 1e-12)
        assert R.loss.item() == pytest.approx(H.loss.item(), rel=1e-12)
        first, p = next(iter(problem.params.items()))
        assert close(R.block([first]) @ eye(p.numel()), dense[: p.numel(), : p.numel()], tol)
        assert R.engine == engine
    assert torch.equal(problem.flat(), before)


def test_the_residual_vanishes_with_the_slopes_and_for_linear_networks():
    problem = mlp()
    label = problem.logits().detach().softmax(1)
    with HessianResidual(problem.logits, lambda z: F.cross_entropy(z, label), problem.params) as R:
        assert close(R @ eye(R.shape[0]), torch.zeros(R.shape).double(), 1e-12)
    w = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 3, dtype=torch.float64)
    with HessianResidual(lambda: x @ w, lambda z: z.logsumexp(1).sum(), {"w": w}) as R:
        assert torch.equal(R @ torch.ones(6).double(), torch.zeros(6).double())


def test_fishers_fall_back_to_differences_like_the_other_operators():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    with pytest.warns(UserWarning, match="finite differences.*once_differentiable"):
        E = EmpiricalFisher(lambda: OnceCube.apply(x), {"x": x})
    product = E @ torch.ones(5).double()
    assert E.engine == "finite_difference"
    assert close(product, 9 * x.detach() ** 4 / 5, 1e-6)


def test_fisher_blocks_are_sub_matrices_and_moves_are_noticed():
    problem = mlp()
    rows = jacobian(losses(problem), problem.params)
    unused = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    with (
        EmpiricalFisher(lambda: losses(problem), {"unused": unused, **problem.params}) as E,
        Fisher(problem.logits, problem.params, samples=1) as A,
    ):
        dense = torch.zeros(E.shape).double()
        dense[2:, 2:] = rows.T @ rows / len(rows)
        assert close(E @ eye(len(dense)), dense, 1e-10)
        blocks = parameter_blocks(problem.module)
        assert list(blocks) == ["0", "2", "4"]
        assert close(E.block(blocks["0"]) @ eye(42), dense[2:44, 2:44], 1e-10)
        assert close(E.block(blocks["4"]) @ eye(28), dense[-28:, -28:], 1e-10)
        whole = A @ eye(A.shape[0])
        assert close(A.block(["2.bias"]) @ eye(6), whole[42 + 42 : 90, 42 + 42 : 90], 1e-10)
        assert hutchinson_trace(E, 400).item() == pytest.approx(dense.trace().item(), rel=0.2)
        top = top_eigenpairs(E, 3, tol=1e-8, which="largest")
        assert close(top.values, torch.linalg.eigvalsh(dense).flip(0)[:3], 1e-8)
        with torch.no_grad():
            problem.params["4.bias"].add_(1.0)
        for operator in (E, A):
            with pytest.raises(RuntimeError, match=r"moved.*4\.bias"):
                operator @ torch.ones(operator.shape[0], dtype=torch.float64)


def test_the_window_of_all_sample_gradients_is_the_empirical_fisher():
    problem = mlp()
    rows = jacobian(losses(problem), problem.params)
    window = SlidingFisher.from_rows(rows, damping=0.1)
    v = torch.randn(rows.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with EmpiricalFisher(lambda: losses(problem), problem.params) as E:
        assert close(window @ v, E @ v + 0.1 * v, 1e-10)
        assert close(E @ window.solve(v) + 0.1 * window.solve(v), v, 1e-10)


def test_parameters_in_low_precision_and_any_kernel_or_gradient_mode_work():
    problem = transformer()
    rows = jacobian(losses(problem), problem.params)
    v = torch.ones(rows.shape[1], dtype=torch.float64)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.no_grad():
        E = EmpiricalFisher(lambda: losses(problem), problem.params, "autograd")
        assert close(E @ v, rows.T @ (rows @ v) / len(rows), 1e-10)
    problem.module.to(torch.bfloat16)
    with Fisher(problem.logits, problem.params, samples=2) as A:
        assert (A @ v.bfloat16()).dtype == torch.bfloat16
        assert bool(torch.isfinite(A @ v.bfloat16()).all())


def test_refusals_say_what_is_wrong():
    problem = mlp()
    with pytest.raises(ValueError, match="reduction"):
        EmpiricalFisher(problem.loss, problem.params)
    with pytest.raises(ValueError, match=r"\(0,\)"):
        EmpiricalFisher(lambda: losses(problem)[:0], problem.params)
    with pytest.raises(ValueError, match="depend"):
        EmpiricalFisher(lambda: losses(problem).detach(), problem.params)
    with pytest.raises(ValueError, match="likelihood='poisson'"):
        Fisher(problem.logits, problem.params, "poisson")
    with pytest.raises(ValueError, match="samples=0"):
        Fisher(problem.logits, problem.params, samples=0)
    with pytest.raises(ValueError, match="last dimension"):
        Fisher(lambda: problem.logits().sum(), problem.params)
    with pytest.raises(FloatingPointError, match="logits"):
        Fisher(lambda: problem.logits() * torch.nan, problem.params, samples=1)
    with pytest.raises(ValueError, match="engine='jax'"):
        HessianResidual(problem.logits, problem.criterion, problem.params, "jax")
    with pytest.raises(ValueError, match="scalar"):
        HessianResidual(problem.logits, lambda z: z, problem.params)
    with EmpiricalFisher(lambda: losses(problem), problem.params) as E:
        with pytest.raises(ValueError, match="k=500"):
            top_eigenpairs(E, 500)
        with pytest.raises(ValueError, match=r"\(3,\)"):
            E @ torch.ones(3).double()


def test_products_that_are_not_finite_end_the_solvers():
    x = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    with EmpiricalFisher(lambda: x.log(), {"x": x}) as E:
        assert not torch.isfinite(E @ torch.ones(2).double()).all()
        with pytest.raises(FloatingPointError, match="not finite"):
            top_eigenpairs(E)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(3)
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False))
        self.scale = nn.Parameter(torch.ones(1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embed.weight
        self.blocks[1].norm.requires_grad_(False)


def test_blocks_by_layer_class_and_name():
    net = Net()
    everything = [name for name, p in net.named_parameters() if p.requires_grad]
    layers = parameter_blocks(net)
    assert sorted(n for names in layers.values() for n in names) == sorted(everything)
    assert layers["embed"] == ["embed.weight"]
    assert layers["head"] == ["head.bias"]  # the tied weight is the embedding's
    assert layers["blocks.0"] == ["blocks.0.scale"]
    assert "blocks.1.norm" not in layers  # frozen

    blocks = parameter_blocks(net, Block)
    assert list(blocks) == ["blocks.0", "blocks.1"]
    assert blocks["blocks.1"] == [n for n in everything if n.startswith("blocks.1.")]
    assert parameter_blocks(net, nn.Linear)["head"] == ["embed.weight", "head.bias"]
    assert list(parameter_blocks(net, nn.Linear)) == [
        "blocks.0.inner.0", "blocks.0.inner.1", "blocks.1.inner.0", "blocks.1.inner.1", "head",
    ]  # fmt: skip
    assert parameter_blocks(net, nn.Module) == {"": everything}

    assert parameter_blocks(net, r".*\.norm\.\w+") == {r".*\.norm\.\w+": ["blocks.0.norm.weight", "blocks.0.norm.bias"]}
    indexed = parameter_blocks(net, r"blocks\.(\d)\..*")
    assert indexed == {"0": blocks["blocks.0"], "1": blocks["blocks.1"]}
    assert parameter_blocks(net, r"(embed|head)\.(weight|bias)") == {
        "embed.weight": ["embed.weight"], "head.bias": ["head.bias"],
    }  # fmt: skip
    for nothing in (nn.Conv2d, "blocks"):
        with pytest.raises(ValueError, match="matches no trainable parameter of Net"):
            parameter_blocks(net, nothing)

"""Products with Fisher matrices: of the labels given, and of the labels the model itself would give."""

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from evolute.geometry.curvature.engines import EngineChoice
from evolute.geometry.curvature.gauss_newton import GaussNewton

Likelihood = Literal["categorical", "bernoulli", "gaussian"]


class EmpiricalFisher(GaussNewton):
    """Empirical Fisher matrix ``(1/n) sum_i g_i g_i^T``, ``g_i`` the gradient of the loss of sample ``i``.

    It is ``J^T J / n`` with ``J`` [n, P] the Jacobian of the losses, and no row of ``J`` is ever formed: a product is
    ``J v`` and then ``J^T (J v)``. Positive semi-definite, of rank at most n. The labels are those of the data, so it
    is neither the Fisher matrix (see ``Fisher``) nor, away from a perfect fit, an estimate of the Hessian.

    A sample is whatever has an entry of its own in ``losses``: for a language model the tokens, or the sequences if
    their tokens are averaged first. Leave entries out that count for nothing (``losses[mask]``): they would count in n.
    ``loss`` and ``gradient`` are those of the mean. Graphs and engines are those of ``GaussNewton``, and so is the
    price: 1.2 to 1.3 gradients a product (a transformer of 0.8M parameters on one CPU core, where a Hessian product
    took 1.9 to 2.1).

    Example::

        with EmpiricalFisher(lambda: F.cross_entropy(model(x), y, reduction="none"), params) as E:
            noise = top_eigenpairs(E, k=10).values

    Args:
        losses: returns the losses before reduction, one entry a sample, any shape but a scalar's.
        params: the parameters by name; those the losses do not use contribute zeros.
        engine: ``"auto"``, ``"autograd"`` or ``"finite_difference"``, as in ``Hessian``.

    Raises:
        ValueError: if ``losses`` returns a scalar or nothing, and as ``Hessian`` does.
        RuntimeError: as ``Hessian`` does.
    """

    def __init__(
        self, losses: Callable[[], Tensor], params: Mapping[str, Tensor], engine: EngineChoice = "auto"
    ) -> None:
        def rows() -> Tensor:
            values = losses()
            if values.ndim == 0 or values.numel() == 0:
                raise ValueError(
                    f'losses has shape {tuple(values.shape)}: one entry a sample is needed, use reduction="none"'
                )
            return values

        super().__init__(rows, _mean_of_squares, params, engine)


class Fisher(GaussNewton):
    """Fisher matrix ``(1/n) sum_i E_y[g_i(y) g_i(y)^T]``, the labels ``y`` drawn from the model's own prediction.

    By default exact: it is the Gauss-Newton matrix of the loss, whatever the labels (Martens, arXiv 1412.1193),
    and is computed as such, with ``loss`` the loss at the mean label and ``gradient`` zero up to rounding. With
    ``samples`` the expectation is replaced by that many labels, drawn once, at construction; the result is unbiased,
    positive semi-definite and of rank at most ``n * samples``. Further samples share the passes through the network:
    eight cost 4 % more than one where that was measured.

    The terms that are averaged are those of torch's losses with ``reduction="mean"``:

    ==============  =============================  =============================================
    likelihood      a term                         loss whose Gauss-Newton matrix this is
    ==============  =============================  =============================================
    categorical     a row of the last dimension    ``cross_entropy``
    bernoulli       an entry                       ``binary_cross_entropy_with_logits``
    gaussian        an entry, of unit variance     ``mse_loss / 2``
    ==============  =============================  =============================================

    Graphs, engines and price are those of ``GaussNewton`` and ``EmpiricalFisher``.

    Args:
        logits: returns the network's output, computed from the parameters as they are.
        params: the parameters by name; those the logits do not use contribute zeros.
        likelihood: the distribution that the output parametrises.
        samples: labels drawn for each term, or None for the expectation.
        generator: for the labels; by default a private one with a fixed seed. The global generator is never used.
        engine: ``"auto"``, ``"autograd"`` or ``"finite_difference"``, as in ``Hessian``.

    Raises:
        ValueError: if ``likelihood`` is unknown, ``samples`` is below 1, and as ``Hessian`` does.
        FloatingPointError: if labels are to be drawn from logits that are not finite.
        RuntimeError: as ``Hessian`` does.
    """

    def __init__(
        self,
        logits: Callable[[], Tensor],
        params: Mapping[str, Tensor],
        likelihood: Likelihood = "categorical",
        samples: int | None = None,
        generator: torch.Generator | None = None,
        engine: EngineChoice = "auto",
    ) -> None:
        if likelihood not in get_args(Likelihood):
            raise ValueError(f"likelihood={likelihood!r}: choose one of {', '.join(get_args(Likelihood))}")
        if samples is None:
            super().__init__(
                logits, lambda z: _losses(z, _mean_label(z, likelihood), likelihood).mean(), params, engine
            )
            return
        if samples < 1:
            raise ValueError(f"samples={samples}: must be at least 1, or None for the exact matrix")
        source = generator or torch.Generator().manual_seed(0)
        drawn: list[Tensor] = []  # once, so that all products are with one matrix, finite differences included

        def losses() -> Tensor:
            z = logits()
            if not drawn:
                drawn.extend(_labels(z.detach(), likelihood, samples, source))
            return torch.stack([_losses(z, labels, likelihood) for labels in drawn])

        super().__init__(losses, _mean_of_squares, params, engine)


def _mean_of_squares(losses: Tensor) -> Tensor:
    """Return the mean of ``losses``, with ``I / n`` as its second derivative in them, which makes ``G = J^T J / n``."""
    return losses.mean() + (losses - losses.detach()).square().mean() / 2


def _terms(z: Tensor, likelihood: Likelihood) -> Tensor:
    """Return ``z`` as [n, K] or [n], one row a term."""
    if likelihood != "categorical":
        return z.reshape(-1)
    if z.ndim == 0:
        raise ValueError("the logits are a scalar: a categorical likelihood needs the classes in the last dimension")
    return z.reshape(-1, z.shape[-1])


def _losses(z: Tensor, labels: Tensor, likelihood: Likelihood) -> Tensor:
    """Return the negative log-likelihood [n] of the terms, without constants."""
    z = _terms(z, likelihood)
    if likelihood == "categorical":
        return F.cross_entropy(z, labels, reduction="none")
    if likelihood == "bernoulli":
        return F.binary_cross_entropy_with_logits(z, labels, reduction="none")
    return (z - labels).square() / 2


def _mean_label(z: Tensor, likelihood: Likelihood) -> Tensor:
    """Return the label that the model expects; the loss's curvature in the logits is the same for all labels."""
    z = _terms(z.detach(), likelihood)
    if likelihood == "categorical":
        return z.softmax(dim=1)
    return z.sigmoid() if likelihood == "bernoulli" else z


def _labels(z: Tensor, likelihood: Likelihood, samples: int, source: torch.Generator) -> list[Tensor]:
    """Draw ``samples`` labels for every term: [n] each, class indices or values in the dtype of ``z``."""
    if not bool(torch.isfinite(z).all()):
        raise FloatingPointError("the logits are not finite: no labels can be drawn from them")
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    mean = _mean_label(wide, likelihood).to(source.device)
    if likelihood == "categorical":
        return list(torch.multinomial(mean, samples, replacement=True, generator=source).T.to(z.device))
    shape = (samples, len(mean))
    if likelihood == "bernoulli":
        drawn = torch.rand(shape, dtype=mean.dtype, device=mean.device, generator=source) < mean
    else:
        drawn = mean + torch.randn(shape, dtype=mean.dtype, device=mean.device, generator=source)
    return list(drawn.to(z.device, z.dtype))

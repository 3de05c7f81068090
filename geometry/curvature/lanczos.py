"""Extreme eigenpairs of a symmetric operator by band Lanczos, stopped on true residuals."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evolute.geometry.curvature.operator import SymmetricOperator

Which = Literal["magnitude", "largest", "smallest"]
_GROWTH = 16  # basis vectors allocated at a time


@dataclass(frozen=True)
class Eigenpairs:
    """What ``top_eigenpairs`` found, most extreme first.

    Attributes:
        values: [k], on the CPU, float64: descending ``|.|`` for "magnitude", descending for "largest", ascending for
            "smallest".
        vectors: [P, k], orthonormal, on the operator's device.
        residuals: [k], ``||H v - l v|| / |l|`` computed with one more product each; 0 where ``H v`` is exactly 0.
        products: products spent, those that verify included.
        converged: every residual is at most ``tol``, or at the rounding level of the operator (this alone can be
            asked of an eigenvalue that is zero).
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int
    converged: bool


def top_eigenpairs(
    H: SymmetricOperator,
    k: int = 1,
    tol: float = 1e-3,
    which: Which = "magnitude",
    max_products: int | None = None,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """Find the ``k`` most extreme eigenpairs of a symmetric operator.

    Lanczos in a band form (after Ruhe, Math. Comp. 33, 1979): some orthonormal vectors wait to be multiplied by ``H``;
    the one that the unconverged Ritz pairs leak into most goes first, and what is new in its product joins those that
    wait. One start vector gives plain Lanczos, several a block method. Every product is orthogonalised twice against
    the whole basis, so no ghost copies appear. When none waits (an invariant subspace) it goes on from a random
    orthogonal vector. It stops when the residual ``beta |s|`` of each wanted pair is within ``tol``, then verifies
    with true products and goes on if they disagree.

    A single Krylov space holds one vector of each eigenspace, so for ``k > 1`` a second look follows: half as many
    products again (at least 4), with a fresh random vector. If they reveal another copy it is converged too, and the
    look is repeated. Copies can still be missed, at random; in 60 matrices with double, triple and clustered
    tops none was.

    Args:
        H: anything with ``shape`` [P, P], ``dtype``, ``device`` and ``@``, dense tensors included; taken to be
            symmetric.
        k: pairs wanted.
        tol: bound on the relative residual of each.
        which: "magnitude" (largest ``|.|``), "largest" or "smallest" (algebraic).
        max_products: stop there, converged or not; by default ``max(200, 20 k)``. The basis holds as many vectors
            of P entries, in float32 or wider.
        start: [P] or [P, j], for example earlier eigenvectors. A start close to the answer needs 2 to 4 products. It
            follows the pair it is given: if another has overtaken it meanwhile, only a cold start tells.
        generator: for the random vectors; by default a private one with a fixed seed. The global generator is never
            used.

    Raises:
        ValueError: if ``H`` is not square, ``k`` is not in [1, P], ``tol`` is not positive, ``which`` is
            unknown, ``start`` has the wrong length, no finite values or only zeros, or ``max_products < k + 1``.
        FloatingPointError: if a product is not finite.
    """
    _validate(H, k, tol, which, start)
    limit = max(200, 20 * k) if max_products is None else max_products
    if limit < k + 1:
        raise ValueError(f"max_products={limit} cannot find and verify k={k} pairs: pass at least {k + 1}")
    space = _KrylovSpace(H, generator or torch.Generator().manual_seed(0))
    space.begin(start)
    goal = tol
    while True:
        values, weights = space.converge(k, which, goal, limit)
        while k > 1 and not space.exhausted(k, limit):
            space.look_again(k, limit)
            again, weights = space.converge(k, which, goal, limit)
            unchanged = np.abs(again - values) <= np.maximum(goal * np.abs(values), space.rounding())
            values = again
            if unchanged.all():
                break
        vectors = space.vectors(weights)
        residuals = space.residuals(vectors, values)
        converged = bool(np.all(residuals <= np.maximum(tol * np.abs(values), space.rounding())))
        if converged or space.exhausted(k, limit):
            break
        goal /= 2  # the estimate was too hopeful: ask more of it
        space.expand()
    relative = np.divide(residuals, np.abs(values), out=np.full(k, np.inf), where=values != 0)
    relative[residuals == 0] = 0.0
    return Eigenpairs(torch.from_numpy(values.copy()), vectors, torch.from_numpy(relative), space.products, converged)


class _KrylovSpace:
    """An orthonormal basis, the projection of the operator on it, and which basis vectors wait to be multiplied."""

    def __init__(self, H: SymmetricOperator, generator: torch.Generator) -> None:
        self.products = 0
        self._H = H
        self._size = H.shape[0]
        self._generator = generator
        # Narrow dtypes cannot hold an orthonormal basis; products are still made in the operator's own.
        self._wide = torch.promote_types(H.dtype, torch.float32)
        self._epsilon = torch.finfo(self._wide).eps
        self._rows = torch.empty(0, self._size, dtype=self._wide, device=H.device)  # the basis, one vector a row
        self._count = 0
        self._projected: NDArray[np.float64] = np.zeros((0, 0))  # [i, j] = <q_i, H q_j> for every j in done
        self._done: list[int] = []
        self._waiting: list[int] = []

    def begin(self, start: Tensor | None) -> None:
        """Take the orthonormalised start vectors, or a random one, as the first basis."""
        if start is not None:
            for column in start.detach().reshape(self._size, -1).to(self._rows).unbind(1):
                length = float(torch.linalg.vector_norm(column))
                _, rest, left = self._orthogonalised(column / length if length > 0 else column)
                if left > 100 * self._epsilon:  # zeros and repetitions add nothing
                    self._append(rest, left)
            if self._count == 0:
                raise ValueError("start holds only zeros: pass a non-zero vector, or None for a random one")
        else:
            self._append_random()

    def exhausted(self, k: int, limit: int) -> bool:
        """Tell whether nothing is left to multiply, or only enough products to verify ``k`` pairs."""
        return len(self._done) == self._size or self.products + k >= limit

    def converge(
        self, k: int, which: Which, goal: float, limit: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Expand until the wanted Ritz pairs meet ``goal``, or products run out; return values and weights."""
        while len(self._done) < k:
            self.expand()
        while True:
            values, weights, leaks = self._ritz(k, which)
            unmet = np.linalg.norm(leaks, axis=0) > np.maximum(goal * np.abs(values), self.rounding())
            if not unmet.any() or self.exhausted(k, limit):
                return values, weights
            # Multiply next what the pairs that are not there yet leak into most.
            self.expand(int(np.linalg.norm(leaks[:, unmet], axis=1).argmax()))

    def look_again(self, k: int, limit: int) -> None:
        """Expand half as many times as so far, from what waits and from a fresh random vector in turn.

        What waits must go on too: the fresh vector is orthogonal to it, so a copy hidden there would stay hidden.
        """
        extra = max(4, len(self._done) // 2)
        if self._count < self._size:
            self._append_random()
        for _ in range(extra):
            if self.exhausted(k, limit):
                return
            self.expand()

    def expand(self, position: int = 0) -> None:
        """Multiply a waiting vector; what is new in the product joins those that wait."""
        if not self._waiting:
            self._append_random()
            position = 0
        index = self._waiting.pop(position)
        product = self._multiply(self._rows[index])
        coefficients, rest, length = self._orthogonalised(product)
        self._projected[: self._count, index] = coefficients
        self._done.append(index)
        before = max(float(np.linalg.norm(coefficients)), self.rounding() / (10 * self._epsilon))
        if self._count < self._size and length > 10 * self._epsilon * before:
            self._append(rest, length)
            self._projected[self._count - 1, index] = length

    def rounding(self) -> float:
        """Return the level below which a residual is only rounding: 10 eps ``||H||``, as far as ``||H||`` is known."""
        return 10 * self._epsilon * float(np.abs(self._projected).max(initial=0.0))

    def vectors(self, weights: NDArray[np.float64]) -> Tensor:
        """Return the Ritz vectors [P, k] of the given weights on the multiplied vectors."""
        spread = np.zeros((self._count, weights.shape[1]))
        spread[self._done] = weights
        ritz = self._rows[: self._count].T @ torch.from_numpy(spread).to(self._rows)
        return ritz / torch.linalg.vector_norm(ritz, dim=0)

    def residuals(self, vectors: Tensor, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return ``||H v - l v||`` of each pair, from new products."""
        return np.array(
            [
                float(torch.linalg.vector_norm(self._multiply(v) - float(value) * v))
                for v, value in zip(vectors.unbind(1), values, strict=True)
            ]
        )

    def _ritz(self, k: int, which: Which) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Return the ``k`` wanted Ritz values, their weights [done, k], and ``H v - l v`` on the waiting vectors."""
        inner = self._projected[np.ix_(self._done, self._done)]
        values, weights = np.linalg.eigh((inner + inner.T) / 2)
        keys = {"magnitude": -np.abs(values), "largest": -values, "smallest": values}
        order = np.argsort(keys[which], kind="stable")[:k]
        leaks = self._projected[np.ix_(self._waiting, self._done)] @ weights[:, order]
        return values[order], weights[:, order], leaks

    def _multiply(self, v: Tensor) -> Tensor:
        self.products += 1
        product = (self._H @ v.to(self._H.dtype)).to(self._wide)
        if not bool(torch.isfinite(product).all()):
            bad = int((~torch.isfinite(product)).sum())
            raise FloatingPointError(
                f"product {self.products} with the operator has {bad} of {self._size} entries that are not finite: "
                "check the loss and the parameters at this point"
            )
        return product

    def _orthogonalised(self, v: Tensor) -> tuple[NDArray[np.float64], Tensor, float]:
        """Return the coefficients of ``v`` on the basis, what is left of it after two passes, and its length."""
        basis = self._rows[: self._count]
        total = torch.zeros(self._count, dtype=self._wide, device=v.device)
        rest = v
        for _ in range(2):
            coefficients = basis @ rest
            rest = rest - basis.T @ coefficients
            total += coefficients
        return total.double().cpu().numpy(), rest, float(torch.linalg.vector_norm(rest))

    def _append(self, rest: Tensor, length: float) -> None:
        """Add ``rest``, of norm ``length`` and orthogonal to the basis, to the basis and to those that wait."""
        if self._count == len(self._rows):
            self._rows = torch.cat([self._rows, self._rows.new_empty(_GROWTH, self._size)])
            self._projected = np.pad(self._projected, (0, _GROWTH))
        self._rows[self._count] = rest / length
        self._waiting.append(self._count)
        self._count += 1

    def _append_random(self) -> None:
        device = self._generator.device
        v = torch.randn(self._size, dtype=self._wide, device=device, generator=self._generator).to(self._rows.device)
        _, rest, length = self._orthogonalised(v)
        self._append(rest, length)


def _validate(H: SymmetricOperator, k: int, tol: float, which: str, start: Tensor | None) -> None:
    if len(H.shape) != 2 or H.shape[0] != H.shape[1]:
        raise ValueError(f"the operator must be square, got shape {tuple(H.shape)}")
    if not 1 <= k <= H.shape[0]:
        raise ValueError(f"k={k}: must be between 1 and the size of the operator, {H.shape[0]}")
    if not tol > 0:
        raise ValueError(f"tol={tol}: must be positive")
    if which not in ("magnitude", "largest", "smallest"):
        raise ValueError(f'which={which!r}: choose "magnitude", "largest" or "smallest"')
    if start is not None:
        if start.ndim not in (1, 2) or start.shape[0] != H.shape[0]:
            raise ValueError(f"start has shape {tuple(start.shape)}, expected [{H.shape[0]}] or [{H.shape[0]}, j]")
        if not bool(torch.isfinite(start).all()):
            raise ValueError("start is not finite: pass None for a random start")

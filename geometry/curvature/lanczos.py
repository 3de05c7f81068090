"""Extreme eigenpairs of a symmetric operator by band Lanczos with thick restarts, stopped on true residuals."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from evolute.geometry.curvature.krylov import Array, KrylovSpace
from evolute.geometry.curvature.operator import SymmetricOperator

Which = Literal["magnitude", "largest", "smallest"]
_FRESH = 4  # products from a fresh vector in search of copies; a quarter of all so far found no more of them


@dataclass(frozen=True)
class Eigenpairs:
    """What ``top_eigenpairs`` found, most extreme first.

    Attributes:
        values: [k], on the CPU, float64: descending ``|.|`` for "magnitude", descending for "largest", ascending for
            "smallest".
        vectors: [P, k], orthonormal, on the operator's device.
        residuals: [k], ``||H v - l v|| / |l|``; 0 where ``H v`` is exactly 0. They come from the products made, exact
            to rounding; in a dtype narrower than float32, from one more product each.
        products: products spent.
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
    basis: int | None = None,
) -> Eigenpairs:
    """Find the ``k`` most extreme eigenpairs of a symmetric operator.

    Lanczos in a band form (after Ruhe, Math. Comp. 33, 1979): some orthonormal vectors wait to be multiplied by ``H``;
    the one that the unconverged Ritz pairs leak into most goes first, and what is new in its product joins those that
    wait. One start vector gives plain Lanczos, several a block method. Every product is orthogonalised against the
    whole basis, so no ghost copies appear. When none waits (an invariant subspace) it goes on from a random orthogonal
    vector. When the basis is full it shrinks to the best Ritz vectors (thick restart, Wu and Simon, SIAM J. Matrix
    Anal. 22, 2000). It stops when the residual of each wanted pair is within ``tol``: the whole of ``H v - l v``, not
    the change of a value, and not the usual ``beta |s|``, which believes that the operator is symmetric.

    A single Krylov space holds one vector of each eigenspace, so for ``k > 1`` a second look of five products follows,
    four of them from a fresh random vector. If they reveal another copy it is converged too, and the look is repeated.
    Copies can still be missed, at random: 5 times in 900 searches with double, triple and clustered tops above a bulk;
    more often without a gap between them and the bulk.

    Args:
        H: anything with ``shape`` [P, P], ``dtype``, ``device`` and ``@``, dense tensors included; taken to be
            symmetric.
        k: pairs wanted.
        tol: bound on the relative residual of each.
        which: "magnitude" (largest ``|.|``), "largest" or "smallest" (algebraic).
        max_products: stop there, converged or not; by default ``max(200, 20 k)``.
        start: [P] or [P, j], for example earlier eigenvectors. A start close to the answer needs 1 to 3 products. It
            follows the pair it is given: if another has overtaken it meanwhile, only a cold start tells.
        generator: for the random vectors; by default a private one with a fixed seed. The global generator is never
            used.
        basis: vectors of P entries held at most, in float32 or wider, the result's own apart; by default
            ``2 k + 10``, at least 20. More need a few products less, and more time for orthogonalising.

    Raises:
        ValueError: if ``H`` is not square, ``k`` is not in [1, P], ``tol`` is not positive, ``which`` is
            unknown, ``start`` has the wrong length, no finite values or only zeros, ``max_products`` cannot suffice,
            or ``basis`` is below ``2 k + 4``, with more start vectors below ``k + 4`` plus their number.
        FloatingPointError: if a product is not finite.
    """
    _validate(H, k, tol, which, start)
    columns = [] if start is None else list(start.detach().reshape(H.shape[0], -1).unbind(1))
    smallest = k + 4 + max(k, len(columns))
    if basis is not None and basis < smallest:
        raise ValueError(f"basis={basis}: k={k} and {len(columns)} start vectors need at least {smallest}")
    limit = max(200, 20 * k) if max_products is None else max_products
    usual = min(max(2 * k + 10, 20), limit + 1)  # a product brings one vector at most
    capacity = min(max(usual, smallest) if basis is None else basis, H.shape[0])
    search = _Search(KrylovSpace(H, generator or torch.Generator().manual_seed(0), capacity), k, which, limit)
    # A basis vector rounded to a narrow dtype was not quite what was multiplied: only new products tell the residual.
    narrow = torch.finfo(H.dtype).bits < 32
    search.reserve = k if narrow else 0
    if limit < k + search.reserve:
        raise ValueError(f"max_products={limit} cannot suffice for k={k} pairs: pass at least {k + search.reserve}")
    search.begin(columns)
    goal = tol
    while True:
        values, weights = search.with_copies(goal)
        vectors = search.space.vectors(weights)
        if narrow:
            residuals = search.space.measured_residuals(vectors, values)
        else:
            residuals = search.space.residuals(values, weights)
        converged = bool(np.all(residuals <= np.maximum(tol * np.abs(values), search.space.rounding())))
        if converged or search.exhausted():
            break
        goal /= 2  # the estimate was too hopeful: ask more of it
        search.grow()
    relative = np.divide(residuals, np.abs(values), out=np.full(k, np.inf), where=values != 0)
    relative[residuals == 0] = 0.0
    return Eigenpairs(
        torch.from_numpy(values.copy()), vectors, torch.from_numpy(relative), search.space.products, converged
    )


class _Search:
    """Which vector of a Krylov space is multiplied next, and when it is enough."""

    def __init__(self, space: KrylovSpace, k: int, which: Which, limit: int) -> None:
        self.space = space
        self.reserve = 0  # products kept back
        self._k = k
        self._which = which
        self._limit = limit

    def begin(self, columns: list[Tensor]) -> None:
        """Take the start vectors, or a random one, as the first basis; zeros and repetitions add nothing."""
        for column in columns:
            self.space.append(column)
        if not columns:
            self.space.append_random()
        elif not self.space.waiting:
            raise ValueError("start holds only zeros: pass a non-zero vector, or None for a random one")

    def exhausted(self) -> bool:
        """Tell whether nothing is left to multiply, or no product to do it with."""
        return self.space.complete or self.space.products + self.reserve >= self._limit

    def with_copies(self, goal: float) -> tuple[Array, Array]:
        """Converge, then look for further copies of what was found until a look finds none."""
        values, weights = self._converge(goal)
        while self._k > 1 and not self.exhausted() and self._room() >= 5:
            self._look_again()
            again, weights = self._converge(goal)
            unchanged = np.abs(again - values) <= np.maximum(goal * np.abs(values), self.space.rounding())
            values = again
            if unchanged.all():
                break
        return values, weights

    def grow(self, position: int = 0) -> None:
        """Multiply a waiting vector, after making room for what its product brings."""
        if self.space.full:
            self._shrink()
        self.space.expand(position)

    def _converge(self, goal: float) -> tuple[Array, Array]:
        """Expand until the wanted Ritz pairs meet ``goal``, or products run out; return values and weights."""
        while len(self.space.done) < self._k:
            self.grow()
        while True:
            values, weights = self._best(self._k)
            residuals = self.space.residuals(values, weights)
            unmet = residuals > np.maximum(goal * np.abs(values), self.space.rounding())
            if not unmet.any() or self.exhausted():
                return values, weights
            # Multiply next what the pairs that are not there yet leak into most.
            leaks = np.linalg.norm(self.space.leaks(weights[:, unmet]), axis=1)
            self.grow(int(leaks.argmax()) if len(leaks) else 0)

    def _look_again(self) -> None:
        """Follow a fresh random vector for a few products, then what waited for one.

        The first finds copies, which no old vector leans towards; the second parts neighbours closer than the goal.
        """
        if self.space.full:
            self._shrink()
        self.space.append_random()
        for i in range(_FRESH + 1):
            if self.exhausted():
                return
            self.grow(len(self.space.waiting) - 1 if i < _FRESH else 0)

    def _best(self, count: int) -> tuple[Array, Array]:
        values, weights = self.space.ritz()
        keys = {"magnitude": -np.abs(values), "largest": -values, "smallest": values}
        order = np.argsort(keys[self._which], kind="stable")[:count]
        return values[order], weights[:, order]

    def _room(self) -> int:
        """Return the basis vectors left for more than the wanted pairs and what waits, after a restart."""
        return self.space.capacity - self._k - len(self.space.waiting)

    def _shrink(self) -> None:
        # Half of what is not wanted is kept too: dropping all of it would slow the convergence.
        self.space.restart(*self._best(self._k + self._room() // 2))


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

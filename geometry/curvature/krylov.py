"""A growing orthonormal basis and the projection of a symmetric operator on it: what all Lanczos methods here share."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evolute.geometry.curvature.operator import SymmetricOperator

Array = NDArray[np.float64]
_FEW = 8  # vectors taken away one by one; for more, a pass over the whole basis is no slower


class KrylovSpace:
    """An orthonormal basis, of which some vectors have been multiplied by the operator and some wait to be.

    Everything in a product lies in the span of the basis, because what is new in it joins the basis and waits. So ``H Q
    s = Q (projected s)`` for any ``s`` on the multiplied vectors, and the residual of a Ritz pair follows, to rounding,
    from the products already made. Nothing of this assumes that the operator is symmetric; where it is not, the
    residuals show it.

    Args:
        H: the operator, [P, P].
        generator: for random vectors.
        capacity: basis vectors of P entries held at most, in float32 or wider.
    """

    def __init__(self, H: SymmetricOperator, generator: torch.Generator, capacity: int) -> None:
        self.products = 0
        self.capacity = capacity
        self.done: list[int] = []
        self.waiting: list[int] = []
        self._H = H
        self._size = H.shape[0]
        self._generator = generator
        # Narrow dtypes cannot hold an orthonormal basis; products are still made in the operator's own.
        self._wide = torch.promote_types(H.dtype, torch.float32)
        self._epsilon = torch.finfo(self._wide).eps
        self._rows = torch.empty(capacity, self._size, dtype=self._wide, device=H.device)  # one basis vector a row
        self._count = 0
        self._projected: Array = np.zeros((capacity, capacity))  # [i, j] = <q_i, H q_j> for every j in done
        self._lost: Array = np.zeros(capacity)  # what a restart dropped from H q_j: rounding, if H is symmetric

    @property
    def complete(self) -> bool:
        """Whether the basis spans the whole space and all of it has been multiplied."""
        return len(self.done) == self._size

    @property
    def full(self) -> bool:
        """Whether the basis may have no room for what a product brings."""
        return self._count == self.capacity < self._size

    def clear(self) -> None:
        """Empty the basis; its memory serves again."""
        self.done, self.waiting = [], []
        self._count = 0
        self._projected[:] = 0.0
        self._lost[:] = 0.0

    def append(self, v: Tensor) -> bool:
        """Let the part of ``v`` [P] that the basis does not span wait; return False if there is none."""
        v = v.detach().to(self._rows)
        length = float(torch.linalg.vector_norm(v))
        if length == 0:
            return False
        _, rest, left = self._orthogonalised(v / length)
        if left <= 100 * self._epsilon:
            return False
        self._append(rest, left)
        return True

    def append_random(self) -> None:
        """Let a random vector wait."""
        device = self._generator.device
        self.append(torch.randn(self._size, dtype=self._wide, device=device, generator=self._generator))

    def expand(self, position: int = 0) -> None:
        """Multiply a waiting vector, a random one if there is none; what is new in the product joins the others."""
        if not self.waiting:
            self.append_random()
            position = 0
        index = self.waiting.pop(position)
        product = self.multiply(self._rows[index])
        # All that H q can hold, if H is symmetric: q, what waits, and the vectors in whose products q was found.
        near = [index, *self.waiting, *np.flatnonzero(self._projected[index]).tolist()]
        coefficients, rest, length = self._orthogonalised(product, near)
        self._projected[: self._count, index] = coefficients
        self.done.append(index)
        before = max(float(np.linalg.norm(coefficients)), self.rounding() / (10 * self._epsilon))
        if self._count < self._size and length > 10 * self._epsilon * before:
            self._append(rest, length)
            self._projected[self._count - 1, index] = length

    def ritz(self) -> tuple[Array, Array]:
        """Return all Ritz values, ascending, and their weights [done, done] on the multiplied vectors."""
        inner = self._projected[np.ix_(self.done, self.done)]
        values, weights = np.linalg.eigh((inner + inner.T) / 2)
        return values, weights

    def leaks(self, weights: Array) -> Array:
        """Return ``H y`` on the waiting vectors, [waiting, k], for Ritz vectors of the given weights."""
        return self._projected[np.ix_(self.waiting, self.done)] @ weights

    def residuals(self, values: Array, weights: Array) -> Array:
        """Return ``||H y - l y||`` of Ritz pairs [k], from the products already made."""
        return np.linalg.norm(self._difference(values, weights), axis=0) + self._lost[self.done] @ np.abs(weights)

    def measured_residuals(self, vectors: Tensor, values: Array) -> Array:
        """Return ``||H v - l v||`` of each pair, from new products."""
        return np.array(
            [
                float(torch.linalg.vector_norm(self.multiply(v) - float(value) * v))
                for v, value in zip(vectors.unbind(1), values, strict=True)
            ]
        )

    def vectors(self, weights: Array) -> Tensor:
        """Return the Ritz vectors [P, k] of the given weights."""
        spread = np.zeros((self._count, weights.shape[1]))
        spread[self.done] = weights
        ritz = torch.from_numpy(spread.T.copy()).to(self._rows) @ self._rows[: self._count]
        return ritz.div_(torch.linalg.vector_norm(ritz, dim=1, keepdim=True)).T

    def restart(self, values: Array, weights: Array) -> None:
        """Shrink the basis to the Ritz vectors of these pairs, and what waits (thick restart, Wu and Simon 2000)."""
        k, waiting = len(values), len(self.waiting)
        leaks = self.leaks(weights)
        dropped = self._difference(values, weights)
        dropped[self.waiting] = 0.0
        lost = np.linalg.norm(dropped, axis=0) + self._lost[self.done] @ np.abs(weights)
        change = np.zeros((self._count, k + waiting))
        change[self.done, :k] = weights
        change[self.waiting, np.arange(k, k + waiting)] = 1.0
        self._rotate(change)
        self._count = k + waiting
        self.done, self.waiting = list(range(k)), list(range(k, k + waiting))
        self._projected[:] = 0.0
        self._projected[:k, :k] = np.diag(values)
        self._projected[k : k + waiting, :k] = leaks
        self._lost[:] = 0.0
        self._lost[:k] = np.where(lost > self.rounding(), lost, 0.0)

    def rounding(self) -> float:
        """Return the level below which a residual is only rounding: 10 eps ``||H||``, as far as ``||H||`` is known."""
        return 10 * self._epsilon * float(np.abs(self._projected).max(initial=0.0))

    def multiply(self, v: Tensor) -> Tensor:
        """Return ``H v`` in the wide dtype.

        Raises:
            FloatingPointError: if it is not finite.
        """
        self.products += 1
        product = (self._H @ v.to(self._H.dtype)).to(self._wide)
        # The norm is cheap and rarely overflows; only then are the entries looked at.
        if not bool(torch.isfinite(torch.linalg.vector_norm(product))) and (bad := int((~product.isfinite()).sum())):
            raise FloatingPointError(
                f"product {self.products} with the operator has {bad} of {self._size} entries that are not finite: "
                "check the loss and the parameters at this point"
            )
        return product

    def _difference(self, values: Array, weights: Array) -> Array:
        """Return ``H y - l y`` of Ritz pairs, on the basis [count, k]."""
        difference = self._projected[: self._count, self.done] @ weights
        difference[self.done] -= weights * values
        return difference

    def _rotate(self, change: Array) -> None:
        """Replace the basis by its combinations ``change`` [count, kept], in place, a slice of entries at a time."""
        turn = torch.from_numpy(change.T.copy()).to(self._rows)
        for begin in range(0, self._size, 1 << 14):
            part = self._rows[:, begin : begin + (1 << 14)]
            part[: len(turn)] = turn @ part[: self._count]

    def _orthogonalised(self, v: Tensor, near: list[int] | None = None) -> tuple[Array, Tensor, float]:
        """Return the coefficients of ``v`` on the basis, what is left of it, and its length.

        One pass over ``near``, where all of ``v`` but rounding should lie, if it is short; then passes over the whole
        basis, until one takes little away. Large parts must go first: the errors a pass leaves are in proportion.
        """
        basis = self._rows[: self._count]
        total = torch.zeros(self._count, dtype=self._wide, device=v.device)
        rest = v
        for i in near if near is not None and len(near) <= _FEW else ():
            coefficient = basis[i] @ rest
            rest = torch.addcmul(rest, basis[i], coefficient, value=-1)
            total[i] += coefficient
        length = float(torch.linalg.vector_norm(rest))
        for _ in range(3):
            before = length
            coefficients = basis @ rest
            rest = torch.addmv(rest, basis.T, coefficients, alpha=-1)
            total += coefficients
            length = float(torch.linalg.vector_norm(rest))
            if length > 0.5 * before or length == 0:
                break
        return total.double().cpu().numpy(), rest, length

    def _append(self, rest: Tensor, length: float) -> None:
        """Add ``rest``, of norm ``length`` and orthogonal to the basis, to the basis and to those that wait."""
        torch.div(rest, length, out=self._rows[self._count])
        self.waiting.append(self._count)
        self._count += 1

"""The part every curvature operator shares: flat vectors, the check for moved parameters, blocks, closing."""

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor

from evolute.geometry.curvature.engines import Engine

# Width in bytes of a parameter's dtype -> the integer dtype that shows its bits.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class SymmetricOperator(Protocol):
    """What the solvers of this package ask of an operator; a dense symmetric tensor satisfies it."""

    @property
    def shape(self) -> torch.Size:
        """``(P, P)``."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of its products."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its products are."""
        ...

    def __matmul__(self, other: Tensor, /) -> Tensor: ...


class Point:
    """The parameters an operator was built at, and the means to notice that they have moved since.

    Two independent signs are compared: the version counters, which all ordinary in-place operations bump, and the sum
    of each tensor's bit patterns read as integers, which also sees writes that bump nothing (fused optimizers, writes
    through ``.data``). Every change that bumps a counter is noticed. One that does not is missed only if, in every
    tensor, the integer changes cancel to exactly zero, as when two entries swap places. Unlike a norm, the sum sees
    steps at right angles to the weights and of the last bit. It costs one read of the parameters and one host transfer.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        if not params:
            raise ValueError("params is empty: pass at least one named parameter")
        self.params = dict(params)
        names: dict[int, str] = {}
        for name, p in self.params.items():
            if not p.requires_grad:
                raise ValueError(f"parameter {name!r} does not require gradients: leave it out of params")
            if not p.is_floating_point():
                raise ValueError(f"parameter {name!r} has dtype {p.dtype}: only real floating point can be measured")
            if id(p) in names:
                raise ValueError(f"{name!r} and {names[id(p)]!r} are the same tensor: keep one name per tied parameter")
            names[id(p)] = name
        self.tensors = list(self.params.values())
        self._versions = [p._version for p in self.tensors]
        self._sums = self._bit_sums()

    def require_unmoved(self) -> None:
        """Raise RuntimeError, naming the first few, if parameters moved since construction."""
        versions = [p._version for p in self.tensors]
        sums = self._bit_sums()
        if versions == self._versions and sums == self._sums:
            return
        moved = [
            name for i, name in enumerate(self.params) if versions[i] != self._versions[i] or sums[i] != self._sums[i]
        ]
        shown = ", ".join(moved[:3]) + (", ..." if len(moved) > 3 else "")
        raise RuntimeError(
            f"{len(moved)} of {len(self.params)} parameters moved since this operator was built ({shown}): "
            "its graph describes the old point. Build a new operator after each step."
        )

    def _bit_sums(self) -> list[int]:
        sums = [p.detach().view(_BITS[p.element_size()]).sum(dtype=torch.int64) for p in self.tensors]
        if len({s.device for s in sums}) == 1:
            return torch.stack(sums).tolist()
        return [int(s) for s in sums]


class CurvatureOperator:
    """A symmetric matrix over the flattened parameters that is known only through its products.

    ``operator @ v`` takes ``v`` of shape [P] or [P, k], in the order of ``params``, each parameter flattened row-major,
    and returns the same shape. Products return what the arithmetic returns: non-finite numbers are the caller's to
    check.

    Attributes:
        params: the parameters, by name, in the order of the flat vectors.
        products: products with single vectors made so far.
    """

    def __init__(self, point: Point, engine: Engine, names: Iterable[str] | None = None) -> None:
        self._point = point
        self._engine: Engine | None = engine
        order = {name: i for i, name in enumerate(point.params)}
        chosen = list(order) if names is None else list(names)
        if unknown := [name for name in chosen if name not in order]:
            raise ValueError(f"no parameter named {unknown[0]!r} in this operator; it has {', '.join(order)}")
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"a block needs at least one name, each once; got {chosen}")
        self.params = {name: point.params[name] for name in chosen}
        self.products = 0
        self._wanted = [order[name] for name in chosen]
        self._shapes = [p.shape for p in self.params.values()]
        self._sizes = [p.numel() for p in self.params.values()]
        self._dtypes = [p.dtype for p in self.params.values()]
        self._dtype = self._dtypes[0]
        for dtype in self._dtypes:
            self._dtype = torch.promote_types(self._dtype, dtype)
        self._devices = [p.device for p in self.params.values()]

    @property
    def shape(self) -> torch.Size:
        """``(P, P)``, P the number of parameter entries."""
        return torch.Size((sum(self._sizes),) * 2)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of products: the widest among the parameters."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Device of products: that of the first parameter."""
        return self._devices[0]

    @property
    def engine(self) -> str:
        """Name of the engine in use."""
        return self._open().name

    @property
    def loss(self) -> Tensor:
        """Value of the loss at the point, a detached scalar."""
        return self._open().loss

    @property
    def gradient(self) -> Tensor:
        """Gradient of the loss at the point, flat [P], at no further cost."""
        gradients = self._open().gradients
        return self.flatten([gradients[i] for i in self._wanted])

    def block(self, names: Iterable[str]) -> "CurvatureOperator":
        """Return the diagonal block of some parameters, as an operator on the same graph.

        It counts its own products and lives as long as this operator is open.

        Raises:
            ValueError: if a name is unknown or repeated, or there is none.
        """
        return CurvatureOperator(self._point, _Borrowed(self), names)

    def flatten(self, parts: Sequence[Tensor | None]) -> Tensor:
        """Join one tensor (or None for zeros) per parameter into a flat [P] vector."""
        flat = [
            torch.zeros(size, dtype=self.dtype, device=self.device)
            if part is None
            else part.detach().reshape(-1).to(self.device, self.dtype)
            for part, size in zip(parts, self._sizes, strict=True)
        ]
        return torch.cat(flat)

    def unflatten(self, v: Tensor) -> list[Tensor]:
        """Split a flat [P] vector into tensors of the parameters' shapes, dtypes and devices."""
        parts = v.detach().split(self._sizes)
        return [
            part.view(shape).to(device, dtype)
            for part, shape, device, dtype in zip(parts, self._shapes, self._devices, self._dtypes, strict=True)
        ]

    def __matmul__(self, v: Tensor, /) -> Tensor:
        if v.ndim not in (1, 2) or v.shape[0] != self.shape[0]:
            raise ValueError(f"cannot multiply: operator {tuple(self.shape)}, vector {tuple(v.shape)}")
        if v.ndim == 2:
            columns = [self @ column for column in v.unbind(1)]
            return torch.stack(columns, dim=1) if columns else torch.empty_like(v)
        engine = self._open()
        self._point.require_unmoved()
        self.products += 1
        return self.flatten(engine.product(self._wanted, self.unflatten(v.contiguous())))

    def close(self) -> None:
        """Free the graph; products then raise. Calling it again does nothing."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _open(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("this operator is closed: its graph has been freed")
        return self._engine

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Borrowed:
    """The engine of another operator, which closes it; a block sees its fallback and its closing."""

    def __init__(self, owner: CurvatureOperator) -> None:
        self._owner = owner

    @property
    def name(self) -> str:
        return self._owner._open().name

    @property
    def loss(self) -> Tensor:
        return self._owner._open().loss

    @property
    def gradients(self) -> Sequence[Tensor]:
        return self._owner._open().gradients

    def product(self, wanted: Sequence[int], parts: Sequence[Tensor]) -> Sequence[Tensor | None]:
        return self._owner._open().product(wanted, parts)

    def close(self) -> None:
        pass

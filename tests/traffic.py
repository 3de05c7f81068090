"""What a callback costs: bytes sent, counted; bytes held, counted; and what that comes to for a large model."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional
from torch.distributed import distributed_c10d as c10d
from torch.distributed.tensor import DTensor

from evolute.callbacks.access import shared_out, steps

# By kind: the position of the argument that holds the whole (before or after the call), and the functions.
_KINDS: dict[str, tuple[int, tuple[str, ...]]] = {
    "all_reduce": (0, ("all_reduce",)),
    "all_gather": (0, ("all_gather", "all_gather_single", "all_gather_into_tensor", "_all_gather_base")),
    "reduce_scatter": (1, ("reduce_scatter", "reduce_scatter_single", "reduce_scatter_tensor", "_reduce_scatter_base")),
    "all_to_all": (1, ("all_to_all", "all_to_all_single")),
    "broadcast": (0, ("broadcast",)),
    "rooted": (0, ("reduce", "gather", "scatter")),
}


class Counters:
    """Bytes and calls of each kind of collective since :meth:`install`.

    The size of a call is that of the tensor that is whole before or after it; of an all-to-all, what this rank sends.
    """

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._inside = False  # one collective may be built on another

    def install(self) -> None:
        """Wrap the collectives of this process, for good: before any library has taken hold of them."""
        for kind, (position, names) in _KINDS.items():
            for name in names:
                if hasattr(c10d, name):
                    counted = self._counting(kind, getattr(c10d, name), position)
                    for module in (dist, c10d):
                        setattr(module, name, counted)
        for name in ("all_gather_single", "all_gather_tensor"):  # those of DTensors give the result
            if hasattr(functional, name):
                setattr(functional, name, self._counting("all_gather", getattr(functional, name), None))

    def _counting(self, kind: str, function: Callable[..., Any], position: int | None) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside = True
            try:
                result = function(*args, **kwargs)
            finally:
                self._inside = False
            whole = result if position is None else [*args, *kwargs.values()][position]
            tensors = [whole] if isinstance(whole, Tensor) else whole
            self.calls[kind] += 1
            self.bytes[kind] += sum(t.numel() * t.element_size() for t in tensors)
            return result

        return counted


def held_by(callback: Callback, module: nn.Module, trainer: L.Trainer) -> int:
    """Return the bytes of tensors that a callback, and what it uses of ``access``, keep beside the run's own."""
    owned = {_storage(t) for p in (*module.parameters(), *module.buffers()) for t in (p, p.grad) if t is not None}
    found: dict[int, int] = {}
    seen: set[int] = set()
    stack: list[Any] = [callback, steps._doors.get(trainer)]
    while stack:
        thing = stack.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            if _storage(thing) not in owned:
                found[_storage(thing)] = _local(thing).untyped_storage().nbytes()
        elif isinstance(thing, Mapping):
            stack.extend(thing.values())
        elif isinstance(thing, list | tuple | set):
            stack.extend(thing)
        elif type(thing).__module__.startswith("evolute."):
            stack.extend(vars(thing).values())
    return sum(found.values())


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def _storage(t: Tensor) -> int:
    return _local(t).untyped_storage().data_ptr()


# A Llama of 7B on 8 nodes of 8 GPUs. What the page assumes, it says in words.
NODES, GPUS, SEQUENCE, MICRO, TOKENS = 8, 64, 2048, 4, 2048 * 2048
LINK = 400e9 / 8  # bytes a second into and out of a node
LATENCY = 50e-6
SPEED = 0.4 * 312e12  # operations a second of one GPU
MATRICES = {"attention": ((4096, 4096), 4 * 32), "mlp": ((11008, 4096), 3 * 32)}
SIZES = {"P": 6_738_415_616, "L": 291, "N": GPUS, "m": 12, "r": 0, "b": 2 * 8 * SEQUENCE}
EVERY = {
    'LayerMonitor(noise="consecutive")': 25,
    "NoiseAdaptiveLR()": 1,
    "StepRadius()": 25,
    'StepRadius(mode="clip")': 1,
    "CurvatureMonitor()": 150,
}


def predictions(traffic: Sequence[Any], memory: Sequence[Any]) -> list[str]:
    """Return the lines of the page's table of predictions, from the formulas of its other two."""
    step = 6 * SIZES["P"] * TOKENS / (GPUS * SPEED)
    held = {(row.callback, row.strategy): row.formulas["held"] for row in memory}
    lines: list[str] = []
    for row in traffic:
        if row.callback not in EVERY or row.strategy not in ("ZeRO-2", "ZeRO-3", "FSDP2"):
            continue
        values = {**SIZES, "s": (MICRO if "clip" in row.callback else 1) * SEQUENCE}
        size = {key: eval(formula, values) for key, formula in row.formulas.items()}
        away = 1 - 1 / NODES
        sent = (2 * size["all_reduce"] + size["all_gather"] + size["all_to_all"] * GPUS / NODES) * away / LINK
        sent += size["calls"] * LATENCY
        computed = _arithmetic(row.callback, values) / SPEED
        every = EVERY[row.callback]
        kept = eval(held[row.callback, row.strategy], values) / 1e9
        share = 100 * (sent + computed) / (every * step)
        cells = (f"`{row.callback}`", row.strategy, every, f"{sent:.2g}", f"{computed:.2g}", f"{share:.2g} %")
        lines.append(f"| {' | '.join(map(str, cells))} | {kept:.2g} |")
    return lines


def _arithmetic(constructor: str, values: Mapping[str, int]) -> float:
    """Return the operations of one measurement on the busiest GPU; those that go over each entry once are left out."""
    forward = 2 * values["P"] * values["s"]
    if constructor.startswith("StepRadius"):
        return 2 * forward
    if constructor.startswith("CurvatureMonitor"):
        return 3 * forward * (2 + 2 * values["m"])
    if constructor.startswith("NoiseAdaptiveLR"):
        costs = {
            f"{kind}{i}": 5.0 * (4 * min(shape) ** 2 * max(shape) + 2 * min(shape) ** 3)
            for kind, (shape, count) in MATRICES.items()
            for i in range(count)
        }
        owner = shared_out(costs, values["N"])
        return max(sum(costs[n] for n, rank in owner.items() if rank == r) for r in range(values["N"]))
    return 0.0

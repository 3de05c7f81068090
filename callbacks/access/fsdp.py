"""FSDP2 (``fully_shard`` under Lightning's ``ModelParallelStrategy``): parameters, gradients and moments are DTensors.

A DTensor is the parameter itself, so the optimizer's hooks and groups work as in one process; what differs is that each
rank holds a shard of every tensor. Gradients are reduced after every micro-batch, in shards.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer
from typing_extensions import override

from evolute.callbacks.access.backend import Capabilities, Parts, PlainBackend, named_parameters, norms_of
from evolute.callbacks.access.shares import sent_to_owners
from evolute.callbacks.access.untouched import without_hooks_of


class FSDPBackend(PlainBackend):
    """FSDP2: every rank holds one shard of each parameter, of its gradient and of its optimizer state.

    Parts are the rank's own shards, flattened. A probe differentiates a gathered copy of the weights, with FSDP's hooks
    off.

    Raises:
        MisconfigurationException: under tensor parallelism, or if a trainable parameter is not sharded once over all
            ranks. Layers are sharded after ``setup``, so this is known only in ``on_fit_start``.
    """

    capabilities = Capabilities(local_gradients=False, double_backward=False)

    def __init__(self, trainer: L.Trainer, who: str) -> None:
        super().__init__(trainer)
        strategy = cast(ModelParallelStrategy, trainer.strategy)
        if strategy.device_mesh["tensor_parallel"].size() > 1:
            raise MisconfigurationException(
                f"{who} does not support tensor parallelism: use ModelParallelStrategy(data_parallel_size="
                f"{trainer.world_size}, tensor_parallel_size=1) and shard with torch.distributed.fsdp.fully_shard"
            )
        if strategy.optimizers:
            for name, p in named_parameters(trainer.lightning_module).items():
                _refuse_unsharded(name, p, who, trainer.world_size)

    @override
    def _gradients(self, params: Mapping[str, Tensor], scaled: bool) -> Parts:
        return _shards(super()._gradients(params, scaled))

    @override
    def accumulated(self, params: Mapping[str, Tensor]) -> Parts:
        """Return copies of this rank's shards: they are reduced already."""
        return {name: g.clone() for name, g in self._gradients(params, scaled=True).items()}

    @override
    def weights(self, params: Mapping[str, Tensor]) -> Parts:
        """Return this rank's shards of the parameters."""
        return _shards({name: p.detach() for name, p in params.items()})

    @override
    def norms(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return norms of the whole tensors: squares of the shards, summed over ranks in one small all-reduce."""
        return self.sums(norms_of(list(parts.values())).square()).sqrt()

    @override
    def sums(self, value: Tensor) -> Tensor:
        """Return the sum over ranks."""
        total = value.clone()
        if total.numel():
            dist.all_reduce(total)
        return total

    @override
    def whole(self, params: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors, in one all-gather each."""
        return {name: _like(part, params[name]).full_tensor() for name, part in parts.items()}

    @override
    def shared(
        self, params: Mapping[str, Tensor], parts: Mapping[str, Tensor], owner: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """Return this rank's tensors, whole."""
        found: dict[str, Tensor] = {}
        for name, pieces in sent_to_owners(parts, owner).items():
            p = params[name]
            dim = _dim(p)
            rest = (*p.shape[:dim], -1, *p.shape[dim + 1 :])
            found[name] = torch.cat([piece.view(rest) for piece in pieces if piece.numel()], dim)
        return found

    @override
    def part(self, params: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> Parts:
        """Return this rank's shards of whole tensors."""
        found: Parts = {}
        for name, tensor in whole.items():
            if name in params:
                p = cast(DTensor, params[name])
                shards = tensor.to(p.device).chunk(p.device_mesh.size(), _dim(p))
                mine = p.device_mesh.get_local_rank()
                found[name] = shards[mine].flatten().clone() if mine < len(shards) else tensor.new_empty(0)
        return found

    @override
    @contextmanager
    def unsharded(self, module: nn.Module) -> Generator[dict[str, Tensor]]:
        """Give gathered weights, out of reach of FSDP's hooks."""
        weights = {name: _full(p.detach()) for name, p in module.named_parameters()}
        with without_hooks_of("torch.distributed.fsdp", module):
            yield weights

    @override
    def optimizer_state(self, optimizer: Optimizer, param: Tensor) -> Mapping[str, Any]:
        """Return the optimizer's state of one parameter, gathered from all ranks."""
        state = super().optimizer_state(optimizer, param)
        return {key: _full(v) if isinstance(v, Tensor) else v for key, v in state.items()}


def _dim(p: Tensor) -> int:
    """Return the dimension along which a parameter is sharded."""
    (placement,) = cast(DTensor, p).placements
    assert isinstance(placement, Shard)
    return placement.dim


def _shards(tensors: Mapping[str, Tensor]) -> Parts:
    """Return this rank's shards, flat: views, so that what is written to them reaches the parameter."""
    return {name: cast(DTensor, t).to_local().view(-1) for name, t in tensors.items()}


def _like(part: Tensor, p: Tensor) -> DTensor:
    """Return a flat shard as a DTensor laid out as the parameter."""
    assert isinstance(p, DTensor)
    local = part.view(p.to_local().shape)
    return DTensor.from_local(local, p.device_mesh, p.placements, shape=p.shape, stride=p.stride(), run_check=False)


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _refuse_unsharded(name: str, p: Tensor, who: str, ranks: int) -> None:
    if isinstance(p, DTensor) and p.device_mesh.size() == ranks and [q.is_shard() for q in p.placements] == [True]:
        return
    found = f"laid out as {p.placements} on {p.device_mesh}" if isinstance(p, DTensor) else "not sharded"
    raise MisconfigurationException(
        f"{who}: parameter {name} is {found}, and is supported sharded once over all {ranks} processes: in "
        'configure_model call torch.distributed.fsdp.fully_shard(module, mesh=self.device_mesh["data_parallel"]) on a '
        "module that holds it"
    )

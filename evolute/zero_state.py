"""Put an ordinary checkpoint, or one of another ZeRO stage or number of processes, into a DeepSpeed engine."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.serialization import safe_globals

from evolute.callbacks.access import base_optimizer
from evolute.callbacks.access.zero import ZeroBackend


def restore(strategy: DeepSpeedStrategy, content: Mapping[str, Any]) -> None:
    """Give the engine the weights of a checkpoint and, in training, its optimizer the masters and moments.

    Call it on every rank. Every rank holds the whole checkpoint meanwhile: for a model that does not fit into the
    memory of one process, resume with the stage and the number of processes that wrote the checkpoint.

    Args:
        strategy: set up, with its engine.
        content: a checkpoint as :func:`evolute.callbacks.zero_checkpoint.load_checkpoint` returns it.

    Raises:
        MisconfigurationException: if the optimizer is not the one the checkpoint was written with.
    """
    module = strategy.lightning_module
    assert module is not None
    state_dict = content["state_dict"]
    if strategy.zero_stage_3:
        strategy._restore_zero_state(content, strict=module.strict_loading)
    else:
        module.load_state_dict(state_dict, strict=module.strict_loading)
    if module.trainer.state.fn != TrainerFn.FITTING:
        return
    backend = ZeroBackend(module.trainer, type(strategy).__name__)
    zero: Any = strategy.optimizers[0]
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    _write(backend.weights(params), backend.part(params, {name: state_dict[name].float() for name in params}))
    backend.publish(zero)
    states = content.get("optimizer_states")
    if not states:
        rank_zero_warn("the checkpoint has no state of an optimizer: its moments begin at zero")
        return
    _restore_optimizer(backend, zero, params, states[0])


def _restore_optimizer(backend: ZeroBackend, zero: Any, params: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    optimizer = base_optimizer(zero)
    groups = backend.groups(zero)
    sizes = [len(members) for _, members in groups]
    if sizes != [len(group["params"]) for group in saved["param_groups"]]:
        raise MisconfigurationException(
            f"the checkpoint was written with another optimizer: groups of "
            f"{[len(group['params']) for group in saved['param_groups']]} parameters, here of {sizes}"
        )
    names = {p: name for name, p in params.items()}
    for (group, members), old in zip(groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in old.items() if key != "params"})
        for p, number in zip(members, old["params"], strict=True):
            piece = backend._piece(p)
            state = optimizer.state[piece.flat]
            for key, value in saved["state"].get(number, {}).items():
                if isinstance(value, Tensor) and value.ndim:
                    flat = state.setdefault(key, torch.zeros_like(piece.flat))
                    _write({key: piece.of(flat)}, backend.part({names[p]: p}, {names[p]: value}))
                else:
                    state[key] = value.clone() if isinstance(value, Tensor) else value


def _write(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for target, value in zip(into.values(), values.values(), strict=True):
            target.copy_(value)


@contextmanager
def weights_only(engine: Any) -> Generator[None]:
    """Let a DeepSpeed engine unpickle nothing but tensors, plain data and what it writes itself."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def load(path: str, map_location: Any = None) -> Any:
        with safe_globals([fragment_address, LossScaler, DynamicLossScaler, ZeroStageEnum]):
            return torch.load(path, map_location=map_location, weights_only=True)

    engine.checkpoint_engine.load = load
    try:
        yield
    finally:
        del engine.checkpoint_engine.load

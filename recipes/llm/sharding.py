"""What a Hugging Face model and its optimizer need to know of the strategy that shards them."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn


def refuse_whole_matrices(trainer: L.Trainer, optimizer: str) -> None:
    """Refuse an optimizer that steps whole matrices under a strategy that hands it pieces.

    Raises:
        MisconfigurationException: saying what to use instead.
    """
    if isinstance(trainer.strategy, DeepSpeedStrategy | ModelParallelStrategy):
        raise MisconfigurationException(
            f"optimizer={optimizer!r} steps whole matrices, and {type(trainer.strategy).__name__} gives each process "
            "pieces of them: use --model.init_args.optimizer adamw --model.init_args.lr 3.0e-3 or --config strategy/ddp"
        )


@contextmanager
def born_in_pieces(trainer: L.Trainer | None) -> Generator[None]:
    """Build or load a model of transformers right under ZeRO stage 3, which takes its parameters away as they are made.

    Without this, transformers initialises empty tensors and the model keeps torch's own initial weights (embeddings
    fifty times too large). With it the weights are those that the same seed gives in a single process.
    """
    strategy: Any = None if trainer is None else trainer.strategy
    if not isinstance(strategy, DeepSpeedStrategy) or not strategy.zero_stage_3:
        yield
        return
    from transformers import PreTrainedModel
    from transformers.integrations import deepspeed as integration

    own = PreTrainedModel.initialize_weights
    # Called where a single process draws them, so the draws are the same.
    PreTrainedModel.initialize_weights = integration.initialize_weights_zero3  # pyright: ignore
    try:
        yield
    finally:
        PreTrainedModel.initialize_weights = own
    # Only the first rank drew; all go on from there.
    torch.set_rng_state(strategy.broadcast(torch.get_rng_state()))


@contextmanager
def loaded_in_pieces(trainer: L.Trainer | None) -> Generator[None]:
    """Load a model of transformers under ZeRO stage 3, one tensor at a time."""
    strategy: Any = None if trainer is None else trainer.strategy
    if not isinstance(strategy, DeepSpeedStrategy) or not strategy.zero_stage_3:
        yield
        return
    from transformers.integrations import deepspeed as integration

    zero3 = _Zero3(strategy.config)
    integration.set_hf_deepspeed_config(zero3)
    try:
        yield
    finally:
        integration.unset_hf_deepspeed_config()


class _Zero3:
    """What transformers asks of a DeepSpeed configuration."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        return True


def shard(model: Any, mesh: Any) -> None:
    """Shard a model over the data-parallel ranks of a device mesh (FSDP2), block by block."""
    from torch.distributed.fsdp import fully_shard

    blocks: set[str] = set(getattr(model, "_no_split_modules", None) or ())
    parts: list[nn.Module] = [part for part in model.modules() if type(part).__name__ in blocks]
    for part in (*parts, model):
        fully_shard(part, mesh=mesh["data_parallel"])

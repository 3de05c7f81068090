"""DeepSpeed with exact gradient accumulation: on GPUs, and on CPU processes to try a ZeRO configuration on a laptop."""

import argparse
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override


class ZeROStrategy(DeepSpeedStrategy):
    """Lightning's ``DeepSpeedStrategy`` with the accumulated gradient of every other strategy.

    Two things go wrong in Lightning's own with ``accumulate_grad_batches=n``. Both Lightning and DeepSpeed divide the
    loss by n, so gradients are n times too small: hardly seen with Adam, but gradient clipping, weight decay in the
    gradient and SGD feel it. And DeepSpeed counts micro-batches on its own, across the ends of epochs: it makes no step
    from the last, incomplete accumulation of an epoch, and is out of time with Lightning's schedulers and logs ever
    after. Here Lightning alone divides and decides when to step. It takes the arguments of
    :class:`lightning.pytorch.strategies.DeepSpeedStrategy`.

    Example::

        Trainer(devices=8, strategy=ZeROStrategy(stage=2), accumulate_grad_batches=4)
    """

    strategy_name = "zero"

    @property
    @override
    def handles_gradient_accumulation(self) -> bool:
        return False

    @override
    def _initialize_deepspeed_train(self, model: nn.Module) -> None:
        super()._initialize_deepspeed_train(model)
        self.deepspeed_engine.set_gradient_accumulation_boundary(True)

    @override
    @contextmanager
    def block_backward_sync(self) -> Generator[None]:
        """Let the micro-batches inside be followed by more of the same step: that is when Lightning uses this."""
        self.deepspeed_engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.deepspeed_engine.set_gradient_accumulation_boundary(True)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        return super().backward(closure_loss, optimizer, *args, **{"scale_wrt_gas": False, **kwargs})


class CPUDeepSpeedStrategy(ZeROStrategy):
    """:class:`ZeROStrategy` on CPU processes over gloo, for development and tests.

    ZeRO shards optimizer state, gradients and parameters as on GPUs; only the speed is not that of GPUs. It takes the
    arguments of :class:`lightning.pytorch.strategies.DeepSpeedStrategy`. DeepSpeed's shared-memory communication is
    left out, because it would be compiled for minutes at the first start; so are its own optimizers (CPUAdam), which
    the ``optimizer`` section of a DeepSpeed configuration asks for, unless you let it compile them.

    Example::

        Trainer(accelerator="cpu", devices=2, strategy=CPUDeepSpeedStrategy(stage=3))

    Raises:
        MisconfigurationException: if it is used with another accelerator than the CPU.
    """

    strategy_name = "deepspeed_cpu"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"process_group_backend": "gloo", **kwargs})

    @override
    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CPUAccelerator):
            raise MisconfigurationException(
                'CPUDeepSpeedStrategy is for the CPU: use strategy="deepspeed_stage_2" on GPUs, or accelerator="cpu"'
            )
        super(DeepSpeedStrategy, self).setup_environment()  # the parent refuses all but CUDA

    @override
    def setup_distributed(self) -> None:
        import deepspeed

        reset_seed()
        self.set_world_ranks()
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._init_deepspeed_distributed()

    @override
    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[Any, Any]:
        with _rank_as_device(self):
            return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)

    @override
    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        with _rank_as_device(self):
            super()._initialize_deepspeed_inference(model)


@contextmanager
def _rank_as_device(strategy: DeepSpeedStrategy) -> Generator[None]:
    """Let ``deepspeed.initialize`` have the local rank where Lightning passes the index of a device, None on a CPU."""
    import deepspeed

    initialize = deepspeed.initialize

    def with_rank(*args: Any, **kwargs: Any) -> Any:
        return initialize(*args, **{**kwargs, "args": argparse.Namespace(device_rank=strategy.local_rank)})

    deepspeed.initialize = with_rank
    try:
        yield
    finally:
        deepspeed.initialize = initialize

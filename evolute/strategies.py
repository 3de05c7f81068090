"""What Lightning's strategies lack: DeepSpeed with exact accumulation and checkpoints that open everywhere, on GPUs
and, to try a configuration on a laptop, on CPU processes; and FSDP2 without numbers to fill in.
"""

import argparse
import importlib.util
import os
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from evolute.callbacks.zero_checkpoint import layout, load_checkpoint


def choose_accelerator() -> None:
    """Tell DeepSpeed, before it is imported, that there is no GPU: else it says on the terminal that it guesses so."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


choose_accelerator()  # jsonargparse imports DeepSpeed when it looks at the arguments of a strategy


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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise MisconfigurationException(
                f"{type(self).__name__} needs DeepSpeed: pip install 'evolute[deepspeed]', or leave the strategy out"
            )
        super().__init__(*args, **kwargs)

    @override
    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CUDAAccelerator):
            raise MisconfigurationException(
                "ZeROStrategy trains on GPUs: on processors use CPUDeepSpeedStrategy (--config strategy/zero2_cpu)"
            )
        super().setup_environment()

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint of any stage and any number of processes, or a file of a single process.

        What the same stage and number of processes wrote is read by DeepSpeed, each rank its own pieces; anything else
        by every rank whole (see :func:`evolute.zero_state.restore`). Both unpickle tensors and plain data only.
        """
        from evolute import zero_state

        assert self.lightning_module is not None
        path = Path(self.broadcast(checkpoint_path))
        fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        if fitting and path.is_dir() and layout(path) == (self._stage, self.world_size):
            with zero_state.weights_only(self.deepspeed_engine):
                return super().load_checkpoint(path)
        content = load_checkpoint(path)
        zero_state.restore(self, content)
        return content

    @property
    def _stage(self) -> int:
        assert isinstance(self.config, dict)
        return int(self.config.get("zero_optimization", {}).get("stage", 0))

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
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        kwargs.setdefault("process_group_backend", "gloo")
        super().__init__(*args, **kwargs)  # spelt so that jsonargparse finds the parent's arguments
        zero = self.config.get("zero_optimization", {}) if isinstance(self.config, dict) else {}
        if offloaded := [key for key in ("offload_optimizer", "offload_param") if zero.get(key)]:
            raise MisconfigurationException(
                f"CPUDeepSpeedStrategy with {offloaded[0]}: on processors all is in their memory already, and "
                "DeepSpeed would compile its CPUAdam for minutes. Leave offloading out (--config strategy/zero3_cpu)"
            )

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


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` with all devices for the data, and checkpoints in one ordinary file.

    The module shards itself in ``configure_model``, with ``fully_shard`` over ``self.device_mesh["data_parallel"]``.

    Args:
        process_group_backend: of torch.distributed; by default what suits the device.
        timeout: of collectives.
    """

    def __init__(self, process_group_backend: str | None = None, timeout: timedelta = timedelta(seconds=1800)) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint of any strategy, which every rank holds whole meanwhile.

        Lightning's own takes the numbers of an optimizer's parameters for their places in the module. They are places
        in the optimizer's groups: an optimizer with several groups would get the moments of other parameters.
        """
        from lightning.fabric.strategies.model_parallel import _load_raw_module_state
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        assert self.lightning_module is not None
        assert self.model is not None
        content = load_checkpoint(self.broadcast(checkpoint_path))
        _load_raw_module_state(content["state_dict"], self.model, strict=self.lightning_module.strict_loading)
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        options = StateDictOptions(full_state_dict=True)
        for optimizer, saved in zip(self.optimizers, content.get("optimizer_states", ()), strict=False):
            set_optimizer_state_dict(self.model, optimizer, _by_name(optimizer, saved, names), options=options)
        return content


def _by_name(optimizer: Optimizer, saved: dict[str, Any], names: dict[Tensor, str]) -> dict[str, Any]:
    """Return an optimizer's saved state with the names of parameters in place of their numbers."""
    pairs = zip(optimizer.param_groups, saved["param_groups"], strict=True)
    groups = [{**old, "params": [names[p] for p in group["params"]]} for group, old in pairs]
    called = {
        number: name
        for old, group in zip(saved["param_groups"], groups, strict=True)
        for number, name in zip(old["params"], group["params"], strict=True)
    }
    return {"state": {called[number]: state for number, state in saved["state"].items()}, "param_groups": groups}


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

"""Any densification strategy of gsplat, under automatic optimisation with one optimizer."""

import time
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from evolute.callbacks.access import GroupView
from evolute.callbacks.gaussian_callback import GaussianCallback, gaussian_module
from evolute.callbacks.record import record


class GsplatStrategy(GaussianCallback):
    """Run a strategy of gsplat where it expects to run: after the step, with one optimizer a parameter.

    The recipe has one optimizer of named groups; the strategy sees a view of each group, and what it did to parameters
    and moments is brought back. ``DefaultStrategy`` (adaptive density control of 3DGS) works on the CPU too; it knows
    no budget. ``MCMCStrategy`` needs CUDA; :class:`GaussianRelocate` does the same anywhere.

    Records ``gsplat/gaussians`` and ``gsplat/time_ms`` when the number changed.

    Args:
        strategy: name of a class in ``gsplat.strategy``.
        options: its arguments.

    Raises:
        MisconfigurationException: if gsplat is missing, has no such strategy or does not take the options; at the start
            of fit, if the device is wrong, the module trains no Gaussians, or runs in several processes.
    """

    name: ClassVar[str] = "GsplatStrategy"

    def __init__(self, strategy: str = "DefaultStrategy", options: dict[str, Any] | None = None) -> None:
        try:
            from gsplat import strategy as known
        except ImportError as error:
            raise MisconfigurationException("GsplatStrategy needs gsplat: pip install evolute[splatting]") from error
        made = getattr(known, strategy, None)
        if made is None:
            raise MisconfigurationException(
                f"GsplatStrategy(strategy={strategy!r}): gsplat.strategy has none of that name"
            )
        try:
            self._strategy: Any = made(**(options or {}))
        except TypeError as error:
            raise MisconfigurationException(f"GsplatStrategy(options={options}): {error}") from error
        self._state: dict[str, Any] = {}
        self._loaded: dict[str, Any] | None = None

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if type(self._strategy).__name__ == "MCMCStrategy" and pl_module.device.type != "cuda":
            raise MisconfigurationException(
                "GsplatStrategy(strategy='MCMCStrategy') needs CUDA; GaussianRelocate does the same on any device"
            )
        extent = gaussian_module(pl_module, self.name).scene_extent()
        takes_scale = "scene_scale" in self._strategy.initialize_state.__code__.co_varnames
        self._state = self._strategy.initialize_state(**({"scene_scale": extent} if takes_scale else {}))
        if self._loaded is not None:
            self._state.update(self._loaded)
            self._loaded = None
        params, views = self._seen()
        self._strategy.check_sanity(params, views)

    def _seen(self) -> tuple[dict[str, Any], dict[str, Any]]:
        params: dict[str, Any] = dict(self._rows.params)
        return params, {name: GroupView(self._rows, name) for name in params}

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        params, views = self._seen()
        info = gaussian_module(pl_module, self.name).render_info
        if info and hasattr(self._strategy, "step_pre_backward"):
            self._strategy.step_pre_backward(params, views, self._state, trainer.global_step, info)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        info = gaussian_module(pl_module, self.name).render_info
        if not info or not self.stepped(trainer, batch_idx):
            return
        step, begin, before = trainer.global_step - 1, time.perf_counter(), len(self._rows)
        params, views = self._seen()
        if type(self._strategy).__name__ == "MCMCStrategy":
            rate = self._rows.rate("means")
            self._strategy.step_post_backward(params, views, self._state, step, info, lr=rate)
        else:
            self._strategy.step_post_backward(params, views, self._state, step, info, packed=False)
        for view in views.values():
            view.commit()
        if len(self._rows) != before:
            spent = 1e3 * (time.perf_counter() - begin)
            record(trainer, "gsplat", {"gaussians": float(len(self._rows)), "time_ms": spent}, step)

    @override
    def state_dict(self) -> dict[str, Any]:
        kept = {k: v for k, v in self._state.items() if v is None or isinstance(v, Tensor | int | float | bool | str)}
        return {"state": {k: v.clone() if isinstance(v, Tensor) else v for k, v in kept.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = {k: v for k, v in state_dict["state"].items() if not torch.is_tensor(v) or v.numel()}

"""Any densification strategy of gsplat, under automatic optimisation with one optimizer."""

import inspect
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
        dry_run: let it act on copies, record the number of Gaussians that it would leave, and change nothing.

    Raises:
        MisconfigurationException: if gsplat is missing, has no such strategy or does not take the options; at the start
            of fit, if device or precision is wrong, the module trains no Gaussians, or runs in several processes.
    """

    name: ClassVar[str] = "GsplatStrategy"

    def __init__(
        self, strategy: str = "DefaultStrategy", options: dict[str, Any] | None = None, dry_run: bool = False
    ) -> None:
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
        self.dry_run = dry_run
        self._state: dict[str, Any] = {}
        self._loaded: dict[str, Any] | None = None

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if type(self._strategy).__name__ == "MCMCStrategy" and pl_module.device.type != "cuda":
            raise MisconfigurationException(
                "GsplatStrategy(strategy='MCMCStrategy') needs CUDA; GaussianRelocate does the same on any device"
            )
        if wrong := {p.dtype for p in self._rows.params.values()} - {torch.float32}:
            raise MisconfigurationException(
                f"GsplatStrategy: gsplat counts in float32, the Gaussians are {wrong.pop()}: use precision 32-true or "
                "bf16-mixed"
            )
        self._state = self._fresh_state(pl_module)
        if self._loaded is not None:
            self._state.update(self._loaded)
            self._loaded = None
        self._strategy.check_sanity(*self._seen())

    def _fresh_state(self, pl_module: L.LightningModule) -> dict[str, Any]:
        make = self._strategy.initialize_state
        extent = gaussian_module(pl_module, self.name).scene_extent()
        return make(**({"scene_scale": extent} if "scene_scale" in inspect.signature(make).parameters else {}))

    def _seen(self) -> tuple[dict[str, Any], dict[str, GroupView]]:
        views = {name: GroupView(self._rows, name, copied=self.dry_run) for name in self._rows.params}
        return {name: view.parameter for name, view in views.items()}, views

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        info = gaussian_module(pl_module, self.name).render_info
        if info and hasattr(self._strategy, "step_pre_backward"):
            params: dict[str, Any] = dict(self._rows.params)
            views = {name: GroupView(self._rows, name) for name in params}
            self._strategy.step_pre_backward(params, views, self._state, trainer.global_step, info)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        info = gaussian_module(pl_module, self.name).render_info
        if not info or not self.stepped(trainer, batch_idx):
            return
        step, begin, before = trainer.global_step - 1, time.perf_counter(), len(self._rows)
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=self.dry_run):
            views = self._act(step, info)
        after = len(next(iter(views.values())).parameter)
        if self.dry_run:
            if after != before:  # what it counts by row does not fit the rows that stay
                self._state = self._fresh_state(pl_module)
        else:
            for view in views.values():
                view.commit()
        if after != before:
            spent = 1e3 * (time.perf_counter() - begin)
            record(trainer, "gsplat", {"gaussians": float(after), "time_ms": spent}, step)

    def _act(self, step: int, info: dict[str, Any]) -> dict[str, GroupView]:
        """Let the strategy do what it does after a step; return what it left."""
        params, views = self._seen()
        mcmc = type(self._strategy).__name__ == "MCMCStrategy"
        options: dict[str, Any] = {"lr": self._rows.rate("means")} if mcmc else {"packed": False}
        self._strategy.step_post_backward(params, views, self._state, step, info, **options)
        return views

    @override
    def state_dict(self) -> dict[str, Any]:
        state = self._state if self._loaded is None else self._loaded
        kept = {k: v for k, v in state.items() if v is None or isinstance(v, Tensor | int | float | bool | str)}
        return {"state": {k: v.clone() if isinstance(v, Tensor) else v for k, v in kept.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = {k: v for k, v in state_dict["state"].items() if not torch.is_tensor(v) or v.numel()}

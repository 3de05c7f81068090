"""A tiny splatting run: what tests of callbacks that act on Gaussians train."""

from functools import cache
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from evolute.data.scenes import SceneDataModule
from evolute.recipes.splatting import GaussianSplat
from tests.conftest import trainer_of

RATES = {"means": 2e-3, "scales": 2e-2, "quats": 4e-3, "opacities": 5e-2, "sh0": 5e-2, "shN": 2e-3}


@cache
def room_folder() -> str:
    """Where the small room is kept, made once for the whole run of the tests."""
    import tempfile

    return tempfile.mkdtemp(prefix="room-")


def small_room(**kwargs: Any) -> SceneDataModule:
    return SceneDataModule(**{"folder": room_folder(), "views": 9, "size": (40, 33), "lidar_rays": 3000, **kwargs})


def splat(**kwargs: Any) -> GaussianSplat:
    return GaussianSplat(**{"budget": 300, "neighbours": 16, "sh_degree": 1, "rates": RATES, **kwargs})


def fit_splat(
    callbacks: list[Callback],
    module: GaussianSplat | None = None,
    data: Any = None,
    ckpt: str | None = None,
    **kwargs: Any,
) -> tuple[GaussianSplat, L.Trainer]:
    """Train for 20 steps unless told otherwise."""
    L.seed_everything(0, verbose=False)
    trainer = trainer_of(callbacks, **{"max_steps": 20, "limit_val_batches": 0, **kwargs})
    module = module or splat()
    trainer.fit(module, data or small_room(), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return module, trainer

"""The recipe: losses against their oracles, and what is refused."""

import json
from typing import Any

import pytest
import torch

from evolute.data.scenes import make_room
from evolute.geometry import depth_confidence
from evolute.models.splatting import Camera, GaussianScene
from evolute.recipes.splatting import GaussianSplat
from evolute.recipes.splatting.evaluation import image_scores
from evolute.recipes.splatting.losses import depth_residual, photometric
from tests.callbacks.splats import RATES, fit_splat, small_room, splat


def test_photometric_loss_is_zero_at_the_truth_and_mixes_as_stated():
    truth = torch.rand(20, 24, 3, generator=torch.Generator().manual_seed(0))
    assert photometric(truth, truth, 0.2).item() == pytest.approx(0.0, abs=1e-6)
    other = truth.flip(0)
    l1 = (truth - other).abs().mean()
    similar = image_scores(other, truth)["ssim"]
    assert photometric(other, truth, 0.2).item() == pytest.approx((0.8 * l1 + 0.2 * (1 - similar)).item(), rel=1e-5)


def test_depth_residual_counts_measured_covered_pixels_only():
    depth = torch.tensor([[1.0, 2.0], [3.0, 9.0]], requires_grad=True)
    measured = torch.tensor([[1.5, 0.0], [3.0, 4.0]])
    alpha = torch.tensor([[1.0, 1.0], [1.0, 0.9]])
    loss = depth_residual(depth, alpha, measured, torch.ones(2, 2))
    assert loss.item() == pytest.approx((0.5 + 0 + 2.0) / 3)  # the last one clamped at 2
    loss.backward()
    assert depth.grad[0, 0] < 0  # a larger depth would be nearer to the measured one
    assert depth.grad[0, 1] == depth.grad[1, 1] == 0
    uncovered = depth_residual(depth, torch.tensor([[0.0, 1], [1, 0.05]]), measured, torch.ones(2, 2))
    assert uncovered.item() == 0
    assert depth_residual(depth, alpha, torch.zeros(2, 2), torch.ones(2, 2)).item() == 0


def wall(slope: float) -> tuple[GaussianScene, Camera]:
    """Flat discs on the plane z = 3 + slope x, densely."""
    x, y = torch.meshgrid(torch.linspace(-3, 3, 61), torch.linspace(-2, 2, 41), indexing="xy")
    points = torch.stack([x.flatten(), y.flatten(), 3 + slope * x.flatten()], 1)
    normal = torch.nn.functional.normalize(torch.tensor([[slope, 0.0, -1.0]]), dim=1).expand(len(points), 3)
    scene = GaussianScene.from_points(points, torch.rand(len(points), 3), 0, 0.9, 1.0, normal, flatness=0.01)
    return scene, Camera(torch.eye(4), torch.tensor([[30.0, 0, 20], [0, 30, 16], [0, 0, 1]]), 40, 32)


def test_plane_depth_is_unbiased_on_a_slanted_wall_and_expected_depth_is_not():
    scene, camera = wall(0.6)
    rays = camera.rays()
    exact = 3 / (1 - 0.6 * rays[..., 0])
    error = {}
    for kind in ("plane", "expected"):
        module = splat(depth=kind, sh_degree=0)
        module.scene = scene
        seen = module._render(camera, module._depth_channels(camera))
        error[kind] = (module._depth(seen, camera) - exact)[6:-6, 6:-6].abs().max().item()
    assert error["plane"] < 1e-3
    assert error["expected"] > 10 * error["plane"]


def test_with_an_edge_in_the_image_depth_is_trusted_less_there():
    batch = next(iter(_loader()))
    trust = depth_confidence(batch["image"][0] / 255)
    assert trust.min() == 0
    assert trust.median() > 0.8


def _loader() -> Any:
    data = small_room()
    data.prepare_data()
    data.setup()
    return data.train_dataloader()


def test_training_improves_held_out_views_and_depth():
    import lightning as L

    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}

    def score(module: Any, data: Any) -> Any:
        return L.Trainer(**quiet).validate(module, data, verbose=False)[0]

    data = small_room(lidar_rays=20_000)
    module, _ = fit_splat([], splat(budget=800), data, max_steps=1)
    before = score(module, data)
    module, _ = fit_splat([], splat(budget=800, depth_weight=0.5), data, max_steps=100)
    after = score(module, data)
    assert after["val/psnr"] > before["val/psnr"] + 3
    assert after["val/depth_mae"] < 0.7 * before["val/depth_mae"]


def test_a_batch_that_is_not_finite_takes_no_step_and_too_many_end_the_run():
    class Broken(GaussianSplat):
        def _losses(self, batch):
            losses, seen = super()._losses(batch)
            if self.trainer.global_step in self.when:
                losses["loss"] = losses["loss"] * float("nan")
            return losses, seen

    options = {"budget": 200, "neighbours": 16, "sh_degree": 0, "rates": RATES, "max_nonfinite": 3}
    module = Broken(**options)
    module.when = {4}
    fit_splat([], module, max_steps=8)
    assert all(p.isfinite().all() for p in module.parameters())
    module = Broken(**options)
    module.when = set(range(100))
    with pytest.raises(RuntimeError, match="not finite 3 step"):
        fit_splat([], module, max_steps=8)


@pytest.mark.parametrize(
    "bad",
    [{"budget": 0}, {"initial": 0.0}, {"allocation": "random"}, {"sh_degree": 4}, {"rates": {"speed": 1}},
     {"depth_weight": -1}, {"depth": "mean"}, {"dssim": 2}, {"init_opacity": 1.0}],
    ids=str,
)  # fmt: skip
def test_arguments_out_of_range_are_refused_with_their_value(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
        GaussianSplat(**bad)


def test_json_is_what_the_room_writes(tmp_path):
    folder = make_room(tmp_path / "room", views=2, width=8, height=8, lidar=10)
    assert len(json.loads((folder / "transforms.json").read_text())["frames"]) == 2

"""Callbacks that act on Gaussians: optimizer state, the budget, the off position, exact resume, refusals."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from evolute.callbacks import (
    CurvatureMonitor,
    DepthSchedule,
    ExportPLY,
    GaussianDensify,
    GaussianRelocate,
    GsplatStrategy,
    LayerMonitor,
    MetricsCSV,
    NoiseAdaptiveLR,
    RenderVideo,
    RunCheckpoint,
    SHSchedule,
)
from evolute.callbacks.access import Rows
from evolute.callbacks.scene_output import flight
from evolute.models.splatting import read_ply
from tests.callbacks.splats import fit_splat, small_room, splat
from tests.conftest import fit
from tests.modules import Recorder
from tests.settings import GAUSSIANS

DENSIFY = {
    "every_n_steps": 4,
    "start": 4,
    "stop": 1.0,
    "grad_threshold": 1e-7,
    "theta_mode": "quantile",
    "replaced": 0.2,
}


class Count(Callback):
    """The number of Gaussians after every step, and whether parameters and moments still fit."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        params = pl_module.gaussian_parameters()
        self.numbers.append(len(params["means"]))
        assert {len(p) for p in params.values()} == {self.numbers[-1]}
        groups = trainer.optimizers[0].param_groups
        assert [group["params"][0] is p for group, p in zip(groups, params.values(), strict=True)] == [True] * 6
        for p in params.values():
            state = trainer.optimizers[0].state[p]
            assert state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape


def weights(module: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.gaussian_parameters().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_rows_keep_their_moments_bit_by_bit_and_new_ones_have_none():
    p = {"a": torch.nn.Parameter(torch.randn(6, 3)), "b": torch.nn.Parameter(torch.randn(6))}
    optimizer = torch.optim.Adam([{"params": [q]} for q in p.values()], lr=0.1)
    for _ in range(3):
        sum((q**2).sum() for q in p.values()).backward()
        optimizer.step()
    trainer = L.Trainer(logger=False, accelerator="cpu")
    trainer.strategy.optimizers = [optimizer]
    before = {name: (q.detach().clone(), optimizer.state[q]["exp_avg"].clone()) for name, q in p.items()}
    rows = Rows(trainer, p, "test")
    kept = torch.tensor([4, 0, 5])
    rows.replace(kept, {"a": torch.ones(2, 3), "b": torch.ones(2)})
    for name, q in p.items():
        state = optimizer.state[q]
        assert torch.equal(q[:3], before[name][0][kept])
        assert torch.equal(state["exp_avg"][:3], before[name][1][kept])
        assert not state["exp_avg"][3:].any()
        assert state["step"] == 3
    rows.write(torch.tensor([1]), {"a": torch.zeros(1, 3)})
    assert not optimizer.state[p["a"]]["exp_avg_sq"][1].any()
    assert optimizer.state[p["b"]]["exp_avg_sq"][1] != 0
    sum((q**2).sum() for q in p.values()).backward()
    optimizer.step()


@pytest.mark.parametrize("name", GAUSSIANS)
def test_state_stays_consistent_and_the_run_changes(name):
    count = Count()
    changed, trainer = fit_splat([GAUSSIANS[name].make(), count])
    plain, _ = fit_splat([])
    assert trainer.global_step == 20
    assert changed.settings.budget == 300
    same = len(changed.scene) == len(plain.scene) and equal(weights(changed), weights(plain))
    assert not same
    if name != "OpacityReset":
        assert len(set(count.numbers)) > 1


OFF = [(name, setting.neutral) for name, setting in GAUSSIANS.items()]
OFF += [(name, {"dry_run": True}) for name in GAUSSIANS]


@pytest.mark.parametrize(("name", "off"), OFF, ids=str)
def test_the_off_position_and_the_neutral_setting_reproduce_the_run(name, off):
    plain, _ = fit_splat([])
    off_run, _ = fit_splat([GAUSSIANS[name].make(**off)])
    assert equal(weights(plain), weights(off_run))


def test_the_budget_holds_after_every_step_under_gradients_that_want_everything_split():
    class Adversary(Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            means2d = pl_module.render_info["means2d"]
            means2d.grad = torch.full_like(means2d, 1e3)

    count, log = Count(), Recorder()
    densify = GaussianDensify(
        budget=310, every_n_steps=1, start=0, stop=1.0, grow_scale=1e-6, theta=(0.0, 0.0), replaced=0.5, seed=3
    )
    fit_splat([Adversary(), densify, count], logger=log)
    assert max(count.numbers) == 310
    assert sum(log.of("densify/splits").values()) >= 10
    assert list(log.of("densify/gaussians").values()) == count.numbers


def test_below_the_gate_nothing_is_split_and_the_pass_rate_is_recorded_at_its_step():
    log = Recorder()
    fit_splat([GaussianDensify(**{**DENSIFY, "budget": 400, "theta_mode": "fixed", "theta": (0.34, 0.34)})], logger=log)
    assert set(log.of("densify/splits").values()) == {0.0}
    assert set(log.of("densify/pass_rate").values()) == {0.0}
    assert list(log.of("densify/theta")) == [3, 7, 11, 15, 19]
    log = Recorder()
    fit_splat([GaussianDensify(**{**DENSIFY, "budget": 400, "grow_scale": 0.0, "passing": (0.25, 0.25)})], logger=log)
    assert all(0.2 < rate < 0.3 for rate in log.of("densify/pass_rate").values())


@pytest.mark.parametrize("name", GAUSSIANS)
def test_two_runs_are_equal_and_a_resumed_one_is_the_uninterrupted_one(name, tmp_path):
    def train(folder: Path, steps: int, ckpt: str | None = None) -> Any:
        callbacks = [RunCheckpoint(10), GAUSSIANS[name].make(), SHSchedule(6)]
        options = {"max_steps": steps, "default_root_dir": folder, "logger": MetricsCSV(folder)}
        return fit_splat(callbacks, ckpt=ckpt, **options)

    # A schedule needs the length of the whole run: it is stopped on the way, not shortened.
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 10:
                trainer.should_stop = True

    whole, trainer = train(tmp_path / "whole", 20)
    again, _ = train(tmp_path / "again", 20)
    assert equal(weights(whole), weights(again))
    options = {"default_root_dir": tmp_path / "parts", "logger": MetricsCSV(tmp_path / "parts")}
    fit_splat([RunCheckpoint(10), GAUSSIANS[name].make(), SHSchedule(6), Stop()], max_steps=20, **options)
    ckpt = next((tmp_path / "parts" / "checkpoints").glob("*10.ckpt"))
    held = torch.load(ckpt, weights_only=True)["state_dict"]["scene.params.means"]
    if name != "OpacityReset":
        assert len(held) != 300
    resumed, other = train(tmp_path / "parts", 20, str(ckpt))
    assert equal(weights(whole), weights(resumed))
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        a, b = trainer.optimizers[0].state[p], other.optimizers[0].state[q]
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_monitors_and_noise_adaptive_rates_follow_a_changing_number_of_gaussians():
    log = Recorder()
    callbacks = [
        GAUSSIANS["GaussianDensify"].make(),
        CurvatureMonitor(every_n_steps=3, budget=None, max_products=6),
        LayerMonitor(every_n_steps=3, budget=None),
        NoiseAdaptiveLR(every_n_steps=2),
    ]
    fit_splat(callbacks, logger=log)
    assert len(log.of("curvature/sharpness")) == 7
    assert all(value > 0 for value in log.of("curvature/sharpness").values())
    assert log.of("lr_ratio/scene.params.means")


def test_noise_of_rows_seen_twice_leaves_out_what_one_view_has_nothing_for():
    from evolute.callbacks.access import GradientPair

    first, second = torch.tensor([[1.0, 2], [0, 0], [3, 0]]), torch.tensor([[0.5, 2], [4, 4], [0, 0]])
    kept = first.clone(), second.clone()
    pair = GradientPair(
        {"a": first, "b": torch.tensor([1.0, 0, 2])}, {"a": second, "b": torch.tensor([3.0, 4, 0])}, 0.5, 1.0
    )
    pair.seen_only()
    difference = pair.difference()
    assert difference["a"].tolist() == [[0.5, 0], [0, 0], [0, 0]]
    assert difference["b"].tolist() == [-2.0, 0, 0]
    assert torch.equal(first, kept[0])
    assert torch.equal(second, kept[1])
    logs = [Recorder(), Recorder()]
    for rows, log in zip(("all", "seen"), logs, strict=True):
        fit_splat([NoiseAdaptiveLR(rows=rows, dry_run=True)], logger=log)
    every, seen = (sum(log.of("noise/scene.params.means").values()) for log in logs)
    assert 0 < seen < every


def test_a_monitor_changes_nothing_here_either():
    plain, _ = fit_splat([GAUSSIANS["GaussianDensify"].make()])
    watched, _ = fit_splat(
        [
            GAUSSIANS["GaussianDensify"].make(),
            CurvatureMonitor(every_n_steps=5, budget=None, max_products=6),
            LayerMonitor(5),
        ]
    )
    assert equal(weights(plain), weights(watched))


def test_schedules_follow_the_step_alone():
    class Watch(Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[int, float]] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.seen.append((pl_module.sh_active, pl_module.depth_factor))

    watch = Watch()
    fit_splat([SHSchedule(3), DepthSchedule(start=2, ramp=4, end=8), watch], max_steps=10)
    assert [degree for degree, _ in watch.seen] == [0, 0, 0] + [1] * 7
    assert [factor for _, factor in watch.seen] == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 0, 0]


def test_a_scene_and_a_flight_are_left_behind(tmp_path):
    from PIL import Image

    module, _ = fit_splat([ExportPLY("out/{step}.ply", 10), RenderVideo(frames=6)], default_root_dir=tmp_path)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"00000010.ply", "00000020.ply"}
    back = read_ply(tmp_path / "out" / "00000020.ply")
    assert equal({n: p.detach() for n, p in back.params.items()}, weights(module))
    with Image.open(tmp_path / "flight.webp") as film:
        assert (film.n_frames, film.size) == (6, (40, 33))


def test_a_flight_passes_its_cameras():
    from evolute.data.scenes.room import look_at

    angles = torch.arange(5) * 2 * torch.pi / 5
    eyes = torch.stack([2 * angles.cos(), 2 * angles.sin(), torch.ones(5)], 1).double().numpy()
    stops = [look_at(eye, torch.zeros(3).double().numpy()) for eye in eyes]
    poses = flight(torch.tensor(__import__("numpy").stack(stops)).numpy(), 20)
    torch.testing.assert_close(torch.tensor(poses[::4]), torch.tensor(__import__("numpy").stack(stops)))


@pytest.mark.parametrize(
    ("make", "bad"),
    [(setting.make, b) for setting in GAUSSIANS.values() for b in setting.bad]
    + [(SHSchedule, {"every_n_steps": 0}), (DepthSchedule, {"start": -1})]
    + [(ExportPLY, {"path": "scene.obj"}), (RenderVideo, {"frames": 1}), (GsplatStrategy, {"strategy": "Best"})],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_arguments_out_of_range_are_refused_with_their_value(make, bad):
    with pytest.raises(MisconfigurationException, match=next(iter(bad))):
        make(**bad)


@pytest.mark.parametrize("name", GAUSSIANS)
def test_a_module_without_gaussians_is_refused(name):
    with pytest.raises(MisconfigurationException, match="Regression has no render_info"):
        fit([GAUSSIANS[name].make()])


def test_too_many_gaussians_and_several_processes_are_refused(monkeypatch):
    with pytest.raises(MisconfigurationException, match="begins with 300 Gaussians"):
        fit_splat([GaussianDensify(budget=299)])
    with pytest.raises(MisconfigurationException, match="begins with 300 Gaussians"):
        fit_splat([GaussianRelocate(cap=299)])
    with pytest.raises(MisconfigurationException, match="needs CUDA"):
        fit_splat([GsplatStrategy("MCMCStrategy")])
    monkeypatch.setattr(L.Trainer, "world_size", property(lambda self: 2))
    callback, trainer = GaussianDensify(), L.Trainer(logger=False, accelerator="cpu")
    with pytest.raises(MisconfigurationException, match="2 processes would go on"):
        callback.setup(trainer, splat(), "fit")


def test_a_budget_above_the_points_is_refused():
    with pytest.raises(ValueError, match=r"budget=4000\): exceeds the 3000 points"):
        fit_splat([], splat(budget=4000), small_room())

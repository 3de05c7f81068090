"""Two processes under FSDP2 are one run: every callback, against a single process on the joined batches.

The file is also the script of those processes, which run all scenarios one after the other and save what they saw.
"""

import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from evolute.callbacks import CurvatureMonitor, LayerMonitor, NoiseAdaptiveLR, StepRadius
from tests.conftest import fit
from tests.modules import Net, Recorder, classification_data, make_optimizer
from tests.processes import run_pair

STEPS = 4


class Sharded(Net):
    """Sizes that two ranks cannot share evenly, a layer of one row, a frozen bias; sharded layer by layer.

    ``how``: ``"rows"``; ``"columns"`` for the first layer's; ``"in-part"``, the last layer left out; ``"replicated"``,
    over a mesh of two dimensions.
    """

    def __init__(self, optimizer: str = "adamw", how: str = "rows", lr: float = 0.01) -> None:
        net = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 1), nn.Tanh(), nn.Linear(1, 5), nn.Tanh())
        super().__init__(nn.Sequential(net, nn.Linear(5, 4)), make=lambda m: make_optimizer(m, optimizer, lr))
        net[2].bias.requires_grad_(False)
        self.how = how

    def configure_model(self) -> None:
        if self.trainer.world_size == 1 or any(isinstance(p, DTensor) for p in self.parameters()):
            return
        mesh = self.device_mesh["data_parallel"]
        if self.how == "replicated":
            mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
        columns = (lambda p: Shard(1 if p.ndim == 2 else 0)) if self.how == "columns" else None
        fully_shard(self.net[0][0], mesh=mesh, shard_placement_fn=columns)
        fully_shard(self.net[0] if self.how == "in-part" else self.net, mesh=mesh)


def whole(module: nn.Module) -> dict[str, Tensor]:
    named = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in module.named_parameters()}
    return {n: p.detach().clone() for n, p in named.items()}


def scenario(name: str, world: int, folder: Path | None = None) -> dict[str, Any]:
    """Run one scenario in ``world`` processes; the global batch is 16 samples whatever their number."""
    options: dict[str, Any] = {"max_steps": STEPS}
    optimizer, callbacks, how, tensor = "adamw", list[Callback](), "rows", 1
    match name:
        case "monitors":
            callbacks = [CurvatureMonitor(every_n_steps=1), StepRadius(every_n_steps=1), LayerMonitor(every_n_steps=1)]
        case "dry":
            callbacks = [NoiseAdaptiveLR(power=0.0), StepRadius(mode="clip", target=1e-3, dry_run=True)]
        case "layers" | "layers-split":
            callbacks = [LayerMonitor(every_n_steps=1, budget=None, memory=1)]
        case "noise":
            callbacks = [NoiseAdaptiveLR()]
        case "noise-held" | "noise-resumed":  # one batch: stock Lightning replays others after a resume
            callbacks, options["limit_train_batches"] = [NoiseAdaptiveLR()], 1
        case "noise-split":
            callbacks = [NoiseAdaptiveLR(estimator="split")]
        case "radius" | "radius-jvp":
            estimator: Any = "jvp" if name == "radius-jvp" else "secant"
            callbacks = [StepRadius(every_n_steps=1, samples=1000, budget=None, estimator=estimator)]
        case "clip":
            callbacks = [StepRadius(mode="clip", target=1e-3, samples=1000)]
        case "curvature":
            callbacks = [CurvatureMonitor(every_n_steps=1, samples=1000, budget=None, tol=1e-4, max_products=100)]
        case "local-noise":
            callbacks = [LayerMonitor(noise="ranks")]
        case "columns":
            callbacks, how = [NoiseAdaptiveLR(), StepRadius(mode="clip", target=1e-3, samples=1000)], name
        case "in-part" | "replicated":
            callbacks, how = [StepRadius()], name
        case "tensor-parallel":
            callbacks, tensor = [StepRadius()], 2
        case "scion" | "muon":
            optimizer = name
    if name.endswith("-split"):
        options["accumulate_grad_batches"] = 2
    if world > 1:
        strategy = ModelParallelStrategy(data_parallel_size=world // tensor, tensor_parallel_size=tensor)
        options = {"devices": world, "strategy": strategy, "use_distributed_sampler": False, **options}
    recorder = Recorder()
    data = classification_data()
    mine = DistributedSampler(data, world, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
    loader = DataLoader(data, batch_size=16 // world, sampler=mine, drop_last=True)
    make = partial(Sharded, optimizer, how)
    checkpoint = None
    if name == "noise-resumed":
        _, trainer = fit([NoiseAdaptiveLR()], make, loader, **{**options, "max_steps": 2})
        assert folder is not None
        checkpoint = str(folder / "half.ckpt")
        trainer.save_checkpoint(checkpoint)
        options["strategy"] = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
    options.update(logger=recorder, log_every_n_steps=1000)
    module, _ = fit(callbacks, make, loader, ckpt_path=checkpoint, **options)
    return {
        "weights": whole(module),
        "rows": recorder.rows,
        "ratios": next((c.state_dict()["ratios"] for c in callbacks if isinstance(c, NoiseAdaptiveLR)), {}),
    }


MEASURED = ("layers", "layers-split", "noise", "noise-split", "radius", "radius-jvp", "clip", "curvature", "columns")
NAMES = ("base", "monitors", "dry", *MEASURED, "noise-held", "noise-resumed")
REFUSED = ("local-noise", "in-part", "replicated", "tensor-parallel", "scion", "muon")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes saw in every scenario, and how it was refused."""
    return run_pair(__file__, tmp_path_factory.mktemp("fsdp"), 300)


def assert_same_weights(a: dict[str, Any], b: dict[str, Any], rel: float = 0.0) -> None:
    for name, w in a["weights"].items():
        assert (w - b["weights"][name]).norm() <= rel * w.norm(), name


@pytest.mark.parametrize("name", NAMES)
def test_all_ranks_end_with_the_same_weights(ranks, name):
    assert_same_weights(ranks[0][name], ranks[1][name])


@pytest.mark.parametrize("name", ["monitors", "dry"])
def test_monitors_and_neutral_interventions_change_no_bit(ranks, name):
    for rank in ranks:
        assert_same_weights(rank["base"], rank[name])
    assert ranks[0][name]["rows"]  # and they did measure


@pytest.mark.parametrize("name", MEASURED)
def test_measurements_and_weights_are_those_of_one_process_on_the_joined_batches(ranks, name):
    single, found = scenario(name, 1), ranks[0][name]
    assert_same_weights(single, found, rel=1e-6)
    assert single["rows"]
    assert list(single["rows"]) == list(found["rows"])
    assert not ranks[1][name]["rows"]  # rank 0 records for all
    for step, row in single["rows"].items():
        assert row.keys() == found["rows"][step].keys()
        for metric, value in row.items():
            if not metric.endswith(("time_ms", "residual")):  # a residual is rounding noise around the tolerance
                # A small difference of large numbers loses digits: gradients of two halves, logits before and after.
                rel = 1e-4 if metric.startswith(("layer/snr", "layer/noise_scale", "step/clip_scale")) else 1e-5
                assert found["rows"][step][metric] == pytest.approx(value, rel=rel), (step, metric)


def test_interventions_do_intervene(ranks):
    assert min(ranks[0]["noise"]["ratios"].values()) < 0.95
    assert ranks[0]["noise"]["ratios"] == ranks[1]["noise"]["ratios"]
    assert min(row["step/clip_scale"] for row in ranks[0]["clip"]["rows"].values()) < 0.5


def test_a_resumed_run_takes_up_the_gradient_that_was_held(ranks):
    for rank in ranks:
        assert_same_weights(rank["noise-held"], rank["noise-resumed"])
    for step in (2, 3):
        row = {k: v for k, v in ranks[0]["noise-held"]["rows"][step].items() if not k.endswith("time_ms")}
        assert row == {k: ranks[0]["noise-resumed"]["rows"][step][k] for k in row}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("local-noise", 'LayerMonitor\\(noise="ranks"\\) needs local gradients'),
        ("in-part", "parameter net.1.weight is not sharded.*fully_shard"),
        ("replicated", "parameter net.0.0.weight is laid out as .*fully_shard"),
        ("tensor-parallel", "StepRadius does not support tensor parallelism"),
        ("scion", "Scion steps whole matrices"),
        ("muon", "MuonAdamW steps whole matrices"),
    ],
)
def test_what_cannot_work_is_refused_on_every_rank(ranks, name, words):
    for rank in ranks:
        assert re.search(words, rank[name]), rank[name]


def outcome(name: str, folder: Path) -> Any:
    if name not in REFUSED:
        return scenario(name, 2, folder)
    with pytest.raises((MisconfigurationException, ValueError)) as refusal:
        scenario(name, 2)
    return str(refusal.value)


def main(folder: str) -> None:
    torch.set_num_threads(1)
    results = {name: outcome(name, Path(folder)) for name in (*NAMES, *REFUSED)}
    torch.save(results, Path(folder) / f"{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main(sys.argv[1])

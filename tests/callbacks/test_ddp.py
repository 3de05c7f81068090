"""Two processes are one run: what every callback measures and does under DDP equals one process on the joined batches.

The file is also the script of those processes, which run all scenarios one after the other and save what they saw.
"""

import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from evolute.callbacks import CurvatureMonitor, LayerMonitor, NoiseAdaptiveLR, SpectrumProbe, StepRadius
from evolute.geometry import gradient_noise_scale
from tests.conftest import fit
from tests.modules import Classifier, Net, Recorder, classification_data

STEPS = 5
DOUBLE: dict[str, Any] = {"precision": "64-true", "max_steps": STEPS}
CURVATURE: dict[str, Any] = {"every_n_steps": 1, "samples": 1000, "budget": None, "tol": 1e-9, "max_products": 100}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))


def net() -> L.LightningModule:
    return Net(mlp(), make=lambda m: torch.optim.AdamW(m.parameters(), lr=0.01))


class Known(Net):
    """``w . x`` averaged: its gradient is the mean of the samples, whatever the weights."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(20, 1, bias=False), make=lambda m: torch.optim.SGD(m.parameters(), lr=1e-3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]).mean()


def known_noise(accumulate: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(9)
    return TensorDataset(torch.ones(20) + 2.5 * torch.randn(120 * 16 * accumulate, 20, generator=generator))


def poisoned() -> TensorDataset:
    """One sample of the second rank's first batch is not a number."""
    x, y = classification_data().tensors
    x = x.clone()
    x[1] = float("nan")
    return TensorDataset(x, y)


class Own(Callback):
    """The gradient of each rank's own batch at the weights before the step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        loss = F.cross_entropy(pl_module.net(batch[0]), batch[1])
        named = dict(pl_module.named_parameters())
        found = torch.autograd.grad(loss, list(named.values()))
        self.gradients.append(dict(zip(named, found, strict=True)))


def scenario(name: str, world: int) -> dict[str, Any]:
    """Run one scenario in ``world`` processes; the global batch is 16 samples whatever their number."""
    options: dict[str, Any] = dict(DOUBLE)
    make: Any = net
    data: Any = classification_data()
    own = Own()
    callbacks: list[Callback] = []
    match name:
        case "base":
            pass
        case "monitors":
            callbacks = [CurvatureMonitor(every_n_steps=1), StepRadius(every_n_steps=1), LayerMonitor(every_n_steps=1)]
        case "dry":
            callbacks = [NoiseAdaptiveLR(power=0.0), StepRadius(mode="clip", target=1e-3, dry_run=True)]
        case "messy" | "messy-monitors":
            make, options = Classifier, {"max_steps": STEPS}
            if name == "messy-monitors":
                callbacks = [
                    CurvatureMonitor(every_n_steps=2, budget=None),
                    StepRadius(every_n_steps=2, budget=None),
                    LayerMonitor(every_n_steps=2, budget=None),
                ]
        case "noise":
            callbacks = [NoiseAdaptiveLR()]
        case "noise-split":
            callbacks, options["accumulate_grad_batches"] = [NoiseAdaptiveLR(estimator="split")], 2
        case "layers-split":
            callbacks = [LayerMonitor(every_n_steps=1, budget=None, noise="split", memory=1)]
            options["accumulate_grad_batches"] = 2
        case "curvature":
            callbacks = [CurvatureMonitor(**CURVATURE, blocks="(net.0.weight)")]
        case "curvature-full":
            callbacks = [CurvatureMonitor(**CURVATURE, preset="full", eigenpairs=2)]
        case "spectrum":
            callbacks = [SpectrumProbe(every_n_steps=1, samples=1000, budget=None, lanczos_steps=20, split=True)]
        case "poisoned":
            callbacks, data = [CurvatureMonitor(**CURVATURE)], poisoned()
            options["max_steps"] = 2
        case "radius":
            callbacks = [StepRadius(every_n_steps=1, samples=1000, budget=None)]
        case "clip":
            callbacks = [StepRadius(mode="clip", target=1e-3, samples=1000)]
        case "ranks" | "ranks-view":
            callbacks = [LayerMonitor(every_n_steps=1, budget=None, memory=1), own]
            if name == "ranks-view":
                options["strategy"] = DDPStrategy(gradient_as_bucket_view=True)
        case "known" | "known-accumulated":
            many = 2 if name == "known-accumulated" else 1
            make, data = Known, known_noise(many)
            options = {"max_steps": 120, "accumulate_grad_batches": many}
            callbacks = [LayerMonitor(every_n_steps=1, budget=None, noise="ranks", memory=120)]
    if world > 1:
        options = {"devices": world, "strategy": "ddp", "use_distributed_sampler": False, **options}
    recorder = Recorder()
    # Lightning's own sampler would shuffle; with this one the ranks share out what one process takes at once.
    mine = DistributedSampler(data, world, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
    loader = DataLoader(data, batch_size=16 // world, sampler=mine, drop_last=True)
    module, _ = fit(callbacks, make, loader, logger=recorder, log_every_n_steps=1000, **options)
    ratios = [c.state_dict()["ratios"] for c in callbacks if isinstance(c, NoiseAdaptiveLR)]
    return {
        "weights": {n: p.detach().clone() for n, p in module.named_parameters()},
        "buffers": [b.clone() for b in module.buffers()],
        "rows": recorder.rows,
        "ratios": ratios[0] if ratios else {},
        "gradients": own.gradients,
    }


NAMES = [
    "base", "monitors", "dry", "messy", "messy-monitors", "noise", "noise-split", "layers-split", "curvature",
    "curvature-full", "spectrum", "poisoned", "radius", "clip", "ranks", "ranks-view", "known", "known-accumulated",
]  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two processes saw in every scenario."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={
                **os.environ,
                "PYTHONPATH": str(root),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "NODE_RANK": "0",
                "LOCAL_RANK": str(rank),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [p.communicate(timeout=240)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    for p, output in zip(processes, outputs, strict=True):
        assert p.returncode == 0, output[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def assert_same_weights(a: dict[str, Any], b: dict[str, Any], rel: float | None = None) -> None:
    for name, w in a["weights"].items():
        if rel is None:
            assert torch.equal(w, b["weights"][name]), name
        else:
            assert torch.allclose(w, b["weights"][name], rtol=rel, atol=rel), name


@pytest.mark.parametrize("name", NAMES)
def test_all_ranks_end_with_the_same_weights(ranks, name):
    if name != "poisoned":
        assert_same_weights(ranks[0][name], ranks[1][name])


@pytest.mark.parametrize(("base", "name"), [("base", "monitors"), ("base", "dry"), ("messy", "messy-monitors")])
def test_monitors_and_neutral_interventions_change_no_bit(ranks, base, name):
    for rank in ranks:
        assert_same_weights(rank[base], rank[name])
        assert all(torch.equal(a, b) for a, b in zip(rank[base]["buffers"], rank[name]["buffers"], strict=True))
    assert ranks[0][name]["rows"]  # and they did measure


@pytest.mark.parametrize("name", ["noise", "noise-split"])
def test_noise_ratios_are_those_of_one_process_on_every_rank(ranks, name):
    single = scenario(name, 1)
    assert ranks[0][name]["ratios"] == ranks[1][name]["ratios"]
    assert min(single["ratios"].values()) < 0.95
    for layer, ratio in single["ratios"].items():
        assert ranks[0][name]["ratios"][layer] == pytest.approx(ratio, rel=1e-9)
    assert_same_weights(single, ranks[0][name], rel=1e-9)


@pytest.mark.parametrize(
    ("name", "metrics", "rel"),
    [
        ("curvature", ["loss", "sharpness", "trace", "directional", "step_quadratic"], 1e-7),
        ("curvature", ["threshold", "eos_ratio", "block_sharpness/net.0.weight"], 1e-6),
        (
            "curvature-full",
            ["lambda/2", "lambda_min", "grad_rayleigh", "loss_change", "block_trace/net.0", "gns_ratio"],
            1e-6,
        ),
        ("curvature-full", ["model_agreement", "critical_ratio", "critical_error"], 1e-5),
        ("spectrum", ["lambda_max", "lambda_min", "ggn_sharpness", "residual_ratio", "neg_mass"], 1e-6),
        ("radius", ["norm", "ghost_ratio", "ghost_radius"], 1e-8),
        ("clip", ["ghost_ratio", "clip_scale"], 1e-8),
        ("layers-split", ["grad_norm", "noise_scale", "snr/net.0.weight", "update_ratio/net.2.bias"], 1e-7),
    ],
)
def test_measurements_are_those_of_one_process_on_the_joined_batches(ranks, name, metrics, rel):
    single = scenario(name, 1)
    assert_same_weights(single, ranks[0][name], rel=1e-9)
    prefix = {
        "curvature": "curvature",
        "curvature-full": "curvature",
        "spectrum": "spectrum",
        "layers-split": "layer",
    }.get(name, "step")
    assert list(single["rows"]) == list(ranks[0][name]["rows"]) == list(range(STEPS))
    for step, row in single["rows"].items():
        for metric in metrics:
            found = ranks[0][name]["rows"][step][f"{prefix}/{metric}"]
            assert found == pytest.approx(row[f"{prefix}/{metric}"], rel=rel), (step, metric)
    assert not ranks[1][name]["rows"]  # rank 0 records for all


def test_a_loss_that_is_not_a_number_on_one_rank_is_noticed_by_both(ranks):
    for step in range(2):
        assert ranks[0]["poisoned"]["rows"][step]["curvature/nonfinite"] == 1.0


@pytest.mark.parametrize("name", ["ranks", "ranks-view"])
def test_noise_from_ranks_compares_their_own_gradients_with_the_mean(ranks, name):
    for step in range(STEPS):
        own = [rank[name]["gradients"][step] for rank in ranks]
        row = ranks[0][name]["rows"][step]
        signal = noise = 0.0
        for layer in own[0]:
            small = sum(g[layer].square().sum() for g in own) / 2
            big = ((own[0][layer] + own[1][layer]) / 2).square().sum()
            found = gradient_noise_scale(small, big, 8, 16)
            signal, noise = signal + found.grad_sq.item(), noise + found.trace.item()
            assert found.trace > 0  # of two ranks it always is
            snr = max(found.grad_sq.item(), 0.0) / (found.trace.item() / 16)
            assert row[f"layer/snr/{layer}"] == pytest.approx(snr, rel=1e-8)
            assert row[f"layer/grad_norm/{layer}"] == pytest.approx(big.sqrt().item(), rel=1e-8)
        if signal > 0:
            assert row["layer/noise_scale"] == pytest.approx(noise / signal, rel=1e-8)
        else:  # drowned by the noise: nothing can be said
            assert "layer/noise_scale" not in row


@pytest.mark.parametrize("name", ["known", "known-accumulated"])
def test_noise_from_ranks_finds_a_known_noise_scale(ranks, name):
    assert ranks[0][name]["rows"][119]["layer/noise_scale"] == pytest.approx(2.5**2, rel=0.2)


def main(folder: str) -> None:
    run = partial(scenario, world=2)
    torch.save({name: run(name) for name in NAMES}, Path(folder) / f"{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main(sys.argv[1])

"""A run folder with realistic numbers, written without training anything."""

import csv
import json
import math
from pathlib import Path

import numpy as np

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
LAYERS = [
    "model.embed_tokens.weight",
    *(f"model.layers.{block}.{part}.weight" for block in range(6) for part in PARTS),
    "model.layers.0.input_layernorm.weight",
    "model.layers.5.input_layernorm.weight",
    "model.norm.weight",
    "lm_head.weight",
]
assert len(LAYERS) == 41
OF_OTHER_TASKS = {"views", "quality"}
"""Sections that a language model's run has nothing for."""


def write_run(
    folder: Path, *, steps: int = 1000, every: int = 20, seed: int = 0, speed: float = 1.0, layers: list[str] = LAYERS
) -> Path:
    """Write a run folder: 41 layers measured every ``every`` steps, a loss at each step. ``speed`` scales learning."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    level = dict(zip(layers, rng.uniform(0.3, 1.0, len(layers)), strict=True))
    rows = [_row(step, steps, every, rng, level, speed) for step in range(steps)]
    header = ["step", "epoch", *dict.fromkeys(name for row in rows for name in row if name not in ("step", "epoch"))]
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, header, restval="")
        writer.writeheader()
        writer.writerows(rows)
    (folder / "config.yaml").write_text(
        f"# lightning.pytorch==2.6.6\nseed_everything: {seed}\ntrainer:\n  max_steps: {steps}\n  callbacks:\n"
        "  - class_path: evolute.callbacks.CurvatureMonitor\n    init_args:\n      every_n_steps: 20\n"
        f"model:\n  lr: {0.01 * speed:g}\n"
    )
    for step in range(0, steps, 100):
        _write_spectrum(folder / "arrays" / "spectrum", step, rng)
    _write_items(folder, (0, 100 * ((steps - 1) // 100)), rng)
    environment = {
        "bigram_floor_bits_per_byte": 3.412,
        "command": "evolute fit --config llm/pretrain",
        "seed": seed,
        "versions": {"python": "3.11.9", "torch": "2.13.0", "lightning": "2.6.6"},
        "corpus": {"hash": "9f2c1e", "bytes": 14_500_000},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    samples = [
        {
            "step": step,
            "prompt": "def read(path):\n    ",
            "text": f"with open(path) as file:\n        return {step}",
        }
        for step in range(0, steps + 1, max(steps // 4, 1))
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder


def _write_spectrum(folder: Path, step: int, rng: np.random.Generator) -> None:
    """Write the arrays of one spectrum: a bulk, three outliers, and some negative eigenvalues."""
    folder.mkdir(parents=True, exist_ok=True)
    outliers = np.array([80.0, 40.0, 20.0]) / (1 + step / 300)
    arrays: dict[str, np.ndarray] = {}
    for head, low in (("", -1.0), ("ggn_", 0.0), ("residual_", -1.0)):
        nodes = np.concatenate([np.linspace(low, 1.0, 37), outliers[::-1] if head != "residual_" else [1.1, 1.2, 1.3]])
        weights = np.concatenate([rng.dirichlet(np.ones(37)) * (1 - 3e-6), np.full(3, 1e-6)])
        arrays |= {f"{head}nodes": nodes[None], f"{head}weights": weights[None], f"{head}outliers": outliers}
        arrays |= {f"{head}size": np.array(1_000_000)}
    np.savez(folder / f"{step:08d}.npz", **arrays)


def _write_items(folder: Path, steps: tuple[int, ...], rng: np.random.Generator) -> None:
    """Write the item vectors at two steps, and what the items are called."""
    for step in dict.fromkeys(steps):
        path = folder / "arrays" / "item_geometry" / f"{step:08d}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, table=rng.normal(size=(40, 5)))
    names = {"title": [f"Film <{i}> $x$" for i in range(40)], "genre": ["War", "Noir", "Comedy", "Sci-Fi"] * 10}
    (folder / "items.json").write_text(json.dumps({**names, "count": list(range(40))}))


def _row(
    step: int, steps: int, every: int, rng: np.random.Generator, level: dict[str, float], speed: float
) -> dict[str, float]:
    done = step / steps
    loss = 1.35 + 4.2 * math.exp(-speed * step / 120) + 0.05 * rng.standard_normal()
    lr = 0.01 * min(1.0, (step + 1) / 50) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))
    row: dict[str, float] = {
        "step": step,
        "epoch": step // 400,
        "train/loss": loss,
        "train/tokens_per_s": 21_000 + 900 * rng.standard_normal(),
        "reward": 0.8 * done + 0.1 * math.sin(step),
        "lr": lr,
        "time/step_ms": 95 + 4 * rng.standard_normal(),
    }
    if step % every == 0:
        threshold = 2 / lr
        sharp = threshold * min(1.05, 0.05 + 1.3 * done) * math.exp(0.06 * rng.standard_normal())
        row |= {
            "curvature/sharpness": sharp,
            "curvature/threshold": threshold,
            "curvature/eos_ratio": sharp / threshold,
        }
        row |= {"curvature/trace": 6 * sharp, "curvature/trace_stderr": 0.8 * sharp, "curvature/time_ms": 55.0}
        row |= {"layer/noise_scale": 12 * math.exp(2.2 * done + 0.3 * rng.standard_normal()), "layer/time_ms": 6.0}
        row["noise/time_ms"] = 40.0
        row |= {"curvature/critical_ratio": min(1.05, 0.1 + done), "curvature/critical_sharpness": 2 * sharp / 3}
        row |= {"curvature/model_agreement": 1 - 0.4 * done, "curvature/gns_ratio": 0.1 + 0.5 * done}
        for name, base in level.items():
            row[f"curvature/block_sharpness/{name}"] = sharp * base
            row[f"curvature/block_trace/{name}"] = 6 * sharp * base - sharp
        for name, base in level.items():
            wobble = math.exp(0.05 * rng.standard_normal())
            row[f"noise/{name}"] = base**-2 * wobble * 10 ** (-1.5 * done)
            row[f"lr_ratio/{name}"] = min(1.0, base * wobble)
            row[f"layer_lr/{name}"] = lr * min(1.0, base * wobble)
            row[f"layer/update_ratio/{name}"] = lr * 0.15 * wobble / base
            row[f"layer/snr/{name}"] = base * math.exp(-2 * done) * wobble
    if step % 100 == 0:
        row |= {"spectrum/lambda_max": 80 / (1 + step / 300), "spectrum/lambda_min": -1.0, "spectrum/bulk_edge": 1.1}
        row |= {f"item_geometry/{name}": 2.0 - done for name in ("norm_ratio", "mean_cos", "kappa_hess", "kept")}
        row |= {"spectrum/ggn_sharpness": 80 / (1 + step / 300), "spectrum/outliers": 3.0}
    if step % 10 == 0:
        ratio = 0.25 * math.exp(0.5 * rng.standard_normal()) * (1 + 2 * math.exp(-step / 60))
        row |= {"step/ghost_ratio": ratio, "step/ghost_ratio_p99": 0.6 * ratio, "step/time_ms": 9.0}
        row["step/clip_scale"] = min(1.0, 1 / ratio)
    if step % 100 == 99 or step == steps - 1:
        row |= {"val/pass@1": 0.7 * done, "val/greedy": 0.8 * done}
        row |= {"val/hr@10": 0.1 * done, "val/ndcg@10": 0.05 * done}
        val = loss + 0.06
        row |= {"val/loss": val, "val/bits_per_byte": val / math.log(2), "val/perplexity": math.exp(val)}
    return row

"""Tables and bars of benchmarks/curvature.py, from its JSON files. Imports nothing but the standard library."""

import itertools
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

OURS = "evolute"
TOL = 1e-3 * 1.001
PRODUCT_BARS = {"mlp": 2.2, "gpt": 2.2, "cnn": 2.7}
Run = dict[str, Any]


def report(results: Path) -> int:
    """Print what is there; return 1 if a bar is missed."""
    runs = [json.loads(p.read_text()) for m in PRODUCT_BARS for p in sorted(results.glob(f"{m}-[0-9]*-[0-9]*.json"))]
    unaided = [json.loads(p.read_text()) for p in sorted(results.glob("unaided-*.json"))]
    models = [m for m in PRODUCT_BARS if any(r["model"] == m for r in runs)]
    bars: list[tuple[bool, str]] = []
    print(f"{len(runs)} runs")
    bars += products(runs, models)
    bars += sharpest(runs, models)
    bars += top(runs, models, "the number of steps known")
    bars += top(unaided, models, "each stops by itself")
    if (results / "accuracy.json").exists():
        bars += accuracy(json.loads((results / "accuracy.json").read_text()))
    memories = [json.loads(p.read_text()) for p in sorted(results.glob("memory-*.json"))]
    if memories:
        bars += memory(memories, runs, models)
    if (results / "ghost.json").exists():
        g = json.loads((results / "ghost.json").read_text())
        one, both = g["recomputed_spread"], g["head_spread"]
        text = f"ghost, 50k classes: {spread(one['ratios'], '.2f')} forward passes of the head (at most 1.3)"
        bars.append((one["ratio"] <= 1.3, f"{text}; without any logits {spread(both['ratios'], '.2f')}"))
        text = f"ghost, 50k classes: peak {one['mib']:.0f} MiB beside the logits after the step, {g['logits_mib']:.0f}"
        bars.append((one["mib"] < g["logits_mib"] / 2, text))
    print()
    for met, text in bars:
        print("met   " if met else "MISSED", text)
    return 0 if all(met for met, _ in bars) else 1


def products(runs: list[Run], models: list[str]) -> list[tuple[bool, str]]:
    rows, bars = [], []
    for model in models:
        of = [r["products"] for r in runs if r["model"] == model]
        ratios = [p["product_ratio"] for p in of]
        middle = statistics.median(ratios)
        rows.append([model, f"{1e3 * statistics.median(p['gradient'] for p in of):.1f}", spread(ratios, ".2f")])
        bars.append((middle <= PRODUCT_BARS[model], f"product, {model}: {middle:.2f} (at most {PRODUCT_BARS[model]})"))
    table("one product on a kept graph", ["model", "gradient ms", "product, gradients"], rows)
    return bars


def sharpest(runs: list[Run], models: list[str]) -> list[tuple[bool, str]]:
    rows, worst = [], {"cold": 0.0, "warm": 0.0}
    for model, stage, group in grouped(runs, models):
        row = [model, str(stage)]
        for kind in ("cold", "gradient", "warm"):
            cost = [r["sharpest"][kind]["seconds"] / r["products"]["gradient"] for r in group]
            count = statistics.median(r["sharpest"][kind]["products"] for r in group)
            row.append(f"{spread(cost, '.1f')}, {count:g} products")
            if model == "gpt" and kind in worst:
                worst[kind] = max(worst[kind], statistics.median(cost))
        row.append(f"{max(r['sharpest'][k]['residual'] for r in group for k in r['sharpest']):.1e}")
        rows.append(row)
    head = ["model", "steps", "from noise", "from the gradient", "warm", "worst residual"]
    table("largest eigenvalue, gradients", head, rows)
    if "gpt" not in models:
        return []
    return [(worst[kind] <= bar, f"top-1 {kind}, gpt, worst stage: {worst[kind]:.1f} gradients (at most {bar})")
            for kind, bar in (("cold", 35), ("warm", 8))]  # fmt: skip


def top(runs: list[Run], models: list[str], which: str) -> list[tuple[bool, str]]:
    rows: list[list[str]] = []
    factors: dict[str, list[float]] = {model: [] for model in models}
    for model, stage, group in grouped(runs, models):
        for arm in dict.fromkeys(arm for r in group for arm in r["top"]):
            of = [
                (r["top"][arm], r["products"]["gradient"], r["top"][OURS]["seconds"]) for r in group if arm in r["top"]
            ]
            if "error" in of[0][0]:
                rows.append([model, str(stage), arm, "fails", "", of[0][0]["error"], ""])
                continue
            cost, residuals = [x["seconds"] / g for x, g, _ in of], [x["residual"] for x, _, _ in of]
            counts = [x["products"] for x, _, _ in of if x["products"] is not None]
            reached = sum(r <= TOL for r in residuals)
            count = f"{statistics.median(counts):g}" if counts else ""
            rows.append([model, str(stage), arm, spread(cost, ".0f"), count,
                         f"{statistics.median(residuals):.1e}, {reached} of {len(of)}",
                         f"{statistics.median(x['seconds'] / ours for x, _, ours in of):.2f}"])  # fmt: skip
        factors[model] += [best / r["top"][OURS]["seconds"] for r in group if (best := best_peer(r))]
    head = ["model", "steps", "arm", "gradients", "products", "true residual, reached", "of ours"]
    table(f"ten eigenpairs, {which}", head, rows)
    bars: list[tuple[bool, str]] = []
    for model, found in factors.items():
        middle = statistics.median(found) if found else float("nan")
        bars.append((middle >= 1.5, f"top-10, {which}, {model}: {spread(found, '.2f')} times the best peer (1.5)"))
    best = max((statistics.median(f) for f in factors.values() if f), default=float("nan"))
    bars.append((best >= 3, f"top-10, {which}, the best of the models: {best:.2f} (3)"))
    failed = [r for r in runs if r["top"][OURS]["residual"] > TOL]
    bars.append(
        (not failed, f"top-10, {which}: ours reaches the residual in {len(runs) - len(failed)} of {len(runs)} runs")
    )
    return bars


def best_peer(run: Run) -> float | None:
    """Seconds of the fastest peer that reached the residual."""
    reached = [
        x["seconds"] for arm, x in run["top"].items() if arm != OURS and "error" not in x and x["residual"] <= TOL
    ]
    return min(reached, default=None)


def accuracy(found: dict[str, Any]) -> list[tuple[bool, str]]:
    rows = [[arm, f"{error:.1e}"] for arm, error in found["errors"].items()]
    table(f"from the dense float64 Hessian, LayerNorm transformer, {found['parameters']} parameters",
          ["arm", "relative error"], rows)  # fmt: skip
    error = found["errors"][OURS]
    return [(error <= 1e-5, f"error against the dense Hessian: {error:.1e} (at most 1e-5)")]


def memory(found: list[dict[str, Any]], runs: list[Run], models: list[str]) -> list[tuple[bool, str]]:
    rows, bars = [], []
    for model in models:
        of = {m["arm"]: m["mib"] for m in found if m["model"] == model}
        one = next((r["top"] for r in runs if (r["model"], r["stage"], r["batch"]) == (model, 100, 0)), {})
        reached = [arm for arm in of if arm != OURS and one.get(arm, {}).get("residual", 1.0) <= TOL]
        short = {arm for arm in one if arm != OURS and arm not in reached}
        rows += [[model, arm, f"{mib:.0f}", "residual not reached" if arm in short else ""] for arm, mib in of.items()]
        if OURS in of and reached:
            ratio = of[OURS] / min(of[arm] for arm in reached)
            bars.append((ratio <= 1.5, f"memory, {model}: {ratio:.2f} of the best peer that reaches it (at most 1.5)"))
    table("peak memory of a top-10 run", ["model", "arm", "MiB", ""], rows)
    return bars


def grouped(runs: list[Run], models: list[str]) -> Iterable[tuple[str, int, list[Run]]]:
    """Yield model, stage and its runs, the first batch (which has all arms) first."""
    key: Callable[[Run], tuple[int, int]] = lambda r: (models.index(r["model"]), r["stage"])  # noqa: E731
    for (model, stage), group in itertools.groupby(sorted(runs, key=lambda r: (*key(r), r["batch"])), key=key):
        yield models[model], stage, list(group)


def spread(values: list[float], form: str) -> str:
    if not values:
        return "none"
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n{title}\n")
    for row in [head, ["---"] * len(head), *rows]:
        print("| " + " | ".join(row) + " |")

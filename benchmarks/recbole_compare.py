"""RecBole 1.2.1 beside ours: SASRec and GRU4Rec on MovieLens-100K, one thread, same split, same targets.

    evolute data ml-100k
    python benchmarks/recbole_compare.py --setup    # once: RecBole's own environment, benchmarks/.venv-recbole
    python benchmarks/recbole_compare.py run        # resumable, each run its own process; 2 hours, nearly all RecBole's
    python benchmarks/recbole_compare.py table      # what benchmarks/README.md shows, and the bars

Leave-one-out, ties in file order, full ranking over all 1,682 items, seen ones kept, d = 64, cross entropy over all
items. RecBole runs with its own hyper-parameters for ten epochs; it is given the place of an event in its history for a
time, so that its order is ours (it keeps times in float32, steps of 64 s; of the file as it comes, 4 of the 943 test
items are others). Ours runs until validation has not risen for ten epochs, with the rates of tf_llmer.py. Seconds are
of processor time; an epoch's are of training alone, an evaluation's of one call of each side's own ``evaluate`` and
``Trainer.test``. One JSON a run in results/recbole.

Bars, against each of our arms: a tenth of the CPU time an epoch, evaluation as fast, peak memory as small (all of the
process, and over its imports), NDCG@10 as high within RecBole's CPU time and at our best validation epoch, whichever is
higher of RecBole's last epoch and its best validation epoch.
"""

import argparse
import itertools
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from evolute.callbacks import ItemEmbeddingNorm
from evolute.data import InteractionDataModule
from evolute.models.recommender import ranking_metrics, target_ranks
from evolute.recipes.recommender import Recommend

HERE = Path(__file__).resolve().parent
PYTHON = HERE / ".venv-recbole" / "bin" / "python"
RESULTS = HERE / "results" / "recbole"
DATA = RESULTS / "data" / "ml-100k-ordered"
PEERS = {"sasrec": "SASRec", "gru4rec": "GRU4Rec"}
ARMS: dict[str, dict[str, Any]] = {"random": {"lr": 1e-2}, "normalised": {"lr": 3e-3, "temperature": 0.1}}
SEEDS = (2, 3)
EPOCHS, PATIENCE, MOST = 10, 10, 80


def setup() -> None:
    """Create RecBole's environment: every package pinned and none resolved, since RecBole's own pins do not hold."""
    folder = PYTHON.parent.parent
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(PYTHON), "-m", "pip", "install", "-q", "--no-deps", "-r", str(HERE / "recbole.txt")]
    subprocess.run(install, check=True)


def memory(field: str) -> float:
    """A field of /proc/self/status in MB: VmRSS, what is resident; VmHWM, the most there was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(field))


def interactions(seed: int = 0) -> InteractionDataModule:
    data = InteractionDataModule(batch_size=32, seed=seed)
    data.setup("fit")
    return data


def write_ordered(data: InteractionDataModule, folder: Path) -> None:
    """Write all events as RecBole's atomic file, users and items by our numbers, times by place in the history."""
    log: Any = data.log
    users = np.repeat(np.arange(data.n_users), np.diff(log.offsets))
    places = np.arange(len(users)) - log.offsets[users]
    rows = np.stack([users, log.items, places], 1)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{folder.name}.inter"
    np.savetxt(path, rows, "%d", "\t", header="user_id:token\titem_id:token\ttimestamp:float", comments="")


class Epochs(Callback):
    """What each epoch cost and where it puts the targets; stops when validation has not risen for long."""

    def __init__(self, data: InteractionDataModule) -> None:
        self.loaders = {"val": data.val_dataloader(), "test": data.test_dataloader()}
        self.rows: list[dict[str, Any]] = []
        self.losses: list[torch.Tensor] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.begin = time.process_time()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].detach())

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        row: dict[str, Any] = {"epoch": len(self.rows) + 1, "cpu_s": time.process_time() - self.begin}
        row |= {"loss": float(torch.stack(self.losses).mean()), "train_peak_mb": memory("VmHWM")}
        self.losses.clear()
        module.eval()
        for stage, loader in self.loaders.items():
            ranks: list[int] = []
            with torch.no_grad():
                for batch in loader:
                    queries, table = module.user_queries(batch)
                    ranks += target_ranks(queries, table, batch["target"]).tolist()
            row[stage] = {"ranks": ranks}
        module.train()
        self.rows.append(row)
        scores = [ndcg(r, "val") for r in self.rows]
        trainer.should_stop = len(scores) - 1 - int(np.argmax(scores)) >= PATIENCE
        self.begin = time.process_time()


def ndcg(row: dict[str, Any], stage: str) -> float:
    return float(ranking_metrics(torch.tensor(row[stage]["ranks"]), [10])["ndcg@10"])


def fit(encoder: str, arm: str, seed: int, out: Path, published: bool = False) -> None:
    """Train ours once, in this process, whose memory is what is measured; SASRec with its head, or as published."""
    imports = memory("VmRSS")
    L.seed_everything(seed, verbose=False)
    begin = time.process_time()
    data = interactions(seed)
    prepare = time.process_time() - begin
    epochs, chosen = Epochs(data), ARMS[arm]
    norm = [ItemEmbeddingNorm(temperature=chosen["temperature"])] if "temperature" in chosen else []
    arguments: dict[str, Any] = {"lr": 3e-3, "encoder_args": {"head": False}} if published else {"lr": chosen["lr"]}
    module = Recommend(encoder=encoder, **arguments)  # type: ignore[arg-type]
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=MOST, gradient_clip_val=5.0, logger=False, callbacks=[epochs, *norm],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, data)
    seconds = []
    for _ in range(5):
        begin = time.process_time()
        trainer.test(module, data, verbose=False)
        seconds.append(time.process_time() - begin)
    found = {"encoder": encoder, "arm": arm, "seed": seed, "prepare_s": prepare, "imports_mb": imports,
             "test_cpu_s": seconds, "peak_mb": memory("VmHWM"), "epochs": epochs.rows,
             "parameters": sum(p.numel() for p in module.parameters())}  # fmt: skip
    out.write_text(json.dumps(found))
    best = max(epochs.rows, key=lambda row: ndcg(row, "val"))
    each = np.median([row["cpu_s"] for row in epochs.rows])
    print(f"{encoder}, {arm}, seed {seed}: {len(epochs.rows)} epochs of {each:.1f} CPU s, best {best['epoch']}, "
          f"NDCG@10 {ndcg(best, 'test'):.4f}", flush=True)  # fmt: skip


def run(encoders: list[str], python: Path, epochs: int) -> None:
    """Make what is missing: ours first, then RecBole's epochs."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_ordered(interactions(), DATA)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for encoder, arm, seed in itertools.product(encoders, ARMS, SEEDS):
        if not (RESULTS / f"{encoder}-{arm}-{seed}.json").exists():
            command = [sys.executable, __file__, "ours", "--encoders", encoder, "--arm", arm, "--seed", str(seed)]
            subprocess.run(command, check=True, env=environment)
    if not python.exists():
        sys.exit(f"RecBole is not installed: run {sys.argv[0]} --setup first")
    for encoder in encoders:
        out = RESULTS / f"recbole-{PEERS[encoder]}.json"
        command = [str(python), "-W", "ignore", str(HERE / "recbole_arm.py"), "--model", PEERS[encoder]]
        command += ["--data", str(DATA), "--epochs", str(epochs), "--out", str(out)]
        subprocess.run(command, check=True, env=environment, cwd=RESULTS)


def check(peer: dict[str, Any], data: InteractionDataModule) -> float:
    """Demand the same users and targets of RecBole; return how far its own NDCG@10 is from ours of its scores.

    Raises:
        ValueError: if a target differs.
    """
    furthest = 0.0
    for stage, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        users = torch.cat([batch["user"] for batch in loader]).tolist()
        targets = torch.cat([batch["target"] for batch in loader]).tolist()
        for row in peer["epochs"]:
            if row[stage]["users"] != users or row[stage]["targets"] != targets:
                raise ValueError(f"{peer['model']}: RecBole's {stage} targets are not ours")
            furthest = max(furthest, abs(row[stage]["own"]["ndcg@10"] - ndcg(row, stage)))
    return furthest


def within(rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The epoch of the best validation among those trained within some processor time."""
    spent = np.cumsum([row["cpu_s"] for row in rows])
    return max((r for r, s in zip(rows, spent, strict=True) if s <= seconds), key=lambda row: ndcg(row, "val"))


def until(rows: list[dict[str, Any]], score: float) -> float:
    """Processor seconds of training until validation NDCG@10 reaches a score."""
    spent = np.cumsum([row["cpu_s"] for row in rows])
    return next((float(s) for r, s in zip(rows, spent, strict=True) if ndcg(r, "val") >= score), float("inf"))


def shown(values: list[float]) -> str:
    spread = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"


def costs(found: dict[str, Any]) -> dict[str, float]:
    """What one run cost: seconds an epoch, users a second, memory, memory over the imports."""
    rows = found["epochs"]
    tests = found.get("test_cpu_s") or [row[stage]["cpu_s"] for row in rows for stage in ("val", "test")]
    peak = max([found.get("peak_mb", 0), *(row.get("peak_mb", 0) for row in rows)])
    return {"epoch": float(np.median([row["cpu_s"] for row in rows])),
            "users": len(rows[0]["test"]["ranks"]) / float(np.median(tests)),
            "peak": peak, "over": peak - found["imports_mb"]}  # fmt: skip


def table(encoders: list[str]) -> Iterator[str]:
    """Print what there is; yield each bar that is missed, and what was not run."""
    print("| model | epochs | CPU s an epoch | evaluation, users a CPU s | peak memory, MB (over imports) | NDCG@10 | "
          "within RecBole's CPU s | CPU s to RecBole's validation |\n|" + "---|" * 8)  # fmt: skip
    data = interactions()
    for encoder in encoders:
        path = RESULTS / f"recbole-{PEERS[encoder]}.json"
        if not path.exists():
            yield f"{encoder}: RecBole's was not run"
            continue
        peer = json.loads(path.read_text())
        if len(peer["epochs"]) < EPOCHS:
            yield f"{encoder}: {len(peer['epochs'])} of RecBole's {EPOCHS} epochs were run"
        off = check(peer, data)
        c, rows = costs(peer), peer["epochs"]
        best, total = max(rows, key=lambda row: ndcg(row, "val")), sum(row["cpu_s"] for row in rows)
        theirs = max(ndcg(best, "test"), ndcg(rows[-1], "test"))
        print(f"| {PEERS[encoder]}, RecBole | {len(rows)} | {c['epoch']:.0f} | {c['users']:.0f} | {c['peak']:.0f} "
              f"({c['over']:.0f}) | {ndcg(best, 'test'):.4f}, last {ndcg(rows[-1], 'test'):.4f} | in {total:.0f} s | "
              f"{until(rows, ndcg(best, 'val')):.0f} |")  # fmt: skip
        for arm in ARMS:
            runs = [json.loads(p.read_text()) for p in sorted(RESULTS.glob(f"{encoder}-{arm}-*.json"))]
            if not runs:
                yield f"{encoder}, {arm}: not run"
                continue
            each = [costs(r) for r in runs]
            o = {name: float(np.mean([e[name] for e in each])) for name in each[0]}
            final = [ndcg(within(r["epochs"], float("inf")), "test") for r in runs]
            equal = [ndcg(within(r["epochs"], total), "test") for r in runs]
            reach = [until(r["epochs"], ndcg(best, "val")) for r in runs]
            if len(runs) < len(SEEDS):
                yield f"{encoder}, {arm}: {len(runs)} of {len(SEEDS)} seeds were run"
            lengths = sorted(len(r["epochs"]) for r in runs)
            print(f"| {PEERS[encoder]}, ours, {arm} | {lengths[0]} to {lengths[-1]} | {o['epoch']:.1f} "
                  f"({c['epoch'] / o['epoch']:.0f}x less) | {o['users']:.0f} | {o['peak']:.0f} ({o['over']:.0f}) | "
                  f"{shown(final)} | {shown(equal)} | {np.mean(reach):.0f} |")  # fmt: skip
            bars = {"CPU an epoch": c["epoch"] >= 10 * o["epoch"], "evaluation": o["users"] >= c["users"],
                    "peak memory": o["peak"] <= c["peak"], "memory over imports": o["over"] <= c["over"],
                    "NDCG@10 at our best epoch": np.mean(final) >= theirs,
                    "NDCG@10 within RecBole's CPU time": np.mean(equal) >= theirs}  # fmt: skip
            yield from (f"{encoder}, {arm}: {name}" for name, met in bars.items() if not met)
        print(f"<!-- RecBole's NDCG@10 and ours of its scores differ by at most {off:.1e} -->")


def main() -> int:
    """Run a command; return 1 if a bar is missed."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=("run", "table", "ours"))
    parser.add_argument("--setup", action="store_true", help="install RecBole and stop")
    parser.add_argument("--encoders", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--python", type=Path, default=PYTHON, help="of an environment that has RecBole")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of RecBole's")
    parser.add_argument("--arm", choices=list(ARMS), default="random", help="of ours")
    parser.add_argument("--seed", type=int, default=SEEDS[0], help="of ours")
    parser.add_argument("--published", action="store_true", help="our SASRec without its head; not in the table")
    a = parser.parse_args()
    if a.setup:
        setup()
    elif a.what == "run":
        run(a.encoders, a.python, a.epochs)
    elif a.what == "ours":
        name = f"{'published-' if a.published else ''}{a.encoders[0]}-{a.arm}-{a.seed}.json"
        fit(a.encoders[0], a.arm, a.seed, RESULTS / name, a.published)
    elif a.what == "table":
        missed = list(table(a.encoders))
        print("\nmissed or not run: " + ("; ".join(missed) or "none"))
        return int(bool(missed))
    else:
        parser.error("say run or table, or --setup")
    return 0


if __name__ == "__main__":
    sys.exit(main())

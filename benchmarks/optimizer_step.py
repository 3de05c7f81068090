"""How long does a step of Scion take against ``torch.optim.Muon``, and is it the same step?

Both step the hidden matrices of (a) a Llama of one million parameters and (b) a GPT of the size of GPT-2 small, with
the same gradients and the same momentum, in turns, in one process. The column "from float64" holds the largest
difference of an entry of Scion's orthogonalised matrix from the same recursion in float64; "from torch" the relative
difference of the two updates (Frobenius norm, shape factors divided out).

    python benchmarks/optimizer_step.py --json out.json
    python benchmarks/optimizer_step.py --sizes gpt --blocks 12     # the whole GPT

On a CPU that emulates bfloat16, torch takes over a minute for one block of the GPT, so one block of the twelve is the
default there: both times are linear in the number of blocks (torch steps one matrix at a time).

Bars: torch's step at least 10 times as long on a CPU without native bfloat16 products, and no shorter elsewhere;
updates within 2 % of torch's and within 1e-6 of float64. The exit code is 1 if one is missed.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from evolute.geometry import newton_schulz
from evolute.geometry.norms.orthogonalize import fast_dtype
from evolute.optim import Scion

# Matrices [out, in] of one block, and how many blocks.
SIZES: dict[str, tuple[list[tuple[int, int]], int]] = {
    "llama": ([(128, 128)] * 4 + [(344, 128)] * 2 + [(128, 344)], 4),
    "gpt": ([(768, 768)] * 4 + [(3072, 768), (768, 3072)], 12),
}


def parameters(shapes: list[tuple[int, int]], device: str) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made: list[nn.Parameter] = []
    for shape in shapes:
        p = nn.Parameter((0.02 * torch.randn(shape, generator=generator)).to(device))
        p.grad = (1e-3 * torch.randn(shape, generator=generator)).to(device)
        made.append(p)
    return made


def timed(step: Any, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def difference_from_torch(shapes: list[tuple[int, int]], device: str) -> float:
    """Largest relative difference of one update, over the distinct shapes."""
    ours, theirs = parameters(shapes, device), parameters(shapes, device)
    start = [p.detach().clone() for p in ours]
    Scion(ours, lr=1.0).step()
    torch.optim.Muon(theirs, lr=1.0, weight_decay=0.0, nesterov=False).step()
    worst = 0.0
    for p, q, old in zip(ours, theirs, start, strict=True):
        rows, columns = p.shape
        a = (p.detach() - old) / math.sqrt(rows / columns)
        b = (q.detach() - old) / math.sqrt(max(1.0, rows / columns))
        worst = max(worst, (torch.linalg.matrix_norm(a - b) / torch.linalg.matrix_norm(b)).item())
    return worst


def difference_from_float64(shapes: list[tuple[int, int]]) -> float:
    """Largest difference of an entry from the same recursion in float64, in the precision used on a CPU."""
    gradients: list[Tensor] = [p.grad for p in parameters(shapes, "cpu") if p.grad is not None]
    return max(
        (newton_schulz(g, dtype=torch.float32) - newton_schulz(g.double())).abs().max().item() for g in gradients
    )


def measure(name: str, blocks: int, repeats: int, device: str, console: Console) -> dict[str, Any]:
    block, _ = SIZES[name]
    distinct = sorted(set(block))
    shapes = block * blocks
    ours, theirs = parameters(shapes, device), parameters(shapes, device)
    scion, muon = Scion(ours, lr=1e-3), torch.optim.Muon(theirs, lr=1e-3, weight_decay=0.0, nesterov=False)
    scion.step()  # buffers, libraries
    if name == "llama" or device == "cuda":
        muon.step()
    seconds: dict[str, list[float]] = {"scion": [], "muon": []}
    for _ in track(range(repeats), f"{name}, {blocks} blocks", console=console):
        seconds["scion"].append(timed(scion.step, device))
        seconds["muon"].append(timed(muon.step, device))
    ratios = [m / s for s, m in zip(seconds["scion"], seconds["muon"], strict=True)]
    return {
        "size": name,
        "blocks": blocks,
        "matrices": len(shapes),
        "parameters": sum(rows * columns for rows, columns in shapes),
        "seconds": seconds,
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "from_torch": difference_from_torch(distinct, device),
        "from_float64": difference_from_float64(distinct),
    }


def report(console: Console, rows: list[dict[str, Any]], slow_bfloat16: bool) -> int:
    """Print the table and the bars; return 1 if one is missed."""
    table = Table(title="seconds a step: median (range) of interleaved steps")
    for column in (
        "matrices of",
        "count",
        "parameters",
        "Scion",
        "torch.optim.Muon",
        "ratio",
        "from torch",
        "from float64",
    ):
        table.add_column(column)

    def cell(values: list[float]) -> str:
        return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"

    for row in rows:
        table.add_row(
            f"{row['size']}, {row['blocks']} blocks", str(row["matrices"]), f"{row['parameters'] / 1e6:.1f} M",
            cell(row["seconds"]["scion"]), cell(row["seconds"]["muon"]),
            f"{row['ratio']:.1f} ({row['ratio_range'][0]:.1f} to {row['ratio_range'][1]:.1f})",
            f"{row['from_torch']:.2%}", f"{row['from_float64']:.1e}",
        )  # fmt: skip
    console.print(table)
    bar = 10.0 if slow_bfloat16 else 1.0
    missed = 0
    for row in rows:
        for text, met in (
            (f"at least {bar:g} times as fast", row["ratio"] >= bar),
            ("update within 2 % of torch's", row["from_torch"] <= 0.02),
            ("within 1e-6 of float64", row["from_float64"] <= 1e-6),
        ):
            console.print(f"{'met   ' if met else 'MISSED'}  {row['size']}: {text}")
            missed += not met
    return 1 if missed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument(
        "--blocks", type=int, help="blocks of the model; default: all, or 1 of the GPT where bfloat16 is slow"
    )
    parser.add_argument("--repeats", type=int, help="steps of each optimizer; default: 20 (llama), 3 (gpt)")
    parser.add_argument("--threads", type=int, help="default: torch's own; take 1 on a busy machine")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="also write every number here")
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)  # a log should not fold the table
    if args.threads:
        torch.set_num_threads(args.threads)
    probe = torch.zeros(1, device=args.device)
    precision = str(fast_dtype(probe)).removeprefix("torch.")
    console.print(
        f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, Scion multiplies in {precision}"
    )
    slow = args.device == "cpu" and precision == "float32"
    rows: list[dict[str, Any]] = []
    for name in args.sizes:
        repeats = args.repeats or (20 if name == "llama" else 3)
        blocks = args.blocks or (1 if slow and name == "gpt" else SIZES[name][1])
        rows.append(measure(name, blocks, repeats, args.device, console))
        if args.json:
            settings = {"torch": torch.__version__, "device": args.device, "threads": torch.get_num_threads()}
            args.json.write_text(json.dumps({**settings, "precision": precision, "rows": rows}, indent=1))
    return report(console, rows, slow)


if __name__ == "__main__":
    raise SystemExit(main())

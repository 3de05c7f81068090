"""Curvature against its peers: products, the sharpest direction, ten eigenpairs, exactness, memory.

Three small networks (an MLP, a GPT with LayerNorm, a CNN with GroupNorm), three stages of their training, five batches
at each. All arms see the same weights and batch, in turns, on one thread; what they return is judged by its residual
with the Hessian in float64. Times are seconds of processor time, so that a shared machine counts less, in units of one
gradient: a forward and a backward pass on the same batch with the same attention kernel, graph not kept.

Peers live in an environment of their own, pinned in peers.txt:

    python benchmarks/curvature.py --setup      # once: creates benchmarks/.venv
    python benchmarks/curvature.py              # resumes where it was stopped; one JSON a run in results/curvature
    python benchmarks/curvature.py --quick      # one batch, one stage
    python benchmarks/curvature.py --report     # the tables of what is there

Budgets: hessian-eigenthings takes a number of steps, so it is run with growing numbers and charged only for the first
that suffices, which a user could not know. A second comparison, in files of its own, has every arm find out for itself
when it is done: hessian-eigenthings then starts at its default of 20 steps and doubles until it says that all ten have
converged, charged for all it did. PyHessian never looks at a residual, so it gets ten times the products of
ours, once a model. Bars: a product at most
2.2 gradients (CNN 2.7); top-10 at least 1.5 times as fast as the best peer that reaches the residual on each network,
3 times on one; 1e-5 from the dense Hessian; at most 1.5 times the memory of the best peer; the ghost ratio of a large
head in 1.3 of its forward passes and without its logits. The exit code of
``--report`` is 1 if one is missed.
"""

import argparse
import copy
import ctypes
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PYTHON = HERE / ".venv" / "bin" / "python"
RESULTS = HERE / "results" / "curvature"
STAGES = (20, 100, 500)
BATCHES = 5
EPOCH, SMALL_LR = 32, 1e-4  # an epoch of small steps: a tenth of the training rate
STEPS = (16, 18, 20, 22, 25, 28, 32, 36, 40, 45, 50, 57, 64, 72, 80, 90, 100, 112, 128, 144, 160)


def setup() -> None:
    """Create the environment of the peers."""
    subprocess.run([sys.executable, "-m", "venv", str(HERE / ".venv")], check=True)
    subprocess.run([str(PYTHON), "-m", "pip", "install", "-q", "-r", str(HERE / "peers.txt")], check=True)


def inside() -> None:
    """Go on in the environment of the peers, with the repository on the path."""
    if os.environ.get("EVOLUTE_PEERS") == "1":
        return
    if not PYTHON.exists():
        sys.exit(f"the peers are not installed: run {sys.argv[0]} --setup first")
    environment = {**os.environ, "EVOLUTE_PEERS": "1", "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    os.execve(str(PYTHON), [str(PYTHON), *sys.argv], environment)


def seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def measure_products(problem: Any, rounds: int) -> dict[str, float]:
    """Median seconds of a gradient and of a product, in turns."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from evolute.geometry import Hessian

    params = problem.params

    def gradient() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            torch.autograd.grad(problem.loss(), list(params.values()))

    with Hessian(problem.loss, params) as H:
        v = torch.randn(H.shape[0])
        gradient()
        H @ v
        times = [(seconds(gradient), seconds(lambda: H @ v)) for _ in range(rounds)]
    return {"gradient": statistics.median(t[0] for t in times), "product": statistics.median(t[1] for t in times),
            "product_ratio": statistics.median(t[1] / t[0] for t in times)}  # fmt: skip


def measure_sharpest(problem: Any, data: Any, seed: int) -> dict[str, Any]:
    """Seconds and products of the largest eigenvalue: from noise, from the gradient, and warm after small steps."""
    import torch
    from curvature_problems import train, true_residuals

    from evolute.geometry import Hessian, top_eigenpairs

    found: dict[str, Any] = {}
    last: Any = None
    moved = problem.copied()
    train(moved.module, data, EPOCH, torch.Generator().manual_seed(1000 + seed), lr=SMALL_LR)
    for name, at in (("cold", problem), ("gradient", problem), ("warm", moved)):
        begin = time.process_time()
        with Hessian(at.loss, at.params) as H:
            start = None
            if name == "gradient":
                noise = torch.randn(H.shape[0], generator=torch.Generator().manual_seed(seed))
                start = H.gradient / H.gradient.norm() + 0.1 * noise / noise.norm()
            elif name == "warm":
                start = last.vectors
            pairs = top_eigenpairs(H, which="largest", start=start)
        taken = time.process_time() - begin
        last = pairs if name == "cold" else last
        residual = true_residuals(at, pairs.values, pairs.vectors).max().item()
        found[name] = {"seconds": taken, "products": pairs.products, "residual": residual}
    return found


def attempt_top(problem: Any, arm: str, budget: int) -> dict[str, Any]:
    """Seconds, true residual and products of one arm, or its error."""
    from curvature_arms import run
    from curvature_problems import true_residuals

    try:
        begin = time.process_time()
        found = run(arm, problem, budget)
        taken = time.process_time() - begin
    except (RuntimeError, NotImplementedError) as error:
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"}
    residual = true_residuals(problem, found.values, found.vectors).max().item()
    return {"seconds": taken, "residual": residual, "products": found.products, "budget": budget,
            "values": sorted(found.values.tolist(), key=abs, reverse=True)}  # fmt: skip


def measure_unaided(problem: Any) -> dict[str, Any]:
    """Seconds and true residual of the arms that stop by themselves."""
    arms = ("evolute", "curvlinops", "hessian-eigenthings", "hessian-eigenthings, differences")
    return {arm: attempt_top(problem, arm, 0) for arm in arms}


def measure_top(problem: Any, budget: int, power: bool) -> tuple[dict[str, Any], int]:
    """Seconds and true residual of every arm, and the number of steps that hessian-eigenthings needed."""
    from curvature_arms import TOL

    results: dict[str, Any] = {}

    def attempt(arm: str, budget: int) -> bool:
        results[arm] = attempt_top(problem, arm, budget)
        return "error" in results[arm] or results[arm]["residual"] <= TOL * 1.001

    attempt("evolute", 0)
    attempt("curvlinops", 0)
    # A plain Lanczos run without restarts needs about as many steps as ours has products.
    least = budget or 0.7 * results["evolute"]["products"]
    for steps in [s for s in STEPS if s >= 0.85 * least]:
        budget = steps
        if attempt("hessian-eigenthings", steps):
            break
    attempt("hessian-eigenthings, differences", budget)
    if power:
        attempt("PyHessian", results["evolute"]["products"])  # for each of the ten
    return results, budget


def measure_model(name: str, stages: tuple[int, ...], batches: int) -> None:
    """Train to each stage and write one JSON for each batch."""
    import torch
    from curvature_problems import MODELS, Data, Problem, train

    data, generator = Data(name), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    module, done = MODELS[name](), 0
    trained: dict[int, Any] = {}
    for stage in stages:
        train(module, data, stage - done, generator)
        trained[stage], done = copy.deepcopy(module), stage
    budgets = dict.fromkeys(stages, 0)
    for batch, stage in itertools.product(range(batches), stages):
        problem = Problem(trained[stage], *data.batch(torch.Generator().manual_seed(100 + batch)))
        path = RESULTS / f"unaided-{name}-{stage}-{batch}.json"
        if not path.exists():
            measured = {"model": name, "stage": stage, "batch": batch, "products": measure_products(problem, 9)}
            write(path, {**measured, "top": measure_unaided(problem)})
        path = RESULTS / f"{name}-{stage}-{batch}.json"
        if path.exists():
            continue
        power = batch == 0 and stage == stages[len(stages) // 2]  # ten times our products: once is enough
        measured: dict[str, Any] = {"model": name, "stage": stage, "batch": batch, "loss": problem.loss().item()}
        measured["products"] = measure_products(problem, 9)
        measured["sharpest"] = measure_sharpest(problem, data, batch)
        measured["top"], budgets[stage] = measure_top(problem, budgets[stage], power)
        write(path, measured)
        print(f"{name} after {stage} steps, batch {batch}: done", flush=True)


def measure_accuracy() -> None:
    """Relative error of products in float32 against the dense float64 Hessian of a LayerNorm transformer."""
    import torch
    from curvature_arms import curvlinops_operator, eigenthings_operator
    from curvature_problems import GPT, Data, Problem, train
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from evolute.geometry import Hessian

    torch.manual_seed(0)
    module, data = GPT(width=8, blocks=2, heads=2), Data("gpt")
    train(module, data, 200, torch.Generator().manual_seed(0), lr=1e-2)
    problem = Problem(module, *data.batch(torch.Generator().manual_seed(1)))
    exact = problem.double()
    names, tensors = list(exact.params), list(exact.params.values())
    sizes = [p.numel() for p in tensors]

    def loss_at(flat: torch.Tensor) -> torch.Tensor:
        parts = [part.view_as(p) for part, p in zip(flat.split(sizes), tensors, strict=True)]
        out = torch.func.functional_call(exact.module, dict(zip(names, parts, strict=True)), (exact.inputs,))
        return torch.nn.functional.cross_entropy(out, exact.targets)

    flat = torch.cat([p.detach().flatten() for p in tensors])
    with sdpa_kernel(SDPBackend.MATH):
        dense = torch.autograd.functional.hessian(loss_at, flat)
    vectors = torch.randn(len(flat), 5, generator=torch.Generator().manual_seed(2))
    truth = dense @ vectors.double()
    errors: dict[str, float] = {}
    with sdpa_kernel(SDPBackend.MATH), Hessian(problem.loss, problem.params) as H:
        works: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "evolute": lambda v: H @ v,
            "curvlinops": lambda v: curvlinops_operator(problem) @ v,
            "curvlinops, float64": lambda v: curvlinops_operator(exact) @ v.double(),
            "hessian-eigenthings": eigenthings_operator(problem).matvec,
            "hessian-eigenthings, differences": eigenthings_operator(problem, "finite_difference").matvec,
        }
        for arm, product in works.items():
            found = torch.stack([product(v).detach().double() for v in vectors.unbind(1)], dim=1)
            errors[arm] = ((found - truth).norm(dim=0) / truth.norm(dim=0)).max().item()
    write(RESULTS / "accuracy.json", {"parameters": len(flat), "errors": errors})


def measure_memory(name: str, arm: str, steps: int) -> None:
    """Peak memory of a top-10 run above what the model and its batch take, MiB; Linux only."""
    import torch
    from curvature_arms import run
    from curvature_problems import MODELS, Data, Problem, train

    data = Data(name)
    torch.manual_seed(0)
    module = MODELS[name]()
    train(module, data, 100, torch.Generator().manual_seed(0))
    problem = Problem(module, *data.batch(torch.Generator().manual_seed(100)))
    run(arm, problem, 12)  # libraries and thread pools make themselves at home
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    run(arm, problem, steps)
    write(RESULTS / f"memory-{name}-{arm}.json", {"model": name, "arm": arm, "mib": (status("VmHWM") - before) / 1024})


def measure_ghost(rounds: int = 9) -> None:
    """Time and memory of the logits' spread over a step, at a head of 50,257 classes and 2,048 tokens of width 256.

    In units of one forward pass of the head, which holds all logits. ``recomputed_spread``, what ``StepRadius`` calls,
    is given the logits after the step, which the module's own forward pass makes, and never holds a second tensor of
    that size; ``head_spread`` holds no logits at all, and makes both products.
    """
    import torch

    from evolute.geometry import head_spread, recomputed_spread

    tokens, width, classes, chunk = 2048, 256, 50257, 1024
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = 0.02 * torch.randn(classes, width, generator=generator)
    hidden_after = hidden + 1e-3 * torch.randn(tokens, width, generator=generator)
    weight_after = weight + 1e-4 * torch.randn(classes, width, generator=generator)

    logits_after = hidden_after @ weight_after.T
    work: dict[str, Callable[[], object]] = {
        "recomputed_spread": lambda: recomputed_spread(hidden, weight, logits_after, chunk=chunk),
        "head_spread": lambda: head_spread(hidden, weight, hidden_after, weight_after, chunk=chunk),
    }
    ratios: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        forward = seconds(lambda: hidden @ weight.T)
        for name, spread in work.items():
            ratios[name].append(seconds(spread) / forward)
    found: dict[str, Any] = {"chunk": chunk, "logits_mib": 4 * tokens * classes / 2**20}
    for name, spread in work.items():
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        spread()
        mib = (status("VmHWM") - before) / 1024
        found[name] = {"ratio": statistics.median(ratios[name]), "ratios": sorted(ratios[name]), "mib": mib}
    write(RESULTS / "ghost.json", found)


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def write(path: Path, content: dict[str, Any]) -> None:
    """Write whole or not at all."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1))
    part.replace(path)


def main() -> int:
    """Measure what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", action="store_true", help="install the peers and stop")
    parser.add_argument("--quick", action="store_true", help="one batch at one stage; no memory, no dense Hessian")
    parser.add_argument("--report", action="store_true", help="only the tables")
    parser.add_argument("--models", nargs="+", default=["mlp", "gpt", "cnn"])
    parser.add_argument("--memory-of", nargs=3, metavar=("MODEL", "ARM", "STEPS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.setup:
        setup()
        return 0
    inside()
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)
    if args.memory_of:
        measure_memory(args.memory_of[0], args.memory_of[1], int(args.memory_of[2]))
        return 0
    if not args.report:
        for name in args.models:
            measure_model(name, (100,) if args.quick else STAGES, 1 if args.quick else BATCHES)
        if not args.quick:
            if not (RESULTS / "accuracy.json").exists():
                measure_accuracy()
            if not (RESULTS / "ghost.json").exists():
                measure_ghost()
            for name in args.models:
                top = json.loads((RESULTS / f"{name}-100-0.json").read_text())["top"]
                for arm, result in top.items():
                    if "error" not in result and not (RESULTS / f"memory-{name}-{arm}.json").exists():
                        steps = str(result["budget"])
                        subprocess.run([sys.executable, __file__, "--memory-of", name, arm, steps], check=True)
    import curvature_report

    return curvature_report.report(RESULTS)


if __name__ == "__main__":
    sys.exit(main())

"""What does one iteration of the rasterizer cost on one thread, in parts, and against the torch backend?

A random box of Gaussians of about one pixel; an iteration is projection, tile lists, blending, and the backward pass of
all three. Processor time of one thread, the least of several rounds in which the two backends take turns.

    python benchmarks/rasterizer.py

Exit code 1 if the bar (15 times the torch backend) is missed.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from evolute.models.splatting import Camera, Gaussians, render
from evolute.models.splatting.kernels import half_sizes
from evolute.models.splatting.projection_numba import project
from evolute.models.splatting.raster_numba import blend
from evolute.models.splatting.tiles_numba import tile_lists

CASES = ((5_000, 128), (20_000, 256))
ROUNDS = {"numba": 10, "torch": 2}
FLOPS = 40, 80  # forward and backward, a pair of Gaussian and pixel
SUSTAINED = 22e9  # flop/s of one AVX2 core, as the notes of this machine have it


def scene(n: int, size: int) -> tuple[Gaussians, Camera]:
    generator = torch.Generator().manual_seed(0)
    uniform = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    depth = 4 + 4 * uniform(n)
    place = (uniform(n, 2) - 0.5) * depth[:, None]
    pixel = depth / size  # the focal length is the size
    scales = pixel[:, None] * (0.5 + uniform(n, 3))
    gaussians = Gaussians(
        torch.cat([place, depth[:, None]], 1), scales, torch.randn(n, 4, generator=generator),
        0.1 + 0.85 * uniform(n), uniform(n, 3),
    )  # fmt: skip
    K = torch.tensor([[size, 0, size / 2], [0, size, size / 2], [0, 0, 1.0]])
    return gaussians, Camera(torch.eye(4), K, size, size)


def clock(work: Callable[[], Any]) -> float:
    begin = time.process_time()
    work()
    return 1e3 * (time.process_time() - begin)


def iteration(gaussians: Gaussians, camera: Camera, backend: Any, upstream: torch.Tensor) -> Callable[[], None]:
    leaves = [t.clone().requires_grad_() for t in vars(gaussians).values()]

    def work() -> None:
        seen = render(Gaussians(*leaves), camera, backend)
        torch.autograd.backward(
            [seen.image, seen.alpha], [upstream[..., :3].contiguous(), upstream[..., 3].contiguous()]
        )

    return work


def parts(gaussians: Gaussians, camera: Camera, upstream: torch.Tensor) -> dict[str, float]:
    """Return the least milliseconds of each part of the compiled backend."""
    leaves = [t.clone().requires_grad_() for t in vars(gaussians).values()]
    size = (camera.height, camera.width)
    found: dict[str, list[float]] = {}
    for _ in range(ROUNDS["numba"]):
        box: dict[str, Any] = {}
        step = lambda name, work: found.setdefault(name, []).append(clock(work))  # noqa: E731
        step("project", lambda b=box: b.update(p=project(Gaussians(*leaves), camera)))
        p = box["p"]
        step("lists", lambda b=box, p=p: b.update(l=tile_lists(p.means2d, p.radii, p.depths, size[1], size[0])))
        inputs = [t.detach().requires_grad_() for t in (p.means2d, p.conics, gaussians.opacities, gaussians.colors)]
        step("blend", lambda b=box, i=inputs: b.update(o=blend(*i, b["l"], size)))
        grads = [upstream[..., :3].contiguous(), upstream[..., 3].contiguous()]
        step("blend backward", lambda b=box, g=grads: torch.autograd.backward(list(b["o"]), g))
        back = [inputs[0].grad, inputs[1].grad]
        step("project backward", lambda p=p, g=back: torch.autograd.backward([p.means2d, p.conics], g))
    return {name: min(values) for name, values in found.items()}


def work_floor(gaussians: Gaussians, camera: Camera) -> tuple[int, float]:
    """Return (tile, Gaussian) pairs, and milliseconds that the arithmetic of the boxes alone would take."""
    p = project(gaussians, camera)
    ids, _ = tile_lists(p.means2d, p.radii, p.depths, camera.width, camera.height)
    reach = torch.empty_like(p.means2d)
    half_sizes(p.conics.numpy(), gaussians.opacities.numpy(), reach.numpy())
    reach = reach[(p.radii > 0).all(-1)].clamp_min(0)
    pixels = float((2 * reach).prod(-1).sum())
    return len(ids), 1e3 * pixels * sum(FLOPS) / SUSTAINED


def main() -> int:
    torch.set_num_threads(1)
    table = Table(
        "Gaussians", "image", "pairs", "numba ms", "torch ms", "ratio", "arithmetic of the boxes, ms", "parts"
    )
    good = True
    for n, size in CASES:
        gaussians, camera = scene(n, size)
        upstream = torch.randn(size, size, 4, generator=torch.Generator().manual_seed(1))
        work = {b: iteration(gaussians, camera, b, upstream) for b in ROUNDS}
        work["numba"]()  # compiles
        times: dict[str, list[float]] = {b: [] for b in ROUNDS}
        for _ in range(ROUNDS["torch"]):
            times["torch"].append(clock(work["torch"]))
            times["numba"] += [clock(work["numba"]) for _ in range(ROUNDS["numba"] // 2)]
        fast, slow = min(times["numba"]), min(times["torch"])
        good &= slow / fast >= 15
        pairs, floor = work_floor(gaussians, camera)
        split = ", ".join(f"{name} {ms:.1f}" for name, ms in parts(gaussians, camera, upstream).items())
        table.add_row(
            f"{n:,}", f"{size}", f"{pairs:,}", f"{fast:.1f}", f"{slow:.0f}", f"{slow / fast:.1f}", f"{floor:.1f}", split
        )
    Console(width=180).print(table)
    print("bar of 15 met" if good else "bar of 15 MISSED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

"""How far can one step go, in ghost radii, before it does damage? Six architectures, and two kinds of direction.

Each network is trained on the digits; at the start, after a twentieth and a fifth of the training and at its end, one
step is made along the descent direction and along twenty random ones, of r = 0.01 to 100 times the ghost radius: pi
over the largest spread of the logits' derivative ("Ghosts of Softmax", arXiv 2603.13552) on the samples of the loss.

A step fails if it raises that loss by a tenth or more, the threshold of the authors' code. Two more are printed: the
loss doubles; more than a tenth of the predictions change.

    python benchmarks/ghost_transition.py --jobs 2

One JSON a network and seed lands in benchmarks/results/ghost_transition/; one that is there is not repeated. The exit
code is 1 if a bar is missed.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import digits
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call

from evolute.geometry import directional_logits, ghost_radius
from evolute.reports import style

SAMPLES, RANDOM = 384, 20
RADII = torch.logspace(-2, 2, 21)  # 1 is one of them
STAGES = ("start", "early", "mid", "end")
FAILURES: dict[str, Callable[[dict[str, Any]], Tensor]] = {
    "loss +10 %": lambda curves: torch.tensor(curves["loss_ratio"]) >= 1.1,
    "loss x 2": lambda curves: torch.tensor(curves["loss_ratio"]) >= 2,
    "10 % flipped": lambda curves: torch.tensor(curves["flipped"]) > 0.1,
}


@dataclass(frozen=True)
class Run(digits.Run):
    network: str
    seed: int


class RowTransformer(nn.Module):
    """Two pre-norm blocks of width 32 over the eight rows of an image and a token that is classified."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, width), nn.Linear(width, 10)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(9, width))
        self.blocks = nn.Sequential(*(Block(width, heads=4) for _ in range(2)), nn.LayerNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embed(x.view(-1, 8, 8))
        tokens = torch.cat([self.token.expand(len(rows), -1, -1), rows], dim=1) + self.position
        return self.head(self.blocks(tokens)[:, 0])


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = digits.mlp(width, 4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width))
        return x + self.mlp(self.norm2(x))


def cnn(norm: bool) -> nn.Sequential:
    """Return two 3 x 3 convolutions, each halved by pooling, and two linear layers."""

    def block(i: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, padding=1), *([nn.BatchNorm2d(o)] if norm else []), nn.GELU(), nn.MaxPool2d(2)]

    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), *block(1, 16), *block(16, 32), nn.Flatten(), *digits.mlp(128, 64, 10)
    )


# Network, learning rate of AdamW and steps; rates and steps are those of the authors' code.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], float, int]] = {
    "linear": (lambda: nn.Linear(64, 10), 6e-3, 500),
    "mlp": (lambda: digits.mlp(64, 128, 128, 10), 2.5e-3, 520),
    "cnn": (lambda: cnn(norm=False), 2.5e-3, 560),
    "mlp_ln": (lambda: digits.mlp(64, 128, 128, 10, norm=True), 2.5e-3, 520),
    "cnn_bn": (lambda: cnn(norm=True), 2.5e-3, 560),
    "transformer": (RowTransformer, 2e-3, 600),
}


def work(run: Run) -> dict[str, Any]:
    data = digits.load(run.seed, test=0.3)
    make, lr, steps = NETWORKS[run.network]
    torch.manual_seed(run.seed)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
    stages: dict[str, Any] = {}
    at = dict(zip((0, steps // 20, steps // 5, steps), STAGES, strict=True))
    for step, (x, y) in enumerate([*digits.batches(data, 128, steps, run.seed), (data.x, data.y)]):
        if step in at:
            stages[at[step]] = measure(model.eval(), data, run.seed)
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return stages


def measure(model: nn.Module, data: digits.Digits, seed: int) -> dict[str, Any]:
    """Loss and predictions after one step, over its length in ghost radii; the model is left as it is."""
    x, y = data.x[:SAMPLES], data.y[:SAMPLES]
    params = dict(model.named_parameters())

    def logits(at: dict[str, Tensor]) -> Tensor:
        return functional_call(model, at, (x,))

    gradient = torch.autograd.grad(F.cross_entropy(logits(params), y), list(params.values()))
    generator = torch.Generator().manual_seed(seed)
    directions = [dict(zip(params, (-g for g in gradient), strict=True))]
    for _ in range(RANDOM):
        directions.append({n: torch.randn(p.shape, generator=generator) for n, p in params.items()})
    curves = [curve(logits, params, direction, y) for direction in directions]
    loss, accuracy = digits.judge(model, data.x_test, data.y_test)
    return {"accuracy": accuracy, "loss": loss, "descent": curves[0], "random": curves[1:]}


@torch.no_grad()
def curve(
    logits: Callable[[dict[str, Tensor]], Tensor], params: dict[str, Tensor], direction: dict[str, Tensor], y: Tensor
) -> dict[str, Any]:
    radius = ghost_radius(directional_logits(logits, params, direction))  # in units of the direction's length
    before = logits(params)
    loss, ratio, flipped = F.cross_entropy(before, y), list[float](), list[float]()
    for r in RADII:
        after = logits({name: p + r * radius * direction[name] for name, p in params.items()})
        ratio.append(float(F.cross_entropy(after, y) / loss))
        flipped.append(float((after.argmax(1) != before.argmax(1)).double().mean()))
    return {"loss_ratio": ratio, "flipped": flipped}


def onset(failed: Tensor) -> float:
    """Return the smallest r at which a step failed; inf if none did."""
    return float(RADII[failed].min()) if bool(failed.any()) else math.inf


def onsets(results: list[dict[str, Any]], network: str, stage: str, failure: str, direction: str) -> list[float]:
    """Return the onset of each curve: one a seed along the descent direction, twenty a seed along random ones."""
    found = [r[stage][direction] for r in results if r["network"] == network]
    curves = found if direction == "descent" else [curve for several in found for curve in several]
    return [onset(FAILURES[failure](curve)) for curve in curves]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each network")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    args = parser.parse_args()
    if args.seeds < 1 or args.jobs < 1:
        parser.error(f"--seeds {args.seeds} --jobs {args.jobs}: both must be at least 1")
    runs = [Run(network, seed) for seed in range(args.seeds) for network in NETWORKS]
    return report(digits.Bench("ghost_transition", work, args.jobs).results(runs))


def report(results: list[dict[str, Any]]) -> int:
    """Print and draw the onsets and the bars; return 1 if one is missed."""
    table = Table(title="r at which a step first fails: smallest / median over seeds (and directions)")
    for column in ("network", "stage", "accuracy", *FAILURES, *(f"random: {failure}" for failure in FAILURES)):
        table.add_column(column)
    for network in NETWORKS:
        for stage in STAGES:
            accuracy = digits.median(r[stage]["accuracy"] for r in results if r["network"] == network)
            cells = [
                f"{min(found):.2g} / {digits.median(found):.2g}"
                for direction in ("descent", "random")
                for failure in FAILURES
                for found in [onsets(results, network, stage, failure, direction)]
            ]
            table.add_row(network, stage, f"{accuracy:.1f}", *cells)
    digits.console().print(table)
    digits.save(draw(results), "ghost_transition")

    def firsts(network: str, direction: str, stages: tuple[str, ...] = STAGES) -> list[float]:
        return [r for s in stages for r in onsets(results, network, s, "loss +10 %", direction)]

    early = {network: sum(r < 1 for r in firsts(network, "random", STAGES[1:])) for network in NETWORKS}
    total = len(firsts("linear", "random", STAGES[1:]))
    shares = ", ".join(f"{network} {count / total:.0%}" for network, count in early.items())
    digits.console().print(f"random directions after the start that fail at r < 1: {shares}")
    bars = {
        f"{network}: no descent step fails at r < 1": all(r >= 1 for r in firsts(network, "descent"))
        for network in NETWORKS
    }
    bars["descent steps: median onset of each network between 1 and 10"] = all(
        1 <= digits.median(firsts(network, "descent")) <= 10 for network in NETWORKS
    )
    bars["no random step fails at r < 1 either, after the start"] = not any(early.values())
    return digits.verdict(bars)


def draw(results: list[dict[str, Any]]) -> Any:
    """Loss ratio over r: descent directions (lines), the range and median of random ones (band), by stage."""
    figure, panels = digits.figure(2, 3, 5.4)
    shown = ("early", "mid", "end")
    for axes, network in zip((a for row in panels for a in row), NETWORKS, strict=True):
        mine = [r for r in results if r["network"] == network]
        for i, stage in enumerate(shown):
            descent = torch.tensor([r[stage]["descent"]["loss_ratio"] for r in mine]).median(0).values
            random = torch.tensor([c["loss_ratio"] for r in mine for c in r[stage]["random"]]).median(0).values
            axes.plot(RADII, descent, color=style.run_colour(i), label=f"{stage}, descent")
            axes.plot(RADII, random, color=style.run_colour(i), linestyle=":", label=f"{stage}, random")
        axes.axvline(1, color=style.MUTED, linestyle="--", linewidth=1)
        axes.axhline(1.1, color=style.MUTED, linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(0.05, 100)
        style.label(axes, "r, step in ghost radii", "loss after / before", network)
    panels[0][0].legend(loc="upper left", frameon=False, fontsize=7.5, labelcolor=style.INK)
    return figure


if __name__ == "__main__":
    raise SystemExit(main())

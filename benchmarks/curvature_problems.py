"""The models, data and training that benchmarks/curvature.py measures on."""

import copy
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evolute.geometry import Hessian

CLASSES = 10
VOCAB = 128
CONTEXT = 64


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        n, t, d = h.shape
        q, k, v = (
            x.view(n, t, self.heads, d // self.heads).transpose(1, 2) for x in self.qkv(self.norm1(h)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class GPT(nn.Module):
    """Decoder-only transformer with LayerNorm; returns logits [sequences * tokens, VOCAB]."""

    def __init__(self, width: int = 64, blocks: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCAB, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(blocks)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(h))).flatten(0, 1)


def mlp() -> nn.Module:
    """0.54 million parameters."""
    return nn.Sequential(
        nn.Linear(784, 512), nn.Tanh(), nn.Linear(512, 256), nn.GELU(), nn.Linear(256, CLASSES)
    )  # fmt: skip


def cnn(c: int = 16) -> nn.Module:
    """Four convolutions with GroupNorm."""
    return nn.Sequential(
        nn.Conv2d(3, c, 3, padding=1), nn.GroupNorm(4, c), nn.SiLU(),
        nn.Conv2d(c, c, 3, padding=1), nn.GroupNorm(4, c), nn.SiLU(), nn.AvgPool2d(2),
        nn.Conv2d(c, 2 * c, 3, padding=1), nn.GroupNorm(4, 2 * c), nn.SiLU(), nn.AvgPool2d(2),
        nn.Conv2d(2 * c, 2 * c, 3, padding=1), nn.GroupNorm(4, 2 * c), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * c, CLASSES),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "gpt": GPT, "cnn": cnn}
SAMPLES = {"mlp": 256, "gpt": 8, "cnn": 16}


@dataclass
class Problem:
    """A network and one batch; the loss is the mean cross-entropy."""

    module: nn.Module
    inputs: Tensor
    targets: Tensor

    @property
    def params(self) -> dict[str, Tensor]:
        return dict(self.module.named_parameters())

    def loss(self) -> Tensor:
        return F.cross_entropy(self.module(self.inputs), self.targets)

    def double(self) -> "Problem":
        inputs = self.inputs.double() if self.inputs.is_floating_point() else self.inputs
        return Problem(copy.deepcopy(self.module).double(), inputs, self.targets)

    def copied(self) -> "Problem":
        return Problem(copy.deepcopy(self.module), self.inputs, self.targets)


class Data:
    """Batches: noisy clusters for the MLP, noisy textures for the CNN, Python's standard library for the GPT."""

    def __init__(self, name: str) -> None:
        self.name = name
        fixed = torch.Generator().manual_seed(7)
        self._clusters = 0.2 * torch.randn(CLASSES, 784, generator=fixed)
        coarse = 0.5 * torch.randn(CLASSES, 3, 8, 8, generator=fixed)
        self._textures = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
        self._text = torch.empty(0, dtype=torch.long)
        if name == "gpt":
            files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
            self._text = torch.tensor([min(byte, VOCAB - 1) for f in files for byte in f.read_bytes()])

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of one batch."""
        n = SAMPLES[self.name]
        if self.name == "gpt":
            begins = torch.randint(0, len(self._text) - CONTEXT - 1, (n,), generator=generator).tolist()
            windows = torch.stack([self._text[i : i + CONTEXT + 1] for i in begins])
            return windows[:, :-1], windows[:, 1:].reshape(-1)
        y = torch.randint(0, CLASSES, (n,), generator=generator)
        means = self._clusters if self.name == "mlp" else self._textures
        return means[y] + torch.randn(n, *means.shape[1:], generator=generator), y


def train(module: nn.Module, data: Data, steps: int, generator: torch.Generator, lr: float = 1e-3) -> None:
    """Take Adam steps."""
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    for _ in range(steps):
        x, y = data.batch(generator)
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()


def true_residuals(problem: Problem, values: Tensor, vectors: Tensor) -> Tensor:
    """Return ``||H v - l v|| / |l|`` [k] with the Hessian in float64 at the same weights; vectors [P, k]."""
    exact = problem.double()
    v = vectors.double()
    v = v / v.norm(dim=0)
    eigenvalues = values.double()
    with Hessian(exact.loss, exact.params) as H:
        return ((H @ v) - v * eigenvalues).norm(dim=0) / eigenvalues.abs()

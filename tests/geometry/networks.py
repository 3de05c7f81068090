"""Small float64 networks with a classification loss, and the dense derivatives of it that the tests compare with."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


class TokenModel(nn.Module):
    """A pre-LayerNorm transformer of one block, its head tied to the embedding."""

    def __init__(self, vocab=7, width=8, heads=2):
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(vocab, width)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        h = self.embed(tokens)
        n, t, d = h.shape
        q, k, v = (
            x.view(n, t, self.heads, d // self.heads).transpose(1, 2) for x in self.qkv(self.norm1(h)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        h = h + self.down(F.gelu(self.up(self.norm2(h))))
        return self.head(self.norm3(h)).flatten(0, 1)


@dataclass
class Problem:
    """A network at a generic point, its data and its loss."""

    module: nn.Module
    inputs: Tensor
    targets: Tensor

    @property
    def params(self) -> dict[str, Tensor]:
        return dict(self.module.named_parameters())

    def criterion(self, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, self.targets)

    def logits(self) -> Tensor:
        return self.module(self.inputs)

    def loss(self) -> Tensor:
        return self.criterion(self.logits())

    def flat(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.params.values()])

    def logits_at(self, flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in self.params.values()])
        named = {name: part.view_as(p) for (name, p), part in zip(self.params.items(), parts, strict=True)}
        return functional_call(self.module, named, (self.inputs,))

    def loss_at(self, flat: Tensor) -> Tensor:
        return self.criterion(self.logits_at(flat))

    def dense_hessian(self) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.autograd.functional.hessian(self.loss_at, self.flat())

    def dense_gauss_newton(self) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            jacobian = torch.autograd.functional.jacobian(self.logits_at, self.flat()).flatten(0, 1)
            curvature = torch.autograd.functional.hessian(self.criterion, self.logits().detach())
        size = jacobian.shape[0]
        return jacobian.T @ curvature.reshape(size, size) @ jacobian


def _ready(module: nn.Module, inputs: Tensor, targets: Tensor) -> Problem:
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():  # away from ones and zeros, where errors in norm layers could hide
            p.add_(0.3 * torch.randn_like(p))
    return Problem(module, inputs, targets)


def mlp() -> Problem:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 4))
    return _ready(net, torch.randn(9, 5, dtype=torch.float64), torch.randint(0, 4, (9,)))


def convnet() -> Problem:
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    x = torch.randn(6, 2, 6, 6, dtype=torch.float64)
    net.double()(x + 1)  # running statistics that are not the defaults
    return _ready(net.eval(), x, torch.randint(0, 3, (6,)))


def transformer() -> Problem:
    torch.manual_seed(3)
    return _ready(TokenModel(), torch.randint(0, 7, (2, 5)), torch.randint(0, 7, (10,)))


PROBLEMS: dict[str, Callable[[], Problem]] = {"mlp": mlp, "convnet": convnet, "transformer": transformer}

"""Modules of all kinds that know nothing of evolute."""

import copy
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from evolute.callbacks.access import shape_of
from evolute.models.policy_loss import PolicyLoss


def regression_data(n: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=generator)
    return TensorDataset(x, x @ torch.randn(6, 2, generator=generator))


def classification_data(n: int = 96, features: int = 8, classes: int = 4) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, features, generator=generator)
    return TensorDataset(x, (x @ torch.randn(features, classes, generator=generator)).argmax(1))


class Regression(L.LightningModule):
    """One linear layer, squared error, plain SGD: the module of the pattern."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.mse_loss(self.layer(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02)


def policy_loss(loss: nn.Module, hidden: Tensor, head: nn.Module, logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The loss of completions of one token."""
    return loss(
        hidden=hidden.unsqueeze(1),
        head=head,
        logits=logits.unsqueeze(1),
        actions=y.unsqueeze(1),
        advantages=x[:, :1].detach(),
        mask=torch.ones_like(y, dtype=torch.bool).unsqueeze(1),
    ).loss


class Splats(nn.Module):
    """Gaussians that are to cover the first two features of a batch in the colours of the next three."""

    def __init__(self, n: int = 40) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        shapes = {"means": (3,), "scales": (3,), "quats": (4,), "opacities": (), "sh0": (1, 3), "shN": (3, 3)}
        self.params = nn.ParameterDict(
            {name: nn.Parameter(torch.randn(n, *shape, generator=generator)) for name, shape in shapes.items()}
        )

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Return a loss, and what densification is told of the view."""
        p = self.params
        means2d = 4 * p["means"][None, :, :2]
        if means2d.requires_grad:
            means2d.retain_grad()
        away = (means2d - 4 * x[:, None, :2]).square().sum(-1) / (1 + p["scales"].exp().sum(-1))
        weights = p["opacities"].sigmoid() * torch.exp(-0.1 * away)
        turned = F.normalize(p["quats"], dim=-1).sum(-1, keepdim=True)
        colors = p["sh0"][:, 0] + 0.1 * p["shN"].sum(1) + 0.1 * turned + 0.01 * p["means"][:, 2:]
        loss = (weights @ colors - x[:, 2:5]).square().mean()
        radii = torch.full((1, len(p["means"]), 2), 3, dtype=torch.int32)
        return loss, {
            "means2d": means2d, "radii": radii, "width": 16, "height": 16, "n_cameras": 1, "gaussian_ids": None
        }  # fmt: skip


class MaybeScene(L.LightningModule):
    """A module that can be made to train Gaussians beside what it trains."""

    render_info: dict[str, Any]

    def become_scene(self) -> Any:
        """Train Gaussians as well from now on."""
        self.splats = Splats()
        self.render_info, self.sh_active, self.depth_factor = {}, 0, 1.0
        self.gaussian_parameters = lambda: dict(self.splats.params)
        self.scene_extent = lambda: 1.0
        self.export_ply = self.view = None
        return self

    def scene_loss(self, x: Tensor) -> Tensor | float:
        """The loss of the Gaussians, if there are any."""
        if not hasattr(self, "splats"):
            return 0.0
        loss, self.render_info = self.splats(x)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if hasattr(self, "splats"):
            self.render_info = {}  # the graph behind it knows the number of Gaussians

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, p in self.splats.params.items() if hasattr(self, "splats") else ():
            p.data = torch.empty_like(checkpoint["state_dict"][f"splats.params.{name}"])


class Classifier(MaybeScene):
    """An MLP with dropout, batch norm, a metric, a growing list, random augmentation: what a probe may disturb."""

    def __init__(self, optimizer: str = "adamw", lr: float = 0.01, messy: bool = True, **options: Any) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 16),
            nn.BatchNorm1d(16) if messy else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(0.2) if messy else nn.Identity(),
            nn.Linear(16, 12),
            nn.Tanh(),
            nn.Linear(12, 4),
        )
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(num_classes=4)
        self.seen: list[float] = []
        self.messy = messy
        self.optimizer, self.lr, self.options = optimizer, lr, options

    def become_policy(self) -> "Classifier":
        """Learn by policy gradients from now on: classes are actions, and the first feature is their advantage."""
        self.policy_loss = PolicyLoss()
        self.loss_on = lambda batch: (*self.loss_of(*batch), batch[1])  # its loss goes through no cross-entropy
        return self

    def loss_of(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the logits."""
        if not hasattr(self, "policy_loss"):
            logits = self.net(x)
            return F.cross_entropy(logits, y), logits
        *body, head = getattr(self.net, "_orig_mod", self.net)
        hidden = x
        for layer in body:
            hidden = layer(hidden)
        logits = head(hidden)
        return policy_loss(self.policy_loss, hidden, head, logits, x, y), logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if self.messy:
            x = x + 0.01 * torch.randn_like(x)
        loss, logits = self.loss_of(x, y)
        loss = loss + self.scene_loss(x)
        self.accuracy(logits.detach(), y)
        self.seen.append(float(loss.detach()))
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/accuracy", self.accuracy, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return make_optimizer(self, self.optimizer, self.lr, **self.options)


class Late(Classifier):
    """Builds its layers in configure_model."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.net is None:
            self.net = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4))


class Validated(Classifier):
    """Validates in the middle of its epochs."""

    def val_dataloader(self) -> Any:
        return DataLoader(classification_data(), batch_size=32)


class Compiled(Classifier):
    """Its network is compiled in place, as one does in practice."""

    def __init__(self) -> None:
        super().__init__(messy=False)
        self.net = torch.compile(self.net, backend="aot_eager")  # type: ignore[assignment]


class TwoOptimizers(L.LightningModule):
    """Two halves, each with its own optimizer, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.encoder = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def loss_on(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.head(torch.tanh(self.encoder(batch[0]))), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss_on(batch)
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.encoder.parameters(), lr=0.1), torch.optim.Adam(self.head.parameters(), lr=0.01)]


def make_optimizer(module: nn.Module, name: str, lr: float, **options: Any) -> torch.optim.Optimizer:
    """An optimizer by name, over all parameters of a module."""
    from evolute.optim import MuonAdamW, Scion

    named = list(module.named_parameters())
    params = [p for _, p in named]
    match name:
        case "sgd":
            return torch.optim.SGD(params, lr=lr, **options)
        case "momentum":
            return torch.optim.SGD(params, lr=lr, momentum=0.9, **options)
        case "adamw":
            return torch.optim.AdamW(params, lr=lr, foreach=True, **options)
        case "adamw_fused":
            return torch.optim.AdamW(params, lr=lr, fused=True, **options)
        case "muon":
            return MuonAdamW(module, lr=lr, **options)
        case "scion":
            return Scion(module, lr=lr, **options)
    raise ValueError(name)


class Recorder(Logger):
    """A logger that keeps what it is given, by step."""

    name, version = "memory", ""  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.setdefault(int(step or 0), {}).update(metrics)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def of(self, metric: str) -> dict[int, float]:
        """One metric, by the steps that have it."""
        return {step: row[metric] for step, row in self.rows.items() if metric in row}


class Snapshots(Callback):
    """The weights before the first step and after each, and the optimizer's state after each."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.states: list[list[dict[str, Any]]] = []
        self.batches: list[Any] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.weights.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})
        self.states.append(
            [copy.deepcopy(o.state.get(p, {})) for o in trainer.optimizers for p in pl_module.parameters()]
        )


class Quadratic(L.LightningModule):
    """``x^T A x / 2`` over one or more vectors, whatever the batch."""

    def __init__(self, A: Tensor, make: Any, sizes: tuple[int, ...] | None = None, start: Tensor | None = None) -> None:
        super().__init__()
        start = torch.ones(len(A)) if start is None else start
        self.x = nn.ParameterList([nn.Parameter(part.clone()) for part in start.split(sizes or (len(A),))])
        self.register_buffer("A", A)
        self.make = make

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = torch.cat(list(self.x))
        return 0.5 * x @ self.A @ x

    def configure_optimizers(self) -> Any:
        return self.make(list(self.x))


class Net(L.LightningModule):
    """Any network with any loss of ``(network(inputs), targets)`` and any optimizer."""

    def __init__(self, net: nn.Module, loss: Any = F.cross_entropy, make: Any = None) -> None:
        super().__init__()
        self.net, self.loss = net, loss
        self.make = make or (lambda module: torch.optim.SGD(module.parameters(), lr=0.1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make(self)


class Mixed(MaybeScene):
    """Tied, frozen and differently decayed parameters in one classifier: what a strategy may get wrong.

    ``third.weight`` is ``second.weight``, ``first.bias`` is frozen, and vectors have a group of their own. With
    ``policy``, classes are actions, and the first feature is their advantage.
    """

    def __init__(self, optimizer: str = "adamw", lr: float = 0.02, policy: bool = False, **options: Any) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)
        self.third.weight = self.second.weight
        self.first.bias.requires_grad_(False)
        if policy:
            self.policy_loss = PolicyLoss()
        self.kind, self.lr, self.options = optimizer, lr, options

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, extra = batch[0], self.scene_loss(batch[0])
        for layer in (self.first, self.second, self.third):
            x = torch.tanh(layer(x))
        if hasattr(self, "policy_loss"):
            return policy_loss(self.policy_loss, x, self.head, self.head(x), *batch) + extra
        return F.cross_entropy(self.head(x), batch[1]) + extra

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if len(shape_of(p)) > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if len(shape_of(p)) == 1], "weight_decay": 0.0, "lr": self.lr / 2},
        ]
        make = torch.optim.AdamW if self.kind == "adamw" else torch.optim.SGD
        return make(groups, lr=self.lr, **self.options)

"""MuonAdamW against two separate torch optimizers, bit for bit."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR
from torch.optim.optimizer import register_optimizer_step_post_hook

from evolute.optim import MuonAdamW


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Embedding(13, 8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.LayerNorm(8)]
    return nn.Sequential(*layers, nn.Linear(8, 13))


def loss_of(module: nn.Module, step: int) -> torch.Tensor:
    x = torch.randint(13, (32,), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(module(x), (3 * x + 1) % 13)


def train(module: nn.Module, optimizers: list, steps: range, schedulers: list | None = None) -> nn.Module:
    for step in steps:
        module.zero_grad()
        loss_of(module, step).backward()
        for optimizer in optimizers:
            optimizer.step()
        for scheduler in schedulers or []:
            scheduler.step()
    return module


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def two(module: nn.Module, lr: float, adamw_lr: float) -> list:
    hidden = [module[1].weight, module[3].weight, module[5].weight]
    vectors = [p for p in module.parameters() if p.ndim < 2]
    return [
        torch.optim.Muon(hidden, lr=lr, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": [module[0].weight]}, {"params": vectors, "weight_decay": 0.0}],
            lr=adamw_lr,
            betas=(0.9, 0.95),
            weight_decay=0.1,
        ),
    ]


def test_equals_two_torch_optimizers_bitwise_under_a_cosine_schedule():
    ours, theirs = model(), model()
    optimizer, pair = MuonAdamW(ours, lr=0.02, adamw_lr=0.005), two(theirs, 0.02, 0.005)
    start = copy.deepcopy(ours)
    train(ours, [optimizer], range(20), [CosineAnnealingLR(optimizer, 20)])
    train(theirs, pair, range(20), [CosineAnnealingLR(o, 20) for o in pair])
    assert same(ours, theirs)
    assert not any(torch.equal(p, q) for p, q in zip(ours.parameters(), start.parameters(), strict=True))


def test_groups_split_inside_the_step_are_obeyed():
    """One group per parameter, the first hidden matrix at half the rate, for the length of the step only."""
    ours, theirs = model(), model()
    optimizer, (muon, adamw) = MuonAdamW(ours, lr=0.02), two(theirs, 0.02, 0.02)
    muon.param_groups = [
        {**muon.param_groups[0], "params": [p], "lr": 0.01 if p is theirs[1].weight else 0.02}
        for p in muon.param_groups[0]["params"]
    ]
    kept = optimizer.param_groups

    def split_then_backward(step):
        loss = loss_of(ours, step)
        ours.zero_grad()
        loss.backward()
        optimizer.param_groups = [
            {**group, "params": [p], "lr": 0.01 if p is ours[1].weight else 0.02}
            for group in kept
            for p in group["params"]
        ]
        return loss

    for step in range(5):
        optimizer.step(lambda step=step: split_then_backward(step))
        optimizer.param_groups = kept
    train(theirs, [muon, adamw], range(5))
    assert same(ours, theirs)


@pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
def test_state_round_trip(how):
    whole, halves = model(), model()
    train(whole, [MuonAdamW(whole)], range(10))
    first = MuonAdamW(halves)
    train(halves, [first], range(5))
    if how == "deepcopy":
        halves, second = copy.deepcopy((halves, first))
    else:
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second = MuonAdamW(halves, lr=77.0)
        second.load_state_dict(torch.load(file, weights_only=True))
    train(halves, [second], range(5, 10))
    assert same(whole, halves)


def test_closure_runs_once_and_hooks_see_one_step_and_gradients_survive():
    module = model()
    optimizer = MuonAdamW(module)
    seen: list[str] = []
    optimizer.register_step_post_hook(lambda *_: seen.append("own"))
    handle = register_optimizer_step_post_hook(lambda o, *_: seen.append(type(o).__name__))

    def closure():
        seen.append("closure")
        assert torch.is_grad_enabled()
        loss = loss_of(module, 0)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    handle.remove()
    assert seen == ["closure", "own", "MuonAdamW"]
    grads = [p.grad.clone() for p in module.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), grads, strict=True))


def test_one_cycle_and_lambda_schedules_accept_it():
    module = model()
    optimizer = MuonAdamW(module, lr=0.02, adamw_lr=0.01)
    train(module, [optimizer], range(3), [LambdaLR(optimizer, lambda step: 0.5**step)])
    assert [g["lr"] for g in optimizer.param_groups] == [0.0025, 0.00125, 0.00125]
    train(module, [optimizer], range(3), [OneCycleLR(optimizer, max_lr=0.1, total_steps=3)])


def test_plain_groups_and_refusals():
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    group = MuonAdamW([{"params": [matrix], "algorithm": "muon", "lr": 0.5}]).param_groups[0]
    assert (group["lr"], group["ns_steps"]) == (0.5, 5)
    for groups, value in (
        ([{"params": [matrix]}], "'algorithm'"),
        ([{"params": [matrix], "algorithm": "sgd"}], "'sgd'"),
        ([{"params": [vector], "algorithm": "muon"}], r"\(2,\)"),
    ):
        with pytest.raises(ValueError, match=value):
            MuonAdamW(groups)
    for options, value in (
        ({"lr": -1.0}, "-1.0"),
        ({"momentum": 1.5}, "momentum=1.5"),
        ({"weight_decay": -0.5}, "-0.5"),
        ({"betas": (0.9, 1.5)}, "1.5"),
        ({"overrides": {"nope": "rms"}}, "'nope'"),
    ):
        with pytest.raises(ValueError, match=value):
            MuonAdamW(model(), **options)
    with pytest.raises(ValueError, match="pass the module"):
        MuonAdamW([{"params": [matrix], "algorithm": "muon"}], overrides={"x": "rms"})

"""Scion against the step written out by hand, and against every way of cutting its groups."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from evolute.optim import Scion, parameter_groups


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    module = nn.ModuleDict(
        {
            "embed": nn.Embedding(13, 6),
            "conv": nn.Conv1d(6, 6, 3, padding=1),
            "up": nn.Linear(6, 18),
            "down": nn.Linear(18, 6),
            "square": nn.Linear(6, 6, bias=False),
            "norm": nn.LayerNorm(6),
            "head": nn.Linear(6, 13, bias=False),
        }
    )
    return module.to(dtype)


def backward(module: nn.Module, step: int) -> torch.Tensor:
    x = torch.randint(13, (4, 7), generator=torch.Generator().manual_seed(step))
    h = module["embed"](x)
    h = h + module["conv"](h.mT).mT
    h = module["square"](module["norm"](h + module["down"](module["up"](h).tanh())))
    loss = nn.functional.cross_entropy(module["head"](h).flatten(0, 1), ((3 * x + 1) % 13).flatten())
    module.zero_grad()
    loss.backward()
    return loss


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> nn.Module:
    for step in steps:
        backward(module, step)
        optimizer.step()
    return module


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_written_out_by_hand(nesterov, weight_decay):
    module = model()
    optimizer = Scion(module, lr=0.02, momentum=0.9, weight_decay=weight_decay, nesterov=nesterov, method="svd")
    momenta = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for step in range(4):
        backward(module, step)
        want = {}
        for name, p in module.named_parameters():
            B = momenta[name] = 0.9 * momenta[name] + 0.1 * p.grad
            M = 0.9 * B + 0.1 * p.grad if nesterov else B
            decay = weight_decay
            if name in ("embed.weight", "head.weight"):
                direction = 60.0 * M.sign() / 6
            elif p.ndim == 1:
                decay, direction = 0.0, M / M.square().mean().sqrt()
            else:
                U, S, Vh = torch.linalg.svd(M.flatten(1), full_matrices=False)
                U = U * (S / S[0] > 1e-9)  # the LayerNorm leaves down.weight's gradient without full rank
                fan_out, fan_in = M.flatten(1).shape
                direction = (math.sqrt(fan_out / fan_in) * U @ Vh).reshape(p.shape)
            want[name] = p.detach() * (1 - 0.02 * decay) - 0.02 * direction
        optimizer.step()
        for name, p in module.named_parameters():
            torch.testing.assert_close(p.detach(), want[name], rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_constrained_form_keeps_the_weights_in_the_ball():
    p = nn.Parameter(torch.zeros(5, 5, dtype=torch.float64))
    optimizer = Scion([p], lr=0.3, scale=2.0, weight_decay=1.0, method="svd")
    for _ in range(30):
        p.grad = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        optimizer.step()
        assert torch.linalg.matrix_norm(p.detach(), 2) <= 2.0 + 1e-9
    assert torch.linalg.matrix_norm(p.detach(), 2) > 1.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_group_per_parameter_changes_no_bit(dtype):
    together, split = model(dtype), model(dtype)
    train(together, Scion(together, lr=0.02), range(10))
    alone = Scion([{**g, "params": [pair]} for g in parameter_groups(split) for pair in g["params"]], lr=0.02)
    train(split, alone, range(10))
    assert same(together, split)


def test_groups_split_inside_the_step_with_another_rate_are_obeyed():
    ours, theirs = model(), model()
    optimizer, reference = Scion(ours, lr=0.02), Scion(theirs, lr=0.02)
    slow = {"up.weight": 0.005}
    kept = optimizer.param_groups

    def closure():
        loss = backward(ours, 0)
        optimizer.param_groups = [
            {**g, "params": [p], "lr": slow.get(name, g["lr"])}
            for g in kept
            for name, p in zip(g["param_names"], g["params"], strict=True)
        ]
        return loss

    before = copy.deepcopy(ours)
    optimizer.step(closure)
    train(theirs, reference, range(1))
    for (name, p), q, old in zip(ours.named_parameters(), theirs.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p - old, (q - old) * (0.25 if name in slow else 1.0), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trip(how, dtype):
    whole, halves = model(dtype), model(dtype)
    train(whole, Scion(whole), range(8))
    first = Scion(halves)
    train(halves, first, range(4))
    if how == "deepcopy":
        halves, second = copy.deepcopy((halves, first))
    else:
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second = Scion(halves, lr=77.0)
        second.load_state_dict(torch.load(file, weights_only=True))
    assert all(set(state) == {"momentum_buffer"} for state in second.state.values())
    assert same(whole, train(halves, second, range(4, 8)))


def test_update_within_two_percent_of_torch_muon():
    generator = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.zeros(s)) for s in ((128, 128), (344, 128), (128, 344))]
    theirs = [nn.Parameter(torch.zeros_like(p)) for p in ours]
    scion = Scion(ours, lr=1.0, momentum=0.95)
    muon = torch.optim.Muon(theirs, lr=1.0, momentum=0.95, weight_decay=0.0, nesterov=False)
    for p, q in zip(ours, theirs, strict=True):
        p.grad = torch.randn(p.shape, generator=generator)
        q.grad = p.grad.clone()
    scion.step()
    muon.step()
    for p, q in zip(ours, theirs, strict=True):
        adjusted = q * (math.sqrt(p.shape[0] / p.shape[1]) / math.sqrt(max(1.0, p.shape[0] / p.shape[1])))
        assert torch.linalg.vector_norm(p - adjusted) < 0.02 * torch.linalg.vector_norm(p)


def test_gradients_survive_and_missing_or_zero_ones_move_nothing():
    module = model()
    optimizer = Scion(module)
    backward(module, 0)
    module["up"].weight.grad = None
    module["down"].weight.grad.zero_()
    before, grads = (
        copy.deepcopy(module),
        {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None},
    )
    optimizer.step()
    assert all(torch.equal(p.grad, grads[n]) for n, p in module.named_parameters() if n in grads)
    for name in ("up", "down"):
        assert torch.equal(module[name].weight, before[name].weight)
    assert module["up"].weight not in optimizer.state
    assert not torch.equal(module["square"].weight, before["square"].weight)


def test_closure_runs_once_with_gradients_enabled_and_empty_steps_pass():
    module = model()
    optimizer = Scion(module)
    assert optimizer.step() is None
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        return backward(module, 0)

    assert optimizer.step(closure).item() > 0
    assert calls == [True]


def test_a_tensor_lr_steps_like_the_number_and_follows_in_place_changes():
    number, tensor = model(), model()
    lr = torch.tensor(0.25, dtype=torch.float64)
    train(number, Scion(number, lr=0.25, weight_decay=0.1), range(2))
    train(number, Scion(number, lr=0.125, momentum=0.0), range(1))
    train(tensor, Scion(tensor, lr=lr, weight_decay=0.1), range(2))
    lr.mul_(0.5)
    train(tensor, Scion(tensor, lr=lr, momentum=0.0), range(1))
    for p, q in zip(number.parameters(), tensor.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_refusals_carry_the_value():
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    for options, value in (
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": torch.ones(2)}, "2 elements"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"method": "qr"}, "'qr'"),
        ({"overrides": {"x": "rms"}}, "pass the module"),
    ):
        with pytest.raises(ValueError, match=value):
            Scion([matrix], **options)
    with pytest.raises(ValueError, match=r"\(2,\)"):
        Scion([vector])
    with pytest.raises(ValueError, match="'nuclear'"):
        Scion([{"params": [matrix], "norm": "nuclear"}])
    with pytest.raises(ValueError, match="complex"):
        Scion([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        Scion(embedding).step()

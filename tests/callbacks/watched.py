"""What the tests of the curvature callbacks share: small networks, their dense Hessians, watched runs."""

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from evolute.callbacks import CurvatureMonitor
from tests.conftest import fit
from tests.modules import Net, Recorder, Snapshots


def blob(n=24, features=5, classes=3):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, features, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(classes, (n,), generator=generator))


def tanh_net():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def linear_net():
    """Softmax regression: its Hessian has no negative eigenvalue, so instability is the step's doing alone."""
    return nn.Sequential(nn.Linear(5, 3))


def dense_hessian(module, weights, batch):
    """The Hessian [P, P] and gradient [P] of the training loss at ``weights``, by nested autograd."""
    names, sizes = list(weights), [w.numel() for w in weights.values()]

    def loss(flat):
        parts = flat.split(sizes)
        params = {n.removeprefix("net."): p.view_as(weights[n]) for n, p in zip(names, parts, strict=True)}
        return module.loss(functional_call(module.net, params, (batch[0],)), batch[1])

    flat = torch.cat([w.flatten() for w in weights.values()])
    H = torch.autograd.functional.hessian(loss, flat)
    assert isinstance(H, torch.Tensor)
    return H, torch.autograd.functional.jacobian(loss, flat)


def watched(make, steps=6, net=tanh_net, data=None, **kwargs):
    """Train in double on the full batch, measuring every step; return records, snapshots, module, trainer."""
    arguments = {"every_n_steps": 1, "samples": 1000, "budget": None, "tol": 1e-9, "max_products": 80, **kwargs}
    recorder, snapshots = Recorder(), Snapshots()
    module, trainer = fit(
        [CurvatureMonitor(**arguments), snapshots],
        lambda: Net(net(), make=make),
        DataLoader(data or blob(), batch_size=24),
        precision="64-true",
        logger=recorder,
        max_steps=steps,
    )
    return recorder, snapshots, module, trainer


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.3)

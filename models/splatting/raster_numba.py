"""Blending on the CPU through compiled kernels, with a backward pass."""

import math
from typing import Any

import numba
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

from evolute.models.splatting import kernels
from evolute.models.splatting.projection import FAINT


class Blend(torch.autograd.Function):
    """Autograd's door to the kernels; see :func:`blend`."""

    @override
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, means2d: Tensor, conics: Tensor, opacities: Tensor, colors: Tensor, lists: Any, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Return image [H, W, C] and alpha [H, W]."""
        inputs = [t.detach().contiguous() for t in (means2d, conics, opacities, _reach(conics, opacities), colors)]
        ids, offsets = lists
        image = torch.empty(*size, colors.shape[1])
        passed = torch.empty(size)
        kernels.forward[_parallel()](*(t.numpy() for t in (*inputs, ids, offsets, image, passed)))
        ctx.save_for_backward(*inputs, ids, offsets, image, passed)
        return image, 1 - passed

    @override
    @staticmethod
    @once_differentiable  # second derivatives are refused, not wrong: who wants them takes differences
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of means2d, conics, opacities and colors."""
        saved = ctx.saved_tensors
        ids, colors = saved[5], saved[4]
        rows = torch.zeros(len(ids), 6 + colors.shape[1])
        arrays = (*saved, grads[0].contiguous(), grads[1].contiguous(), rows)
        kernels.backward[_parallel()](*(t.numpy() for t in arrays))
        out = torch.zeros(len(colors), rows.shape[1])
        kernels.add_rows(ids.numpy(), rows.numpy(), out.numpy())
        return out[:, :2], out[:, 2:5], out[:, 5], out[:, 6:], None, None


def blend(
    means2d: Tensor,
    conics: Tensor,
    opacities: Tensor,
    colors: Tensor,
    lists: tuple[Tensor, Tensor],
    size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Blend as :func:`evolute.models.splatting.raster_torch.blend` does, for float32 tensors on the CPU.

    Runs on as many threads as torch does (:func:`torch.set_num_threads`). The same inputs give the same bits; one
    thread and several are compiled apart and may differ by rounding.
    """
    image, alpha = Blend.apply(means2d, conics, opacities, colors, lists, size)  # pyright: ignore
    return image, alpha


def _reach(conics: Tensor, opacities: Tensor) -> Tensor:
    """Return half sizes [N, 2] of the box around the ellipse of alpha 1/255, negative where alpha never reaches it."""
    a, b, c = conics.detach().double().unbind(-1)
    farthest = torch.log(opacities.detach().double() / FAINT)
    det = (a * c - b * b).clamp_min(1e-20)
    half = torch.sqrt(2 * farthest.clamp_min(0)[:, None] * torch.stack([c, a], -1) / det[:, None])
    # A hair more, so that rounding never decides against the test on alpha itself.
    half = half * (1 + 1e-5) + 1e-3
    return (
        torch.where(farthest[:, None] >= 0, half, -1.0).nan_to_num(math.inf, math.inf, math.inf).clamp_max(1e6).float()
    )


def _parallel() -> bool:
    """Say whether several threads work, and set their number to torch's."""
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # pyright: ignore
    if threads > 1:
        numba.set_num_threads(threads)
    return threads > 1

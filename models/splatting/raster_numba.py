"""Blending on the CPU through compiled kernels, with a backward pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

from evolute.models.splatting import kernels
from evolute.models.splatting.compiled import several_threads


class Blend(torch.autograd.Function):
    """Autograd's door to the kernels; see :func:`blend`."""

    @override
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, means2d: Tensor, conics: Tensor, opacities: Tensor, colors: Tensor, lists: Any, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Return image [H, W, C] and alpha [H, W]."""
        means2d, conics, opacities, colors = (t.detach().contiguous() for t in (means2d, conics, opacities, colors))
        channels = colors.shape[1]
        colors = torch.nn.functional.pad(colors, (0, -channels % kernels.GROUP))
        reach = torch.empty_like(means2d)
        kernels.half_sizes(conics.numpy(), opacities.numpy(), reach.numpy())
        image, passed = torch.empty(*size, channels), torch.empty(size)
        inputs = (means2d, conics, opacities, reach, colors, *lists, image, passed)
        kernels.forward[several_threads()](*(t.numpy() for t in inputs))
        ctx.save_for_backward(*inputs)
        return image, 1 - passed

    @override
    @staticmethod
    @once_differentiable  # second derivatives are refused, not wrong: who wants them takes differences
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of means2d, conics, opacities and colors."""
        saved, several = ctx.saved_tensors, several_threads()
        ids, image = saved[5], saved[7]
        out = torch.zeros(len(saved[0]), 6 + image.shape[2])
        rows = torch.zeros(len(ids), out.shape[1]) if several else out
        arrays = [t.contiguous().numpy() for t in (*saved, *grads, rows)]
        kernels.backward[several](*arrays[:-1], several, arrays[-1])
        if several:
            kernels.add_rows(ids.numpy(), arrays[-1], out.numpy())
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

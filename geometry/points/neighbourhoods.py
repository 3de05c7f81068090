"""Local shape of a point cloud from the covariance of nearest neighbours."""

from dataclasses import dataclass

import torch
from scipy.spatial import KDTree
from torch import Tensor

AT_ONCE = 65536
"""Points whose neighbours are held at a time."""


@dataclass(frozen=True)
class Neighbourhoods:
    """What the ``k`` nearest neighbours of each point say.

    Attributes:
        variation: surface variation [N], see :func:`surface_variation`.
        texture: texture variation [N], see :func:`texture_variation`; None without colours.
        normals: unit vectors [N, 3] along the axis of least variance; their sign is arbitrary.
    """

    variation: Tensor
    texture: Tensor | None
    normals: Tensor


def neighbourhoods(points: Tensor, k: int, colors: Tensor | None = None) -> Neighbourhoods:
    """Return surface variation, texture variation and normals from one search for neighbours.

    A neighbourhood is a point's ``k`` nearest neighbours, itself among them; with fewer points, all of them.

    Args:
        points: [N, 3], finite.
        k: neighbours, at least 1.
        colors: [N, C].

    Raises:
        ValueError: if ``k`` is below 1, the shapes do not fit, or a point is not finite.
    """
    _check(points, k, colors)
    if not len(points):
        empty = points.new_zeros(0)
        return Neighbourhoods(empty, None if colors is None else empty, points.new_zeros(0, 3))
    exact = points.detach().double().cpu()
    tree = KDTree(exact.numpy())
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for begin in range(0, len(points), AT_ONCE):
        nearest = torch.from_numpy(tree.query(exact[begin : begin + AT_ONCE].numpy(), k=min(k, len(points)))[1])
        nearest = nearest.reshape(-1, min(k, len(points)))
        values, vectors = _spread(exact[nearest])
        texture = _texture(colors.detach().double().cpu()[nearest]) if colors is not None else values[:, 0]
        parts.append((_variation(values), texture, vectors[:, :, 0]))
    variation, texture, normals = (torch.cat(part).to(points) for part in zip(*parts, strict=True))
    return Neighbourhoods(variation, None if colors is None else texture, normals)


def surface_variation(points: Tensor, k: int) -> Tensor:
    """Return the surface variation of every point: ``l1 / (l1 + l2 + l3)``.

    ``l1 <= l2 <= l3`` are the eigenvalues of the covariance of the ``k`` nearest neighbours: 0 on a plane or a line, up
    to 1/3 where they spread alike in all directions. It does not change under rotation, shift or scale. (Pauly, Gross
    and Kobbelt 2002, section 2; GTLR-GS, arXiv 2603.23192, equations 1 and 2, as a reproduction cites them.)

    Args:
        points: [N, 3].
        k: neighbours, the point itself among them.

    Returns:
        [N] in [0, 1/3]; 0 where all neighbours coincide.
    """
    return neighbourhoods(points, k).variation


def texture_variation(points: Tensor, colors: Tensor, k: int) -> Tensor:
    """Return the mean over channels of the (biased) variance of colour among the ``k`` nearest neighbours, [N].

    0 where colour is constant; 0.25 where half is black and half white. (GTLR-GS, equation 3, likewise second-hand.)

    Args:
        points: [N, 3].
        colors: [N, C] in [0, 1].
        k: neighbours, the point itself among them.
    """
    texture = neighbourhoods(points, k, colors).texture
    assert texture is not None
    return texture


def subset_neighbourhoods(
    points: Tensor,
    wanted: Tensor,
    k: int,
    colors: Tensor | None = None,
    reference: int = 200_000,
    generator: torch.Generator | None = None,
) -> Neighbourhoods:
    """Return what the neighbourhoods of some points say, among all or among a random subset of them.

    Args:
        points: all points [N, 3], finite.
        wanted: indices [M] of the points to evaluate.
        k: neighbours, the point itself among them (it always is, whether drawn or not).
        colors: [N, C].
        reference: at most so many points are searched.
        generator: draws the subset.
    """
    _check(points, k, colors)
    if not len(wanted):
        empty = points.new_zeros(0)
        return Neighbourhoods(empty, None if colors is None else empty, points.new_zeros(0, 3))
    exact = points.detach().double().cpu()
    wanted = wanted.cpu()
    chosen = torch.arange(len(exact))
    if len(exact) > reference:
        chosen = torch.randperm(len(exact), generator=generator)[:reference]
    near = min(k, len(chosen))
    found = KDTree(exact[chosen].numpy()).query(exact[wanted].numpy(), k=near)[1]
    nearest = chosen[torch.from_numpy(found).reshape(len(wanted), near)]
    # By identity: where the subset lacks the point itself, it takes the place of the farthest neighbour.
    absent = (nearest != wanted[:, None]).all(1)
    nearest[absent, -1] = wanted[absent]
    values, vectors = _spread(exact[nearest])
    texture = None if colors is None else _texture(colors.detach().double().cpu()[nearest]).to(points)
    return Neighbourhoods(_variation(values).to(points), texture, vectors[:, :, 0].to(points))


def _check(points: Tensor, k: int, colors: Tensor | None) -> None:
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"points: must be [N, 3], got {tuple(points.shape)}")
    if k < 1:
        raise ValueError(f"k={k}: must be at least 1")
    if colors is not None and (colors.ndim != 2 or len(colors) != len(points)):
        raise ValueError(f"colors: must be [N, C] for {len(points)} points, got {tuple(colors.shape)}")
    if not bool(points.isfinite().all()):
        raise ValueError(f"points: {int((~points.isfinite()).any(1).sum())} of {len(points)} are not finite")


def _spread(held: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues [n, 3], ascending, and eigenvectors [n, 3, 3] of the covariance of points [n, k, 3]."""
    centred = held - held.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(centred.transpose(1, 2) @ centred / held.shape[1])
    return values.clamp_min(0), vectors


def _variation(values: Tensor) -> Tensor:
    total = values.sum(1)
    return torch.where(total > 0, values[:, 0] / total, torch.zeros_like(total))


def _texture(held: Tensor) -> Tensor:
    return held.var(1, unbiased=False).mean(-1)

"""Shape, texture and allocation of point clouds against closed forms and brute force."""

import math

import pytest
import torch

from evolute.geometry import (
    admit,
    allocation_probabilities,
    depth_confidence,
    draw,
    neighbourhoods,
    plane_depth,
    relocated,
    split_threshold,
    subset_neighbourhoods,
    surface_variation,
    texture_variation,
)


def points(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def brute_force(cloud: torch.Tensor, colors: torch.Tensor, k: int) -> tuple[list[float], list[float]]:
    variation, texture = [], []
    for p in cloud:
        near = (cloud - p).norm(dim=1).argsort()[:k]
        values = torch.linalg.svdvals(cloud[near] - cloud[near].mean(0)).square()
        variation.append((values[-1] / values.sum()).item())
        texture.append(colors[near].var(0, unbiased=False).mean().item())
    return variation, texture


def test_both_variations_equal_brute_force():
    cloud, colors = points(80), torch.rand(80, 3, dtype=torch.float64)
    variation, texture = brute_force(cloud, colors, 9)
    assert surface_variation(cloud, 9).tolist() == pytest.approx(variation, rel=1e-9)
    assert texture_variation(cloud, colors, 9).tolist() == pytest.approx(texture, rel=1e-12)


def test_planes_and_lines_have_none_and_a_blob_a_third():
    plane = points(300) * torch.tensor([1.0, 1.0, 0.0])
    line = points(300) * torch.tensor([1.0, 0.0, 0.0])
    assert surface_variation(plane, 16).max() < 1e-12
    assert surface_variation(line, 16).max() < 1e-12
    assert surface_variation(points(4000), 4000)[0].item() == pytest.approx(1 / 3, abs=0.02)
    assert surface_variation(torch.ones(5, 3), 4).eq(0).all()
    assert surface_variation(points(1), 16).tolist() == [0.0]
    assert surface_variation(points(0), 16).shape == (0,)


def test_variation_does_not_see_rotation_scale_or_shift():
    cloud = points(200)
    turn = torch.linalg.qr(points(3, seed=1))[0]
    moved = 7.0 * cloud @ turn + torch.tensor([3.0, -1.0, 10.0], dtype=torch.float64)
    torch.testing.assert_close(surface_variation(moved, 12), surface_variation(cloud, 12), rtol=1e-9, atol=1e-12)


def test_normals_of_a_sphere_are_radial():
    ball = torch.nn.functional.normalize(points(4000), dim=1)
    assert (neighbourhoods(ball, 12).normals * ball).sum(1).abs().min() > 0.98


def test_texture_of_a_constant_is_zero_and_of_black_and_white_a_quarter():
    colors = torch.tensor([0.0, 1.0]).repeat(20)[:, None].expand(40, 3)
    assert texture_variation(points(40), colors, 40)[0].item() == pytest.approx(0.25)
    assert texture_variation(points(40), torch.full((40, 3), 0.3), 8).max() < 1e-15


@pytest.mark.parametrize("reference", [1000, 60])
def test_a_subset_keeps_the_point_itself(reference):
    cloud, wanted = points(200), torch.tensor([3, 77, 150])
    generator = torch.Generator().manual_seed(0)
    found = subset_neighbourhoods(cloud, wanted, 10, None, reference, generator).variation
    chosen = torch.arange(200)
    if reference < 200:
        chosen = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:reference]
    for at, value in zip(wanted, found, strict=True):
        others = chosen[chosen != at]
        near = others[(cloud[others] - cloud[at]).norm(dim=1).argsort()[:9]]
        held = torch.cat([cloud[at][None], cloud[near]])
        values = torch.linalg.svdvals(held - held.mean(0)).square()
        assert value.item() == pytest.approx((values[-1] / values.sum()).item(), rel=1e-9)


def test_probabilities_sum_to_one_prefer_detail_and_reproduce():
    plane = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plane[:, 2] = 0
    rough = plane[:400] + torch.tensor([2.0, 0, 0]) + 0.1 * points(400)
    cloud = torch.cat([plane, rough])
    colors = torch.full((2400, 3), 0.5, dtype=torch.float64)
    p = allocation_probabilities(cloud, colors, 16)
    assert p.sum().item() == pytest.approx(1.0)
    assert p.min() >= 0
    assert p[2000:].mean() > 20 * p[:2000].mean()
    even = allocation_probabilities(cloud, colors, 16, base_ratio=0.5)
    torch.testing.assert_close(even, 0.5 * p + 0.5 / 2400)
    picked = draw(p, 300, torch.Generator().manual_seed(1))
    assert torch.equal(picked, draw(p, 300, torch.Generator().manual_seed(1)))
    assert len(picked.unique()) == 300
    assert (picked >= 2000).float().mean() > 0.5


def test_draws_follow_the_probabilities_of_successive_sampling():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    missing = torch.zeros(3)
    for _ in range(4000):
        kept = draw(p, 2, generator)
        missing[3 - int(kept.sum())] += 1
    # Left out last: the orders (i, j) of the other two, p_i p_j / (1 - p_i) each.
    expected = [
        sum(p[i] * p[j] / (1 - p[i]) for i, j in ((a, b), (b, a)))
        for a, b in ((1, 2), (0, 2), (0, 1))
    ]  # fmt: skip
    for share, exact in zip((missing / 4000).tolist(), expected, strict=True):
        assert share == pytest.approx(exact.item(), abs=4 * math.sqrt(0.25 / 4000))


def test_where_nothing_stands_out_all_points_are_alike():
    cloud = points(50) * torch.tensor([1.0, 1.0, 0.0])
    p = allocation_probabilities(cloud, torch.full((50, 3), 0.5), 8)
    torch.testing.assert_close(p, torch.full_like(p, 1 / 50))
    odd = torch.full((50, 3), torch.nan, dtype=torch.float64)
    torch.testing.assert_close(allocation_probabilities(cloud, odd, 8), p)
    assert draw(p, 80).tolist() == list(range(50))
    only_one = torch.zeros(50)
    only_one[7] = 1
    assert 7 in draw(only_one, 5, torch.Generator().manual_seed(0)).tolist()


def test_one_outlier_squeezes_minmax_and_not_quantiles():
    cloud, colors = points(2000), torch.rand(2000, 3, generator=torch.Generator().manual_seed(1)) * 0.1
    colors = colors.double()
    colors[0] = 100.0
    spread = [allocation_probabilities(cloud, colors, 8, 0.0, 1.0, n)[50:].std() for n in ("quantile", "minmax")]
    assert spread[0] > 1e-5
    assert (allocation_probabilities(cloud, colors, 8, 0.0, 1.0, "quantile") > 1e-8).float().mean() > 0.9


@pytest.mark.parametrize("bad", [{"shape_weight": -1}, {"base_ratio": 1.5}, {"normalise": "z"}, {"k": 0}])
def test_arguments_out_of_range_are_refused_with_their_value(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
        allocation_probabilities(points(9), torch.rand(9, 3), **{"k": 4, **bad})
    with pytest.raises(ValueError, match="budget=0"):
        draw(torch.ones(3), 0)
    with pytest.raises(ValueError, match="1 of 9 are not finite"):
        surface_variation(points(9).index_fill(0, torch.tensor([2]), torch.inf), 3)


def test_confidence_is_one_on_flat_images_and_zero_at_the_sharpest_edge():
    assert depth_confidence(torch.full((6, 5, 3), 0.4)).eq(1).all()
    step = torch.zeros(8, 8)
    step[:, 4:] = 1.0
    trust = depth_confidence(step)
    assert trust[:, 3:5].eq(0).all()
    assert trust[:, [0, 1, 2, 5, 6, 7]].eq(1).all()
    noisy = depth_confidence(torch.rand(20, 20, 3), "quantile")
    assert ((noisy >= 0) & (noisy <= 1)).all()


def test_plane_depth_is_where_the_ray_meets_the_plane():
    normal = torch.nn.functional.normalize(torch.tensor([0.3, -0.2, -0.9], dtype=torch.float64), dim=0)
    d = normal @ torch.tensor([0.1, 0.2, 3.0], dtype=torch.float64)
    u, v = torch.meshgrid(
        torch.linspace(-0.5, 0.5, 9, dtype=torch.float64), torch.linspace(-1, 1, 7).double(), indexing="xy"
    )
    rays = torch.stack([u, v, torch.ones_like(u)], -1)
    weight = torch.rand(7, 9, dtype=torch.float64) + 0.5
    depth = plane_depth(weight[..., None] * normal, weight * d, rays)
    torch.testing.assert_close(((depth[..., None] * rays) @ normal), d.expand(7, 9))
    assert plane_depth(torch.zeros(1, 1, 3), torch.ones(1, 1), torch.ones(1, 1, 3)).isnan().all()


def test_the_threshold_of_splits_closes_over_the_run():
    assert split_threshold(0, 30) == pytest.approx(0.1)
    assert split_threshold(15, 30) == pytest.approx(0.2)
    assert split_threshold(30, 30) == split_threshold(99, 30) == pytest.approx(0.3)


def test_the_most_important_are_admitted_and_the_room_is_never_exceeded():
    priority, cost = torch.tensor([1.0, 5, 3, 5, 2]), torch.tensor([1, 1, 2, 1, 1])
    assert admit(priority, cost, 2).tolist() == [1, 3]
    assert admit(priority, cost, 4).tolist() == [1, 3, 2]
    assert admit(priority, cost, 0).tolist() == []


def test_relocated_gaussians_let_the_same_light_through_and_add_up_to_the_same_integral():
    opacity = torch.tensor([0.05, 0.5, 0.9], dtype=torch.float64)
    scales = torch.rand(3, 3, dtype=torch.float64) + 0.1
    x = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    for n in (1, 2, 5, 20):
        o, s = relocated(opacity, scales, torch.full((3,), n))
        torch.testing.assert_close((1 - o) ** n, 1 - opacity)
        for i in range(3):
            # Across the image, n of them in a row cover 1 - (1 - o g)^n; the integral of that is kept.
            new = 1 - (1 - o[i] * torch.exp(-0.5 * (x / (s[i, 0] / scales[i, 0])) ** 2)) ** n
            old = opacity[i] * torch.exp(-0.5 * x**2)
            assert torch.trapezoid(new, x).item() == pytest.approx(torch.trapezoid(old, x).item(), rel=1e-6)

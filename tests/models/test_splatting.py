"""The rasterizers against closed forms, against each other, and against gsplat's own torch code."""

import math

import pytest
import torch

from evolute.models.splatting import (
    Camera,
    Gaussians,
    GaussianScene,
    harmonics,
    project,
    projection_numba,
    read_ply,
    render,
    rotations,
    tile_lists,
    tiles_numba,
    write_ply,
)
from evolute.models.splatting.raster_torch import blend
from evolute.models.splatting.tiles import TILE

FIELDS = ("means", "scales", "quats", "opacities", "colors")


def cloud(n: int, channels: int = 3, stretch: float = 6.0, seed: int = 0, dtype=torch.float64) -> Gaussians:
    """Random Gaussians in front of a camera at the origin; ``stretch`` is the largest ratio of two axes."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    fields = (
        (uniform(n, 3) - 0.5) * 4 + torch.tensor([0.0, 0.0, 5.0]),
        0.12 * stretch ** -uniform(n, 3),
        torch.randn(n, 4, generator=generator, dtype=torch.float64),
        0.05 + 0.9 * uniform(n),
        uniform(n, channels),
    )
    return Gaussians(*(f.float().to(dtype) for f in fields))  # the same numbers in either precision


def camera(width: int, height: int) -> Camera:
    K = torch.tensor([[1.1 * width, 0, 0.48 * width], [0, 1.05 * width, 0.53 * height], [0, 0, 1]])
    return Camera(torch.eye(4), K, width, height)


def outcome(gaussians: Gaussians, view: Camera, backend, upstream: torch.Tensor):
    """Image, alpha, and the gradients of all inputs under a given upstream gradient."""
    leaves = [getattr(gaussians, name).clone().requires_grad_() for name in FIELDS]
    seen = render(Gaussians(*leaves), view, backend)
    both = torch.cat([seen.image, seen.alpha[..., None]], -1)
    (both * upstream.to(both)).sum().backward()
    return both.detach().double(), [leaf.grad.double() for leaf in leaves]


def near_a_threshold(gaussians: Gaussians, view: Camera) -> torch.Tensor:
    """Pixels [H, W] where some Gaussian is within rounding of a cut-off, so that precisions may decide differently."""
    seen = project(gaussians, view.to(gaussians.means))
    v, u = (torch.arange(size) + 0.5 for size in (view.height, view.width))
    order = torch.argsort(seen.depths)[(seen.radii[torch.argsort(seen.depths)] > 0).all(-1)]
    dx = seen.means2d[order, 0, None, None] - u
    dy = seen.means2d[order, 1, None, None] - v[:, None]
    a, b, c = (x[:, None, None] for x in seen.conics[order].unbind(-1))
    alpha = gaussians.opacities[order, None, None] * torch.exp(-0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy)
    drawn = torch.where(alpha >= 1 / 255, alpha.clamp_max(0.999), torch.zeros_like(alpha))
    left = torch.cumprod(1 - drawn, 0)
    close = ((alpha * 255 - 1).abs() < 1e-4) | ((left / 1e-4 - 1).abs() < 1e-3) | ((alpha - 0.999).abs() < 1e-5)
    return close.any(0)


@pytest.mark.parametrize(
    ("n", "width", "height", "channels", "stretch"),
    [(3000, 96, 96, 3, 6), (800, 50, 37, 8, 6), (600, 33, 64, 1, 100), (900, 65, 47, 4, 100)],
)
def test_compiled_blending_agrees_with_the_float64_reference(n, width, height, channels, stretch):
    exact, view = cloud(n, channels, stretch), camera(width, height)
    upstream = torch.randn(height, width, channels + 1, generator=torch.Generator().manual_seed(5))
    unsure = near_a_threshold(exact, view)
    assert unsure.float().mean() < 0.15
    upstream[unsure] = 0
    image, grads = outcome(exact, view, "torch", upstream)
    single = Gaussians(*(getattr(exact, name).float() for name in FIELDS))
    fast_image, fast_grads = outcome(single, view, "numba", upstream)
    assert (image - fast_image)[~unsure].abs().max() <= 5e-6
    for name, g, fast in zip(FIELDS, grads, fast_grads, strict=True):
        assert (g - fast).norm() <= 5e-6 * g.norm(), name


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_nothing_to_draw_is_black_with_zero_gradients(backend):
    away = cloud(20, dtype=torch.float32)
    behind = Gaussians(-away.means, away.scales, away.quats, away.opacities, away.colors)
    faint = Gaussians(away.means, away.scales, away.quats, torch.full((20,), 0.003), away.colors)
    for scene in (cloud(0, dtype=torch.float32), behind, faint):
        both, grads = outcome(scene, camera(21, 18), backend, torch.ones(18, 21, 4))
        assert both.shape == (18, 21, 4)
        assert not both.any()
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_one_round_gaussian_has_the_closed_form(backend):
    f, z, sigma, opacity = 40.0, 2.0, 0.1, 0.7
    view = Camera(torch.eye(4), torch.tensor([[f, 0, 16.5], [0, f, 16.5], [0, 0, 1]]), 33, 33)
    one = Gaussians(
        torch.tensor([[0.0, 0, z]]), torch.full((1, 3), sigma), torch.tensor([[1.0, 0, 0, 0]]),
        torch.tensor([opacity]), torch.tensor([[0.2, 0.5, 0.9]]),
    )  # fmt: skip
    seen = render(one, view, backend)
    variance = (f * sigma / z) ** 2 + 0.3
    v, u = torch.meshgrid(torch.arange(33) - 16.0, torch.arange(33) - 16.0, indexing="ij")
    alpha = opacity * torch.exp(-(u**2 + v**2) / (2 * variance))
    alpha[alpha < 1 / 255] = 0
    torch.testing.assert_close(seen.alpha, alpha, atol=2e-6, rtol=0)
    torch.testing.assert_close(seen.image, alpha[..., None] * one.colors, atol=2e-6, rtol=0)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_the_nearer_covers_the_farther_and_swapping_depths_swaps_them(backend):
    view = camera(17, 17)
    center = torch.linalg.inv(view.K) @ torch.tensor([8.5, 8.5, 1.0])
    colors, opacity = torch.eye(2), torch.tensor([0.6, 0.8])
    for depths in ((1.0, 2.0), (2.0, 1.0)):
        means = torch.stack([center * d for d in depths])
        two = Gaussians(means, torch.full((2, 3), 0.05), torch.eye(4)[:1].expand(2, 4), opacity, colors)
        pixel = render(two, view, backend).image[8, 8]
        a, b = (0.6, 0.8) if depths[0] < depths[1] else (0.8, 0.6)
        expected = [a, (1 - a) * b] if depths[0] < depths[1] else [(1 - a) * b, a]
        torch.testing.assert_close(pixel, torch.tensor(expected), atol=2e-6, rtol=0)


def test_the_reference_passes_gradcheck():
    scene, view = cloud(9, seed=3), camera(12, 9)
    view = view.to(scene.means)

    def image(*fields: torch.Tensor) -> torch.Tensor:
        seen = render(Gaussians(*fields), view, "torch")
        return torch.cat([seen.image, seen.alpha[..., None]], -1)

    leaves = tuple(getattr(scene, name).requires_grad_() for name in FIELDS)
    assert not near_a_threshold(Gaussians(*(leaf.detach() for leaf in leaves)), view).any()
    assert torch.autograd.gradcheck(image, leaves, eps=1e-7, atol=1e-5)


def test_moving_world_and_camera_together_changes_nothing():
    scene, view = cloud(200), camera(40, 40).to(torch.zeros(1, dtype=torch.float64))
    turn = torch.nn.functional.normalize(torch.tensor([[0.3, 0.8, -0.1, 0.5]], dtype=torch.float64))
    R, t = rotations(turn)[0], torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    w, x, y, z = turn[0]
    left = torch.stack([torch.stack(r) for r in ((w, -x, -y, -z), (x, w, -z, y), (y, z, w, -x), (z, -y, x, w))])
    moved = Gaussians(scene.means @ R.T + t, scene.scales, scene.quats @ left.T, scene.opacities, scene.colors)
    viewmat = torch.eye(4, dtype=torch.float64)
    viewmat[:3, :3], viewmat[:3, 3] = R.T, -R.T @ t
    other = Camera(viewmat, view.K, 40, 40)
    torch.testing.assert_close(render(scene, view).image, render(moved, other).image, atol=1e-9, rtol=0)


def test_order_changes_no_bit_of_the_image_and_threads_only_the_last_ones():
    scene, view = cloud(500, dtype=torch.float32), camera(50, 40)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    shuffled = Gaussians(*(getattr(scene, name)[order] for name in FIELDS))
    upstream = torch.randn(40, 50, 4, generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        image, grads = outcome(scene, view, "numba", upstream)
        twice, same = outcome(scene, view, "numba", upstream)
        again, other = outcome(shuffled, view, "numba", upstream)
        torch.set_num_threads(2)
        third, more = outcome(scene, view, "numba", upstream)
        fourth, still = outcome(scene, view, "numba", upstream)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(image, twice)
    assert torch.equal(image, again)
    assert torch.equal(third, fourth)
    assert all(torch.equal(a, b) for a, b in zip(grads + more, same + still, strict=True))
    assert (image - third).abs().max() < 2e-6  # compiled apart, for one thread and for several
    for g, h, i in zip(grads, other, more, strict=True):
        assert (g[order] - h).norm() <= 2e-6 * g.norm()
        assert (g - i).norm() <= 2e-6 * g.norm()


def spread(n: int = 300, stretch: float = 30, dtype=torch.float32) -> Gaussians:
    """A cloud of which some lie beyond the field of view, where the Jacobian is held, and some behind the camera."""
    scene = cloud(n, stretch=stretch, dtype=dtype)
    moved = scene.means * torch.tensor([2.0, 2.0, 1.0]).to(dtype)
    moved[::17, 2] *= -1
    return Gaussians(moved, scene.scales, scene.quats, scene.opacities, scene.colors)


@pytest.mark.parametrize(
    ("projected", "listed"),
    [(project, tile_lists), (projection_numba.project, tiles_numba.tile_lists)],
    ids=["torch", "numba"],
)
def test_projection_and_lists_are_gsplats(projected, listed):
    from gsplat.cuda import _torch_impl as impl

    scene, view = spread(), camera(70, 45)
    ours = projected(scene, view)
    covariance, _ = impl._quat_scale_to_covar_preci(scene.quats, scene.scales, True, False)
    radii, means2d, depths, conics, _ = impl._fully_fused_projection(
        scene.means, covariance, view.viewmat[None], view.K[None], 70, 45
    )
    drawn = (radii[0] > 0).all(-1)
    assert torch.equal((ours.radii > 0).all(-1), drawn)
    assert 50 < drawn.sum() < 300
    assert torch.equal(ours.radii[drawn], radii[0][drawn])
    torch.testing.assert_close(ours.means2d[drawn], means2d[0][drawn], atol=2e-5, rtol=1e-6)
    torch.testing.assert_close(ours.conics[drawn], conics[0][drawn], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(ours.depths, depths[0])
    across, down = -(-70 // TILE), -(-45 // TILE)
    _, keys, flat = impl._isect_tiles(ours.means2d[None], ours.radii[None], ours.depths[None], TILE, across, down)
    ids, offsets = listed(ours.means2d, ours.radii, ours.depths, 70, 45)
    assert torch.equal(ids.int(), flat)
    begins = impl._isect_offset_encode(keys, 1, across, down)
    assert torch.equal(offsets[:-1].int(), begins.flatten().int())


@pytest.mark.parametrize("stretch", [6, 100])
def test_the_compiled_projection_and_its_gradients_are_those_of_float64(stretch):
    turn = torch.nn.functional.normalize(torch.tensor([[0.95, 0.1, -0.2, 0.05]]), dim=-1)
    viewmat = torch.eye(4)
    viewmat[:3, :3], viewmat[:3, 3] = rotations(turn)[0], torch.tensor([0.1, -0.2, 0.3])
    view = Camera(viewmat, camera(70, 45).K, 70, 45)
    results = []
    for dtype, projected in ((torch.float64, project), (torch.float32, projection_numba.project)):
        scene = spread(400, stretch, dtype)
        leaves = [getattr(scene, name).requires_grad_() for name in FIELDS[:3]]
        seen = projected(Gaussians(*leaves, scene.opacities, scene.colors), view.to(scene.means))
        drawn = (seen.radii > 0).all(-1)
        generator = torch.Generator().manual_seed(1)
        parts = [seen.means2d, seen.conics, seen.depths[:, None]]
        weights = [torch.randn(400, p.shape[1], generator=generator).to(p) * drawn[:, None] for p in parts]
        torch.autograd.backward(parts, weights)
        results.append((seen.radii, [p.detach()[drawn].double() for p in parts], [x.grad.double() for x in leaves]))
    (radii, exact, grads), (fast_radii, fast, fast_grads) = results
    assert torch.equal(radii, fast_radii)
    assert 50 < (radii > 0).all(-1).sum() < 380
    for a, b in zip(exact + grads, fast + fast_grads, strict=True):
        assert (a - b).norm() <= 1e-6 * a.norm()
        assert a.norm() > 0


def test_a_camera_that_is_differentiated_gets_its_gradient_from_the_compiled_backend_too():
    scene, grads = cloud(100), []
    for dtype, backend in ((torch.float64, "torch"), (torch.float32, "numba")):
        viewmat = torch.eye(4, dtype=dtype).requires_grad_()
        view = Camera(viewmat, camera(30, 30).K, 30, 30)
        seen = render(Gaussians(*(getattr(scene, name).to(dtype) for name in FIELDS)), view, backend)
        seen.image.square().sum().backward()
        grads.append(viewmat.grad.double())
    assert (grads[0] - grads[1]).norm() <= 1e-4 * grads[0].norm()


def test_compiled_lists_keep_the_order_of_equal_depths_and_sort_negative_ones():
    generator = torch.Generator().manual_seed(0)
    means2d = torch.rand(400, 2, generator=generator) * 90 - 10
    radii = torch.randint(0, 40, (400, 2), generator=generator, dtype=torch.int32)
    depths = torch.randint(-5, 5, (400,), generator=generator).float() * 1e-3
    expected = tile_lists(means2d, radii, depths, 65, 47)
    assert all(
        torch.equal(a, b) for a, b in zip(expected, tiles_numba.tile_lists(means2d, radii, depths, 65, 47), strict=True)
    )


def test_harmonics_are_gsplats():
    from gsplat.cuda import _torch_impl as impl

    directions = torch.nn.functional.normalize(torch.randn(50, 3, generator=torch.Generator().manual_seed(2)), dim=-1)
    for degree in range(4):
        theirs = impl._eval_sh_bases_fast((degree + 1) ** 2, directions)
        torch.testing.assert_close(harmonics(degree, directions), theirs, atol=1e-6, rtol=1e-5)


def test_harmonics_are_orthonormal_on_the_sphere():
    n = 40
    cos, weights = map(torch.from_numpy, __import__("numpy").polynomial.legendre.leggauss(n))
    phi = torch.arange(2 * n, dtype=torch.float64) * math.pi / n
    sin = (1 - cos**2).sqrt()[:, None]
    grid = torch.stack([sin * phi.cos(), sin * phi.sin(), cos[:, None].expand(-1, 2 * n)], -1).reshape(-1, 3)
    basis = harmonics(3, grid)
    area = (weights[:, None] * (math.pi / n)).expand(-1, 2 * n).reshape(-1, 1)
    torch.testing.assert_close(basis.T @ (area * basis), torch.eye(16, dtype=torch.float64), atol=1e-12, rtol=0)


def scene_with_everything(n: int = 40, degree: int = 3) -> GaussianScene:
    generator = torch.Generator().manual_seed(4)
    scene = GaussianScene(n, degree)
    for p in scene.params.values():
        p.data = torch.randn(p.shape, generator=generator)
    return scene


@pytest.mark.parametrize("degree", [0, 1, 3])
def test_a_scene_survives_its_ply_bit_by_bit(degree, tmp_path):
    scene = scene_with_everything(degree=degree)
    back = read_ply(write_ply(scene, tmp_path / "scene.ply"))
    assert back.sh_degree == degree
    assert all(torch.equal(p, back.params[name]) for name, p in scene.params.items())


def test_others_read_our_ply(tmp_path):
    import gsply

    scene = scene_with_everything()
    data = gsply.plyread(str(write_ply(scene, tmp_path / "scene.ply")))
    for name, theirs in (("means", data.means), ("scales", data.scales), ("quats", data.quats)):
        assert torch.equal(scene.params[name].detach(), torch.as_tensor(theirs)), name
    assert torch.equal(scene.params["opacities"].detach(), torch.as_tensor(data.opacities).reshape(-1))
    assert torch.equal(scene.params["sh0"].detach()[:, 0], torch.as_tensor(data.sh0).reshape(-1, 3))
    assert torch.equal(scene.params["shN"].detach(), torch.as_tensor(data.shN).reshape(40, 15, 3))


def test_a_file_that_is_no_scene_is_refused_by_name(tmp_path):
    from plyfile import PlyData

    path = write_ply(scene_with_everything(), tmp_path / "scene.ply")
    vertex = PlyData.read(str(path))["vertex"]
    (tmp_path / "text.ply").write_text("no scene")
    with pytest.raises(ValueError, match=r"text\.ply: not a readable"):
        read_ply(tmp_path / "text.ply")
    import numpy.lib.recfunctions as rfn
    from plyfile import PlyElement

    for dropped, message in (("opacity", "lacks the properties opacity"), ("f_rest_3", "44 f_rest")):
        rows = rfn.drop_fields(vertex.data, dropped)
        PlyData([PlyElement.describe(rows, "vertex")]).write(str(tmp_path / "bad.ply"))
        with pytest.raises(ValueError, match=rf"bad\.ply: .*{message}"):
            read_ply(tmp_path / "bad.ply")


def test_discs_lie_on_the_surface_they_are_made_from():
    normals = torch.nn.functional.normalize(torch.randn(30, 3, generator=torch.Generator().manual_seed(6)), dim=-1)
    normals[0] = torch.tensor([0.0, 0.0, -1.0])
    scene = GaussianScene.from_points(torch.rand(30, 3), torch.rand(30, 3), normals=normals)
    axis = rotations(scene.params["quats"].detach())[:, :, 2]
    torch.testing.assert_close((axis * normals).sum(-1), torch.ones(30), atol=1e-5, rtol=0)
    assert (scene.params["scales"].argmin(-1) == 2).all()


def test_a_backend_that_cannot_take_the_tensors_says_so():
    with pytest.raises(ValueError, match="float32 on the CPU"):
        render(cloud(3), camera(8, 8), "numba")
    with pytest.raises(ValueError, match="needs CUDA"):
        render(cloud(3, dtype=torch.float32), camera(8, 8), "gsplat")
    with pytest.raises(ValueError, match="'fast'"):
        render(cloud(3), camera(8, 8), "fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scales has shape \(2, 3\)"):
        Gaussians(torch.zeros(3, 3), torch.zeros(2, 3), torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, 3))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gsplat_on_a_gpu_agrees_with_the_reference():
    scene, view = cloud(800, 3), camera(96, 64)
    unsure = near_a_threshold(scene, view)
    reference = render(scene, view, "torch").image
    there = Gaussians(*(getattr(scene, name).float().cuda() for name in FIELDS))
    image = render(there, view, "auto").image.cpu().double()
    assert (image - reference)[~unsure].abs().max() <= 5e-5


def test_blending_takes_no_gaussians_in_a_tile():
    empty = torch.zeros(0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    image, alpha = blend(torch.zeros(0, 2), torch.zeros(0, 3), torch.zeros(0), torch.zeros(0, 5), empty, (4, 7))
    assert image.shape == (4, 7, 5)
    assert not image.any()
    assert not alpha.any()

"""Scenes: written and read back, geometry of the room against ray casting by hand, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from evolute.data.scenes import (
    SceneDataModule,
    make_room,
    project_cloud,
    read_cloud,
    read_colmap,
    read_transforms,
    write_cloud,
    write_colmap,
)

SMALL = {"views": 9, "width": 24, "height": 20, "lidar": 4000}


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    return make_room(tmp_path_factory.mktemp("scene") / "room", **SMALL)


@pytest.fixture
def copy(room, tmp_path) -> Path:
    return Path(shutil.copytree(room, tmp_path / "copy"))


def test_all_formats_hold_the_same_scene(room, copy):
    text, frames = read_colmap(room), read_transforms(room)
    write_colmap(text, copy, "bin")
    binary = read_colmap(copy)
    for other in (frames, binary):
        assert [v.path.name for v in other.views] == [v.path.name for v in text.views]
        for a, b in zip(text.views, other.views, strict=True):
            np.testing.assert_allclose(a.viewmat, b.viewmat, atol=1e-12)
            np.testing.assert_array_equal(a.K, b.K)
            np.testing.assert_array_equal(a.depth(), b.depth())
    np.testing.assert_array_equal(text.points, binary.points)
    np.testing.assert_allclose(text.points, frames.points, atol=1e-6)  # .ply holds float32
    np.testing.assert_allclose(text.colors, frames.colors, atol=1e-12)


@pytest.mark.parametrize("kind", ["txt", "bin"])
def test_colmap_itself_reads_what_we_write_and_writes_what_we_read(room, copy, kind):
    import pycolmap

    ours = read_colmap(room)
    theirs = pycolmap.Reconstruction(str(write_colmap(ours, copy, kind)))
    by_name = {image.name: image for image in theirs.images.values()}
    assert set(by_name) == {v.path.name for v in ours.views}
    for view in ours.views:
        image = by_name[view.path.name]
        np.testing.assert_allclose(image.cam_from_world().matrix(), view.viewmat[:3], atol=1e-12)
        np.testing.assert_allclose(image.camera.calibration_matrix(), view.K, atol=1e-12)
        assert (image.camera.width, image.camera.height) == (view.width, view.height)
    points = np.array([theirs.points3D[i].xyz for i in sorted(theirs.points3D)])
    colors = np.array([theirs.points3D[i].color for i in sorted(theirs.points3D)])
    np.testing.assert_allclose(points, ours.points, atol=1e-12)
    np.testing.assert_array_equal(colors, np.round(ours.colors * 255))
    shutil.rmtree(copy / "sparse")
    (copy / "sparse" / "0").mkdir(parents=True)
    {"txt": theirs.write_text, "bin": theirs.write_binary}[kind](str(copy / "sparse" / "0"))
    back = read_colmap(copy)
    for a, b in zip(ours.views, back.views, strict=True):
        assert a.path.name == b.path.name
        np.testing.assert_allclose(a.viewmat, b.viewmat, atol=1e-9)
        np.testing.assert_allclose(a.K, b.K, atol=1e-9)


def test_depth_of_the_room_is_where_its_walls_are(room):
    view = read_colmap(room).views[2]
    depth = view.depth()
    u, v = np.meshgrid(np.arange(24) + 0.5, np.arange(20) + 0.5)
    local = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(view.K).T * depth[..., None]
    world = (local - view.viewmat[:3, 3]) @ view.viewmat[:3, :3]
    assert (depth > 0).all()
    assert (np.abs(world[..., :2]) <= 2 + 1e-5).all()
    assert ((world[..., 2] > -1e-5) & (world[..., 2] < 2.4 + 1e-5)).all()
    walls = np.stack([2 - np.abs(world[..., 0]), 2 - np.abs(world[..., 1]), world[..., 2], 2.4 - world[..., 2]])
    assert (walls.min(0) < 1e-5).mean() > 0.4  # most of the picture is wall or floor


def test_the_scan_lies_on_surfaces_up_to_its_noise(room, tmp_path):
    exact = make_room(tmp_path / "exact", **SMALL, noise=0.0)
    points, _ = read_cloud(room / "lidar.ply")
    truth, _ = read_cloud(exact / "lidar.ply")
    off = np.linalg.norm(points - truth, axis=1)
    assert len(points) == 4000
    assert off.std() > 0
    assert np.sqrt((off**2).mean()) == pytest.approx(0.01, rel=0.1)


def test_a_projected_cloud_keeps_the_nearest_and_drops_what_shines_through():
    from evolute.data.scenes.scene import View

    view = View(Path("x"), np.eye(4), np.array([[10.0, 0, 5], [0, 10, 5], [0, 0, 1]]), 10, 10)
    points = np.array([[0.0, 0, 2], [0.0, 0, 1], [0.05, 0, 3], [1.2, 0, 3], [0, 0, -1], [9, 9, 1]])
    depth = project_cloud(points, view)
    assert depth[5, 5] == 1  # the nearer of two in one pixel; the third lies behind, in that pixel too
    assert depth[5, 9] == 3
    assert (depth > 0).sum() == 2
    beside = project_cloud(np.array([[0.0, 0, 1], [0.35, 0, 3]]), view)  # next pixel, three times as far
    assert (beside > 0).sum() == 1


def test_the_data_module_splits_keeps_eight_bits_and_makes_the_room_once(tmp_path):
    data = SceneDataModule(folder=str(tmp_path), views=9, size=(24, 20), lidar_rays=4000)
    data.prepare_data()
    made = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    data.setup()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == made
    train, test = list(data.train_dataloader()), list(data.val_dataloader())
    assert [int(b["index"]) for b in test] == [0, 8]
    assert sorted(int(b["index"]) for b in train) == list(range(1, 8))
    batch = train[0]
    assert batch["image"].shape == (1, 20, 24, 3)
    assert batch["image"].dtype == torch.uint8
    known = batch["depth"] > 0
    assert 0.2 < known.float().mean() <= 1
    assert ((batch["depth"] - batch["true_depth"])[known].abs().median()) < 0.03


BROKEN = {
    "a listed image is missing": ("images/0003.png", None, r"0003\.png is listed in .*images\.txt and missing"),
    "an image is not listed": ("images/new.png", b"x", r"new\.png lies in .* and is not listed in"),
    "a camera without focal length": ("sparse/0/cameras.txt", b"1 PINHOLE 24 20 0 15 12 10\n", "degenerate intrinsics"),
    "a distorted camera": ("sparse/0/cameras.txt", b"1 OPENCV 24 20 15 15 12 10 0 0 0 0\n", "undistort"),
    "a line that is no camera": ("sparse/0/cameras.txt", b"1 PINHOLE wide\n", r"cameras\.txt, line 1"),
    "a pose that is not finite": (
        "sparse/0/images.txt", b"1 nan 0 0 0 0 0 0 1 0000.png\n\n", r"images\.txt: 0000\.png: the pose is not finite"),
    "a camera that is not there": (
        "sparse/0/images.txt", b"1 1 0 0 0 0 0 0 77 0000.png\n\n", r"camera 77, which the cameras file does not list"),
    "no images at all": ("sparse/0/images.txt", b"# nothing\n", "lists no image"),
    "a point that is no point": ("sparse/0/points3D.txt", b"1 2 x\n", r"points3D\.txt, line 1"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_colmap_project_that_cannot_be_is_refused_by_file(what, copy):
    file, content, message = BROKEN[what]
    path = copy / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    if "camera" not in file and "points" not in file and "images.txt" in file:
        for extra in (copy / "images").glob("*.png"):
            if extra.name != "0000.png":
                extra.unlink()
    with pytest.raises(ValueError, match=message):
        read_colmap(copy)


def test_a_cut_binary_model_is_refused(copy):
    write_colmap(read_colmap(copy), copy, "bin")
    path = copy / "sparse" / "0" / "images.bin"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="cannot be read"):
        read_colmap(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": []}, "has no frames"),
        ({"fl_x": 0.0}, "degenerate intrinsics"),
        ({"file_path": "images/none.png"}, r"none\.png: no such image"),
        ({"transform_matrix": [[float("nan")] * 4] * 4}, "the pose is not finite"),
        ({"transform_matrix": [[2.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]]}, "not orthonormal"),
        ({"depth_file_path": "depth/none.npy"}, r"none\.npy: no such depth"),
        ({"k1": 0.1}, "undistort"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_a_transforms_file_that_cannot_be_is_refused(copy, change, message):
    path = copy / "transforms.json"
    content = json.loads(path.read_text())
    if "frames" in change:
        content |= change
    else:
        content["frames"][0] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_transforms(copy)


def test_depth_of_another_size_and_images_of_another_size_name_their_file(copy):
    np.save(copy / "depth" / "0001.npy", np.ones((3, 4), np.float32))
    with pytest.raises(ValueError, match=r"0001\.npy: depth of shape \(3, 4\)"):
        read_colmap(copy).views[1].depth()
    shutil.copy(copy / "images" / "0000.png", copy / "images" / "0001.png")
    (copy / "sparse" / "0" / "cameras.txt").write_text(
        "".join(f"{i} PINHOLE 50 20 15 15 12 10\n" for i in range(1, 10))
    )
    with pytest.raises(ValueError, match=r"0000\.png: is 24 x 20 pixels, its camera says 50 x 20"):
        read_colmap(copy).views[0].image()


@pytest.mark.parametrize("count", [0, 1])
def test_an_empty_or_single_point_cloud_is_refused(tmp_path, count):
    path = write_cloud(tmp_path / "c.ply", np.zeros((count, 3)), np.zeros((count, 3)))
    with pytest.raises(ValueError, match=rf"c\.ply: holds {count} point"):
        read_cloud(path)
    write_cloud(path, np.array([[0, 0, np.nan], [1, 1, 1]]), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="1 of 2 points are not finite"):
        read_cloud(path)
    path.write_text("ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nend_header\n1\n")
    with pytest.raises(ValueError, match="lack the properties y, z"):
        read_cloud(path)


@pytest.mark.parametrize(
    "bad", [{"test_every": 1}, {"views": 1}, {"depth_from": "sonar"}, {"format": "las"}, {"lidar_noise": -1.0}]
)
def test_arguments_out_of_range_are_refused_with_their_value(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
        SceneDataModule(**bad)

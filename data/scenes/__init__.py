"""Posed images, with depth and a point cloud where there are any: readers, writers, and a room made to order."""

from evolute.data.scenes.colmap import read_colmap, write_colmap
from evolute.data.scenes.datamodule import SceneDataModule
from evolute.data.scenes.lidar import project_cloud, read_cloud, write_cloud
from evolute.data.scenes.room import make_room
from evolute.data.scenes.scene import Scene, View
from evolute.data.scenes.transforms import read_transforms, write_transforms

__all__ = [
    "Scene",
    "SceneDataModule",
    "View",
    "make_room",
    "project_cloud",
    "read_cloud",
    "read_colmap",
    "read_transforms",
    "write_cloud",
    "write_colmap",
    "write_transforms",
]

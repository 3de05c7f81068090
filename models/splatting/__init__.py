"""Gaussian scenes and their rasterizers."""

from evolute.models.splatting.gaussian_scene import NAMES, GaussianScene
from evolute.models.splatting.harmonics import harmonics
from evolute.models.splatting.ply import read_ply, write_ply
from evolute.models.splatting.projection import project, rotations
from evolute.models.splatting.rasterizer import Rendered, render
from evolute.models.splatting.scene import Camera, Gaussians
from evolute.models.splatting.tiles import tile_lists

__all__ = [
    "NAMES",
    "Camera",
    "GaussianScene",
    "Gaussians",
    "Rendered",
    "harmonics",
    "project",
    "read_ply",
    "render",
    "rotations",
    "tile_lists",
    "write_ply",
]

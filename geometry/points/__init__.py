"""Shape and texture of point clouds, and how to spend a budget of primitives on them."""

from evolute.geometry.points.allocation import allocation_probabilities, draw
from evolute.geometry.points.depth import depth_confidence, plane_depth
from evolute.geometry.points.neighbourhoods import (
    Neighbourhoods,
    neighbourhoods,
    subset_neighbourhoods,
    surface_variation,
    texture_variation,
)
from evolute.geometry.points.relocation import relocated
from evolute.geometry.points.splitting import admit, split_threshold

__all__ = [
    "Neighbourhoods",
    "admit",
    "allocation_probabilities",
    "depth_confidence",
    "draw",
    "neighbourhoods",
    "plane_depth",
    "relocated",
    "split_threshold",
    "subset_neighbourhoods",
    "surface_variation",
    "texture_variation",
]

"""Shape and texture of point clouds, and how to spend a budget of primitives on them."""

from evolute.geometry.points.allocation import allocation_probabilities, draw
from evolute.geometry.points.depth import depth_confidence, plane_depth
from evolute.geometry.points.neighbourhoods import (
    Neighbourhoods,
    neighbourhoods,
    subset_variation,
    surface_variation,
    texture_variation,
)

__all__ = [
    "Neighbourhoods",
    "allocation_probabilities",
    "depth_confidence",
    "draw",
    "neighbourhoods",
    "plane_depth",
    "subset_variation",
    "surface_variation",
    "texture_variation",
]

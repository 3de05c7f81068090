"""3D Gaussian splatting recipes."""

from evolute.recipes.splatting.gaussian_splat import GaussianSplat

__all__ = ["GaussianSplat"]

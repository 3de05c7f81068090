"""Recommender recipes."""

from evolute.recipes.recommender.recommend import Recommend

__all__ = ["Recommend"]

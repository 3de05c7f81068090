"""Measure the local geometry of a training run, and act on it, from inside any Lightning Trainer.

Importing this package is light; its rooms (``evolute.geometry``, ``evolute.callbacks``, ...) import what they need.
"""

__version__ = "0.1.0.dev0"

"""Norms of layers: linear minimisation oracles, dual norms, noise measured in them."""

"""Plain modules: encoders, scenes, policy losses."""

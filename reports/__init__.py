"""Figures, and the one self-contained HTML page they end up on."""

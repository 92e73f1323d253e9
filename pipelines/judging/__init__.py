"""Figures of a run: the features that images are compared in, sample quality, likelihood bounds, trade-offs."""

"""Experiments: grids of settings and seeds, one folder a cell, resumable, tracked, reported and replayable."""

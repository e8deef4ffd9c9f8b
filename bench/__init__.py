"""Measurements; each writes its raw rows to `results/`."""

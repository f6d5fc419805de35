"""Measurements and long checks, one a file: `python -m experiments.NAME`."""

"""Attacks a cluster of real processes: `python -m benchmarks.attack`."""

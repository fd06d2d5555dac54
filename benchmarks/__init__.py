"""Benchmarks of speed, as ratios of alternating timings in one run: ``make bench``."""

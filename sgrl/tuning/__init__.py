"""Sweeps on Ray Tune: experiment files, trials, clusters, progress and tracking."""

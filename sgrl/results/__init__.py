"""Results of sweeps: folders, metrics, checkpoints, storage and provenance."""

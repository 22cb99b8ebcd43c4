"""What a run writes: run directory, checkpoints, metrics, console. Takes values, knows no run."""

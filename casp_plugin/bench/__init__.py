"""Size, speed and memory of a checkpoint, beside others in the same run."""

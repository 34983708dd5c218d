"""Checkpoints on disk: writing, loading, checking and folding."""

"""Checkpoints: written, named, read back, checked, folded."""

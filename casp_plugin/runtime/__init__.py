"""Serving of our checkpoints by vLLM. Needs torch and compressed-tensors beside vLLM."""

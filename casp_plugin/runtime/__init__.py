"""Serving: what lets vLLM run the checkpoints. Needs torch and compressed-tensors beside vLLM."""

"""Pure functions on tensors and numbers, tested against a slow reference in float64."""

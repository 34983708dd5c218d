"""Pure functions on tensors and numbers, each tested against a slow reference in float64."""

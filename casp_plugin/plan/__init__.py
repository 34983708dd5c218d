"""The plan: ranks and widths chosen for a model, as data and as tables."""

"""The plan: what was decided for a model, as data, and as tables for people."""

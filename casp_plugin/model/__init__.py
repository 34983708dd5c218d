"""A model: its files, its linear layers, their locations, units, transforms and schemes."""

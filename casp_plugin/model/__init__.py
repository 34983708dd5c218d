"""A model as this package sees it: its files, its layers, their places, names and schemes."""

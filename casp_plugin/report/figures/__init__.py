"""Figures of plans and of results."""

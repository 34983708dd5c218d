"""Prices of every width and rank on offer for a layer, in bytes and in error."""

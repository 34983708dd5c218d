"""Codecs of the codebook quantizers: how blocks of weights become bits, and come back."""

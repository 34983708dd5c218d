"""Turn bytes stored into average bits and average bits into a budget of bytes."""

__all__ = ["average_bits", "bits_of", "bytes_of", "bytes_within"]


def bits_of(stored_bytes: float) -> float:
    """Return the bits of a number of bytes."""
    return stored_bytes * 8


def bytes_of(bits: float) -> float:
    """Return the bytes of a number of bits, fractions included."""
    return bits / 8


def average_bits(stored_bytes: float, weights: int) -> float:
    """Return bits stored for each original weight.

    :param stored_bytes: codes, scales, zero points, shapes and factors
    :param weights: weights of the original matrices, before any factoring
    """
    return bits_of(stored_bytes) / weights


def bytes_within(average_bits: float, weights: int) -> int:
    """Return the bytes that ``weights`` original weights may take at ``average_bits``.

    A fraction of a byte is dropped.
    """
    return int(bytes_of(average_bits * weights))

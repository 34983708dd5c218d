"""Turn bytes stored into average bits and average bits into a budget of bytes."""

__all__ = ["average_bits", "budget_bytes"]


def average_bits(stored_bytes: float, weights: int) -> float:
    """Return bits stored for each original weight.

    :param stored_bytes: codes, scales, zero points, sign vectors, codebooks and factors
    :param weights: weights of the original matrices, before any factoring
    """
    return stored_bytes * 8 / weights


def budget_bytes(budget_bits: float, weights: int) -> int:
    """Return bytes that ``weights`` original weights may take at ``budget_bits`` average bits.

    A fraction of a byte is dropped.
    """
    return int(budget_bits * weights / 8)

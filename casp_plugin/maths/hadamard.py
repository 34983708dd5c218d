"""Products with orthogonal Hadamard matrices, in blocks.

They spread outliers of weights and inputs over the channels of a block (QuIP#, arXiv 2402.04396,
section 3; QuaRot, arXiv 2404.00456).
"""

import torch
from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix

__all__ = ["hadamard", "largest_block", "rotate", "rotate_moment"]


def largest_block(size: int, most: int) -> int:
    """Return the largest power of two that divides a size and is not larger than ``most``."""
    return min(size & -size, 1 << (most.bit_length() - 1))


def hadamard(block: int, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """Return Sylvester's Hadamard matrix, shape (block, block), scaled by a power of two.

    16 bits hold its entries exactly. It is orthogonal for blocks of 4^n, and too large by the
    square root of two for other powers of two.

    :param block: a power of two
    """
    return deterministic_hadamard_matrix(block, dtype, device) * 2.0 ** -(_log2(block) // 2)


def rotate(values: torch.Tensor, block: int, matrix: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply the last dimension by the orthogonal Hadamard matrix, block by block.

    The matrix is symmetric and its own inverse: inputs and rows of weights are rotated alike.

    :param values: shape (..., columns)
    :param block: a power of two that divides the columns; 1 changes nothing
    :param matrix: result of :func:`hadamard`, if known; None to make it
    """
    if block == 1:
        return values
    if matrix is None:
        matrix = hadamard(block, values.dtype, values.device)
    rotated = (values.unflatten(-1, (-1, block)) @ matrix).flatten(-2)
    return rotated * 0.5**0.5 if _log2(block) % 2 else rotated


def _log2(power: int) -> int:
    return power.bit_length() - 1


def rotate_moment(moment: torch.Tensor, block: int) -> torch.Tensor:
    """Return E[x x^T] of the rotated input, given E[x x^T] of the input.

    :param moment: shape (columns, columns)
    :param block: as in :func:`rotate`
    """
    return rotate(rotate(moment, block).T, block)

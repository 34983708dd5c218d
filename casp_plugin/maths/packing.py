"""Codes in dense bit streams, as compressed-tensors stores them in int32 words.

compressed-tensors 0.17, which vLLM pins, packs 3, 5, 6 and 7 bits in another way than 0.19,
which writes the checkpoints, so the runtime reads the stream itself.
"""

import torch

__all__ = ["dequantize", "narrow_packed", "pack", "unpack"]


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the codes of a little-endian bit stream along the last dimension.

    :param packed: int32, shape ``(..., ceil(count * bits / 32))``
    :param bits: width of a code, 1 to 8
    :param count: number of codes in the last dimension
    :return: uint8, shape ``(..., count)``
    """
    flat = packed.contiguous().flatten()  # a view as bytes asks for stride 1
    bytes_ = flat.view(torch.uint8).unflatten(0, (*packed.shape[:-1], -1))  # (..., bytes)
    stream = (bytes_[..., None] >> _shifts(8, packed)) & 1  # (..., bytes, 8)
    stream = stream.flatten(-2)[..., : count * bits]  # (..., count * bits)
    stream = stream.unflatten(-1, (count, bits))  # (..., count, bits)
    return (stream << _shifts(bits, packed)).sum(-1, dtype=torch.uint8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes as a bit stream, the inverse of :func:`unpack`; zeros fill the last word.

    :param codes: uint8, shape ``(..., count)``
    :param bits: width of a code, 1 to 8
    :return: int32, shape ``(..., ceil(count * bits / 32))``
    """
    stream = ((codes[..., None] >> _shifts(bits, codes)) & 1).flatten(-2)  # (..., count * bits)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 32))  # whole words
    octets = stream.unflatten(-1, (-1, 8)) << _shifts(8, codes)  # (..., bytes, 8)
    return octets.sum(-1, dtype=torch.uint8).view(torch.int32)


def narrow_packed(
    packed: torch.Tensor, bits: int, start: int, length: int, total: int
) -> torch.Tensor:
    """Return some rows of codes that are packed along the rows, as zero points are.

    Rows of one rank need not begin at a word, so the stream is unpacked and packed again.

    :param packed: int32, shape ``(ceil(total * bits / 32), groups)``
    :param bits: width of a code, 1 to 8
    :param start: first row to return
    :param length: number of rows to return
    :param total: number of rows in ``packed``
    :return: int32, shape ``(ceil(length * bits / 32), groups)``
    """
    codes = unpack(packed.t(), bits, total).narrow(-1, start, length)  # (groups, length)
    return pack(codes, bits).t()


def dequantize(
    codes: torch.Tensor, offsets: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return ``(code - offset) * scale``, with an offset and a scale for every row and group of
    columns.

    :param codes: uint8, shape ``(rows, columns)``
    :param offsets: codes that stand for 0: zero points, or half the range; shape
        ``(rows, groups)``
    :param scales: shape ``(rows, groups)``
    :param dtype: dtype of the weight
    :return: weight, shape ``(rows, columns)``
    """
    # (rows, groups, columns of a group)
    levels = codes.unflatten(1, (scales.shape[1], -1)).to(dtype) - offsets.to(dtype)[..., None]
    return (levels * scales.to(dtype)[..., None]).flatten(1)


def _shifts(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(count, dtype=torch.uint8, device=like.device)

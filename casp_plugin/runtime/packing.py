"""Codes in dense bit streams: how compressed-tensors stores them in int32 words.

compressed-tensors 0.17, which vLLM pins, packs 3, 5, 6 and 7 bits in another way than 0.19,
which writes the checkpoints; so the runtime reads the stream itself.
"""

import torch

__all__ = ["dequantize", "narrow_packed", "pack", "unpack"]


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Codes of a little-endian bit stream along the last dimension.

    :param packed: int32, shape ``(..., ceil(count * bits / 32))``
    :param bits: width of a code, 1 to 8
    :param count: number of codes in the last dimension
    :return: uint8, shape ``(..., count)``
    """
    flat = packed.contiguous().flatten()  # a view as bytes asks for stride 1
    bytes_ = flat.view(torch.uint8).unflatten(0, (*packed.shape[:-1], -1))
    stream = (bytes_[..., None] >> _steps(8, packed)) & 1
    stream = stream.flatten(-2)[..., : count * bits]
    stream = stream.unflatten(-1, (count, bits))
    return (stream << _steps(bits, packed)).sum(-1, dtype=torch.uint8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of :func:`unpack`; the last word is filled with zeros.

    :param codes: uint8, shape ``(..., count)``
    :param bits: width of a code, 1 to 8
    :return: int32, shape ``(..., ceil(count * bits / 32))``
    """
    stream = ((codes[..., None] >> _steps(bits, codes)) & 1).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 32))
    bytes_ = (stream.unflatten(-1, (-1, 8)) << _steps(8, codes)).sum(-1, dtype=torch.uint8)
    return bytes_.view(torch.int32)


def narrow_packed(
    packed: torch.Tensor, bits: int, start: int, length: int, total: int
) -> torch.Tensor:
    """Some rows of codes that are packed along the rows, as zero points are.

    Rows of one rank need not begin at a word, so the stream is taken apart and packed anew.

    :param packed: int32, shape ``(ceil(total * bits / 32), groups)``
    :return: int32, shape ``(ceil(length * bits / 32), groups)``
    """
    codes = unpack(packed.t(), bits, total).narrow(-1, start, length)
    return pack(codes, bits).t()


def dequantize(
    codes: torch.Tensor, offsets: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """``(code - offset) * scale``, with one offset and scale for each row and group of columns.

    :param codes: uint8, shape ``(rows, columns)``
    :param offsets: the codes that stand for 0: zero points, or half the range; shape
        ``(rows, groups)``
    :param scales: shape ``(rows, groups)``
    :return: weight of type ``dtype``, shape ``(rows, columns)``
    """
    levels = codes.unflatten(1, (scales.shape[1], -1)).to(dtype) - offsets.to(dtype)[..., None]
    return (levels * scales.to(dtype)[..., None]).flatten(1)


def _steps(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(count, dtype=torch.uint8, device=like.device)

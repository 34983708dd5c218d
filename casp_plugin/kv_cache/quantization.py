"""Codes of keys and values, tensors of shape (sequences, heads, tokens, channels).

Quantization is asymmetric, as in LVLM-Compress-Bench and KIVI (arXiv 2402.02750). For values a of a
group with least value min and largest value max, at b bits::

    delta = (max - min) / (2^b - 1),   code = round((a - min) / delta),   a' = min + code * delta

min and delta are stored in 16 bits (in 32 bits for float32 values), rounded so that the range still
holds every value: the error is at most delta / 2 for values in the range of float16.

Shapes: S sequences, H heads, T tokens, C channels of a head, G groups, N values of a group.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from casp_plugin.kv_cache.schemes import TensorScheme

__all__ = ["Codes", "Plain", "encode", "joined", "pack", "unpack"]

#: widths of the bit fields that hold a code, lowest bits first
_PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}


@dataclass(frozen=True)
class Codes:
    """Some tokens as codes. The first dimension of every tensor counts sequences.

    :param planes: packed codes, one uint8 tensor of shape (S, bytes) for every bit field
    :param low: min of the groups, (S, G)
    :param delta: delta of the groups, (S, G)
    :param outliers: exact values and their positions in the groups, both of shape
        (S, G, outliers of a group); None without outliers
    :param shape: (H, T, C)
    :param scheme: the scheme of the codes
    """

    planes: tuple[torch.Tensor, ...]
    low: torch.Tensor
    delta: torch.Tensor
    outliers: tuple[torch.Tensor, torch.Tensor] | None
    shape: tuple[int, int, int]
    scheme: TensorScheme

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Return all stored tensors."""
        return [*self.planes, self.low, self.delta, *(self.outliers or ())]

    @property
    def tokens(self) -> int:
        """Return the number of tokens."""
        return self.shape[1]

    def of(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Codes":
        """Return the same codes with a change of every tensor, such as a new order of beams.

        :param change: function of a tensor, along its first dimension
        """
        outliers = None if self.outliers is None else tuple(map(change, self.outliers))
        planes = tuple(map(change, self.planes))
        stored = (planes, change(self.low), change(self.delta), outliers)
        return Codes(*stored, self.shape, self.scheme)

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the values, (S, H, T, C)."""
        count = self.shape[0] * self.shape[1] * self.shape[2]
        codes = unpack(self.planes, self.scheme.bits, count)  # (S, G * N)
        groups = codes.unflatten(1, (self.low.shape[1], -1)).float()  # (S, G, N)
        groups = groups.mul_(self.delta.float()[..., None]).add_(self.low.float()[..., None])
        if self.outliers is not None:
            values, places = self.outliers
            groups.scatter_(2, places.long(), values.float())
        return _ungrouped(groups.to(dtype), self.shape, self.scheme)


@dataclass(frozen=True)
class Plain:
    """Some tokens as they are.

    :param values: (S, H, T, C)
    """

    values: torch.Tensor

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Return all stored tensors."""
        return [self.values]

    @property
    def tokens(self) -> int:
        """Return the number of tokens."""
        return self.values.shape[2]

    def of(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Plain":
        """Return the same tokens with a change of their tensor; see ``Codes.of``."""
        return Plain(change(self.values))

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the values, (S, H, T, C)."""
        return self.values.to(dtype)


def encode(values: torch.Tensor, scheme: TensorScheme) -> Codes | Plain:
    """Return some tokens as a scheme stores them.

    :param values: (S, H, T, C); groups of tokens divide T
    :param scheme: the scheme
    :raises ValueError: if groups of channels do not divide a head
    """
    if scheme.bits == 16:
        return Plain(values.clone())
    groups = _grouped(values, scheme).float()  # (S, G, N)
    outliers = None
    kept = groups
    if scheme.outliers:
        count = max(1, round(scheme.outliers * groups.shape[2]))
        places = groups.abs().topk(count).indices  # (S, G, outliers of a group)
        outliers = groups.gather(2, places).to(values.dtype), places.int()
        # outliers do not widen the range, and take codes within that of the rest
        kept = groups.scatter(2, places, torch.nan)
    low, high = _min_max(kept)  # (S, G)
    levels = 2**scheme.bits - 1
    stored = torch.float32 if values.dtype == torch.float32 else torch.float16
    low = _rounded_down(low, stored)
    delta = _rounded_up((high - low.float()) / levels, stored)
    step = torch.where(delta > 0, delta, 1).float()[..., None]  # (S, G, 1)
    codes = ((groups - low.float()[..., None]) / step).round_().clamp_(0, levels)
    planes = pack(codes.to(torch.uint8).flatten(1), scheme.bits)
    return Codes(planes, low, delta, outliers, tuple(values.shape[1:]), scheme)


def joined(pieces: Sequence[Codes] | Sequence[Plain]) -> Codes | Plain | None:
    """Return pieces with equal numbers of tokens, in their order, as one piece; None where they
    cannot be joined, because scales are of a whole piece or codes end inside a byte."""
    first = pieces[0]
    if isinstance(first, Plain):
        return Plain(torch.cat([piece.values for piece in pieces], dim=2))
    heads, tokens, channels = first.shape
    count = heads * tokens * channels  # codes of a sequence
    whole = first.scheme.axis != "token" and first.scheme.group is None
    inside = any(count * width % 8 for width in _PLANES[first.scheme.bits])
    if whole or inside or any(piece.scheme != first.scheme for piece in pieces):
        return None

    def together(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(tensors), dim=1)

    outliers = None
    if first.outliers is not None:
        outliers = tuple(map(together, zip(*(piece.outliers for piece in pieces), strict=True)))
    return Codes(
        tuple(map(together, zip(*(piece.planes for piece in pieces), strict=True))),
        together(piece.low for piece in pieces),
        together(piece.delta for piece in pieces),
        outliers,
        (heads, tokens * len(pieces), channels),
        first.scheme,
    )


def pack(codes: torch.Tensor, bits: int) -> tuple[torch.Tensor, ...]:
    """Return codes packed into bytes, one tensor for every bit field of a code.

    Three bits are stored as two and one, so that bytes hold whole fields, which a shift and a mask
    read: on a CPU twenty times as fast as compressed-tensors' dense words.

    :param codes: uint8, (rows, codes)
    :param bits: width of a code: 2, 3, 4 or 8
    :return: uint8, (rows, ceil(codes * width / 8)) for every width of a field
    """
    planes = []
    for width in _PLANES[bits]:
        fields, codes = codes & (2**width - 1), codes >> width if width < 8 else codes
        fields = torch.nn.functional.pad(fields, (0, -fields.shape[1] % (8 // width)))
        # (rows, bytes, fields of a byte)
        fields = fields.unflatten(1, (-1, 8 // width)) << _field_shifts(width, fields)
        planes.append(fields.sum(-1, dtype=torch.uint8))
    return tuple(planes)


def unpack(planes: tuple[torch.Tensor, ...], bits: int, count: int) -> torch.Tensor:
    """Return the codes of packed bytes, the inverse of :func:`pack`.

    :param planes: uint8, as ``pack`` returns them
    :param bits: width of a code: 2, 3, 4 or 8
    :param count: number of codes in a row
    :return: uint8, (rows, count)
    """
    codes, below = 0, 0
    for width, plane in zip(_PLANES[bits], planes, strict=True):
        # (rows, bytes, fields of a byte)
        fields = (plane[..., None] >> _field_shifts(width, plane)) & (2**width - 1)
        codes = codes + (fields.flatten(1)[:, :count] << below)
        below += width
    return codes


def _field_shifts(width: int, like: torch.Tensor) -> torch.Tensor:
    """Return the positions of the fields of a byte, (fields of a byte,)."""
    return torch.arange(0, 8, width, dtype=torch.uint8, device=like.device)


def _grouped(values: torch.Tensor, scheme: TensorScheme) -> torch.Tensor:
    """Return values (S, H, T, C) in groups, (S, G, N); groups of later tokens come later."""
    tokens, channels = values.shape[2:]
    if scheme.axis == "token":
        scheme.check_channels(channels)
        size = min(scheme.group or channels, channels)
        return values.transpose(1, 2).reshape(len(values), -1, size)
    blocks = values.unflatten(2, (-1, scheme.group or tokens))  # (S, H, blocks, T of a block, C)
    if scheme.axis == "channel":
        return blocks.permute(0, 2, 1, 4, 3).flatten(1, 3)
    return blocks.transpose(1, 2).flatten(2).contiguous()


def _ungrouped(groups: torch.Tensor, shape: tuple, scheme: TensorScheme) -> torch.Tensor:
    """Return groups (S, G, N) as values (S, H, T, C), the inverse of :func:`_grouped`."""
    heads, tokens, channels = shape
    if scheme.axis == "token":
        return groups.reshape(len(groups), tokens, heads, channels).transpose(1, 2)
    size = scheme.group or tokens
    if scheme.axis == "channel":
        blocks = groups.view(len(groups), tokens // size, heads, channels, size)
        blocks = blocks.permute(0, 2, 1, 4, 3)
    else:
        blocks = groups.view(len(groups), tokens // size, heads, size, channels).transpose(1, 2)
    # blocks: (S, H, blocks, T of a block, C)
    return blocks.reshape(len(groups), heads, tokens, channels)


def _min_max(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least and the largest value of every group, (S, G), without NaN; 0 where a group
    holds nothing else."""
    missing = groups.isnan()
    low = groups.masked_fill(missing, torch.inf).amin(-1)
    high = groups.masked_fill(missing, -torch.inf).amax(-1)
    empty = low > high
    return low.masked_fill(empty, 0), high.masked_fill(empty, 0)


def _rounded_down(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the values in a narrower dtype, rounded down, and cut to its range."""
    if dtype == values.dtype:
        return values
    finest = torch.finfo(dtype)
    below = values - values.abs() * finest.eps - finest.smallest_normal * finest.eps
    return below.clamp(-finest.max, finest.max).to(dtype)


def _rounded_up(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the values in a narrower dtype, rounded up, and cut to its range."""
    return -_rounded_down(-values, dtype)

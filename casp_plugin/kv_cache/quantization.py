"""Codes of keys and values, tensors of shape (sequences, heads, tokens, channels): pure functions.

Asymmetric, as LVLM-Compress-Bench and KIVI (arXiv 2402.02750) define it: in a group of values a
between min and max, at b bits::

    delta = (max - min) / (2^b - 1),   code = round((a - min) / delta),   a' = min + code * delta

min and delta are stored in 16 bits, rounded so that the range still holds every value: the error
stays within delta / 2, of values within those of float16.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from casp_plugin.kv_cache.schemes import TensorScheme

__all__ = ["Codes", "Plain", "encode", "joined", "pack", "unpack"]

#: fields of a byte that hold the bits of a code: its lowest ones first
_PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}


@dataclass(frozen=True)
class Codes:
    """Some tokens as codes. The first dimension of every tensor is that of sequences.

    :param planes: packed codes, uint8, shape (sequences, bytes) of each
    :param low: min, shape (sequences, groups)
    :param delta: shape (sequences, groups)
    :param outliers: values that are stored beside, and where in their group; shape
        (sequences, groups, outliers of a group) of each
    :param shape: (heads, tokens, channels)
    :param scheme: how they are stored
    """

    planes: tuple[torch.Tensor, ...]
    low: torch.Tensor
    delta: torch.Tensor
    outliers: tuple[torch.Tensor, torch.Tensor] | None
    shape: tuple[int, int, int]
    scheme: TensorScheme

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that is stored."""
        return [*self.planes, self.low, self.delta, *(self.outliers or ())]

    @property
    def tokens(self) -> int:
        return self.shape[1]

    def of(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Codes":
        """The same with every tensor changed, as for beams that are reordered.

        :param change: of a tensor, along its first dimension
        """
        outliers = None if self.outliers is None else tuple(map(change, self.outliers))
        planes = tuple(map(change, self.planes))
        stored = (planes, change(self.low), change(self.delta), outliers)
        return Codes(*stored, self.shape, self.scheme)

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """The values, shape (sequences, heads, tokens, channels)."""
        count = self.shape[0] * self.shape[1] * self.shape[2]
        codes = unpack(self.planes, self.scheme.bits, count)
        groups = codes.unflatten(1, (self.low.shape[1], -1)).float()
        groups = groups.mul_(self.delta.float()[..., None]).add_(self.low.float()[..., None])
        if self.outliers is not None:
            values, places = self.outliers
            groups.scatter_(2, places.long(), values.float())
        return _ungrouped(groups.to(dtype), self.shape, self.scheme)


@dataclass(frozen=True)
class Plain:
    """Some tokens as they are.

    :param values: shape (sequences, heads, tokens, channels)
    """

    values: torch.Tensor

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that is stored."""
        return [self.values]

    @property
    def tokens(self) -> int:
        return self.values.shape[2]

    def of(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Plain":
        """The same with the tensor changed."""
        return Plain(change(self.values))

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """The values."""
        return self.values.to(dtype)


def encode(values: torch.Tensor, scheme: TensorScheme) -> Codes | Plain:
    """Some tokens as a scheme stores them.

    :param values: shape (sequences, heads, tokens, channels); groups of tokens divide the tokens
    :param scheme: how
    :raises ValueError: if groups of channels do not divide a head
    """
    if scheme.bits == 16:
        return Plain(values.clone())
    groups = _grouped(values, scheme).float()
    outliers = None
    kept = groups
    if scheme.outliers:
        places = groups.abs().topk(max(1, round(scheme.outliers * groups.shape[2]))).indices
        outliers = groups.gather(2, places).to(values.dtype), places.int()
        # what is stored beside must not widen the range: it takes that of the rest
        kept = groups.scatter(2, places, torch.nan)
    low, high = _range(kept)
    levels = 2**scheme.bits - 1
    half = torch.float32 if values.dtype == torch.float32 else torch.float16
    low = _rounded_down(low, half)
    delta = _rounded_up((high - low.float()) / levels, half)
    step = torch.where(delta > 0, delta, 1).float()[..., None]
    codes = ((groups - low.float()[..., None]) / step).round_().clamp_(0, levels)
    planes = pack(codes.to(torch.uint8).flatten(1), scheme.bits)
    return Codes(planes, low, delta, outliers, tuple(values.shape[1:]), scheme)


def joined(pieces: Sequence[Codes] | Sequence[Plain]) -> Codes | Plain | None:
    """Pieces of as many tokens each, that follow one another, as one.

    None where they do not go together: scales of a whole piece, or codes that end inside a byte.
    """
    first = pieces[0]
    if isinstance(first, Plain):
        return Plain(torch.cat([each.values for each in pieces], dim=2))
    heads, tokens, channels = first.shape
    count = heads * tokens * channels
    whole = first.scheme.axis != "token" and first.scheme.group is None
    inside = any(count * width % 8 for width in _PLANES[first.scheme.bits])
    if whole or inside or any(each.scheme != first.scheme for each in pieces):
        return None

    def together(parts: Iterable[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(parts), dim=1)

    outliers = None
    if first.outliers is not None:
        outliers = tuple(map(together, zip(*(each.outliers for each in pieces), strict=True)))
    return Codes(
        tuple(map(together, zip(*(each.planes for each in pieces), strict=True))),
        together(each.low for each in pieces),
        together(each.delta for each in pieces),
        outliers,
        (heads, tokens * len(pieces), channels),
        first.scheme,
    )


def pack(codes: torch.Tensor, bits: int) -> tuple[torch.Tensor, ...]:
    """Codes in as many bits as they have.

    Three bits are stored as two and one, so that a byte holds whole fields: a shift and a mask read
    them, twenty times as fast on a CPU as compressed-tensors' dense words.

    :param codes: uint8, shape (rows, codes)
    :param bits: 2, 3, 4 or 8
    :return: uint8, shape (rows, codes * width / 8) for each width
    """
    planes = []
    for width in _PLANES[bits]:
        fields, codes = codes & (2**width - 1), codes >> width if width < 8 else codes
        fields = torch.nn.functional.pad(fields, (0, -fields.shape[1] % (8 // width)))
        fields = fields.unflatten(1, (-1, 8 // width)) << _shifts(width, fields)
        planes.append(fields.sum(-1, dtype=torch.uint8))
    return tuple(planes)


def unpack(planes: tuple[torch.Tensor, ...], bits: int, count: int) -> torch.Tensor:
    """The inverse of :func:`pack`.

    :param count: codes of a row
    :return: uint8, shape (rows, codes)
    """
    codes, below = 0, 0
    for width, plane in zip(_PLANES[bits], planes, strict=True):
        fields = (plane[..., None] >> _shifts(width, plane)) & (2**width - 1)
        codes = codes + (fields.flatten(1)[:, :count] << below)
        below += width
    return codes


def _shifts(width: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(0, 8, width, dtype=torch.uint8, device=like.device)


def _grouped(values: torch.Tensor, scheme: TensorScheme) -> torch.Tensor:
    """Values as (sequences, groups, values of a group); groups of later tokens come later."""
    tokens, channels = values.shape[2:]
    if scheme.axis == "token":
        scheme.check_channels(channels)
        size = min(scheme.group or channels, channels)
        return values.transpose(1, 2).reshape(len(values), -1, size)
    # tokens of a group last: (sequences, heads, groups, tokens, channels)
    parts = values.unflatten(2, (-1, scheme.group or tokens))
    if scheme.axis == "channel":
        return parts.permute(0, 2, 1, 4, 3).flatten(1, 3)
    return parts.transpose(1, 2).flatten(2).contiguous()


def _ungrouped(groups: torch.Tensor, shape: tuple, scheme: TensorScheme) -> torch.Tensor:
    """The inverse of :func:`_grouped`."""
    heads, tokens, channels = shape
    if scheme.axis == "token":
        return groups.reshape(len(groups), tokens, heads, channels).transpose(1, 2)
    size = scheme.group or tokens
    if scheme.axis == "channel":
        parts = groups.view(len(groups), tokens // size, heads, channels, size)
        parts = parts.permute(0, 2, 1, 4, 3)
    else:
        parts = groups.view(len(groups), tokens // size, heads, size, channels).transpose(1, 2)
    return parts.reshape(len(groups), heads, tokens, channels)


def _range(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and largest of each group, of those that are numbers; 0 where none is."""
    missing = groups.isnan()
    low = groups.masked_fill(missing, torch.inf).amin(-1)
    high = groups.masked_fill(missing, -torch.inf).amax(-1)
    empty = low > high
    return low.masked_fill(empty, 0), high.masked_fill(empty, 0)


def _rounded_down(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """At most the values, in a narrower type; where that cannot hold them, its largest."""
    if dtype == values.dtype:
        return values
    finest = torch.finfo(dtype)
    below = values - values.abs() * finest.eps - finest.smallest_normal * finest.eps
    return below.clamp(-finest.max, finest.max).to(dtype)


def _rounded_up(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return -_rounded_down(-values, dtype)

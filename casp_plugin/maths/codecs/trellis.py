"""Trellis codes: every weight is a function of a window of bits in one circular stream.

A tile of 256 weights is a stream of 256 K bits. Weight i reads the L bits that end at bit
``(i + 1) K``, the first weights also those at the end of the stream (tail-biting); a fixed function
turns this state into a value that is almost Gaussian. So neighbours share L - K bits, there is no
codebook to store, and the encoder picks the best of all paths (QTIP, arXiv 2406.11235). The code
``mul1`` is that of ExLlamaV3; formulas in docs/codebooks.md.

Shapes: T tiles, of 256 weights each; S = 2^L states.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import torch

from casp_plugin.maths.codecs.viterbi import encode_tiles

__all__ = ["TILE", "TrellisCode", "TrellisCodec", "state_values"]

#: weights of a tile
TILE = 256
TrellisCode = Literal["mul1", "3inst"]

_WORD = 32
#: tiles of random numbers that measure the distortion
_PROBES = 64
#: by width from 1 to 8 bits: scale of the values that leaves the least error of Gaussian numbers of
#: variance one, flat within .02 around, found with L = 10 to 14. The values end where Gaussian
#: numbers go on, which the more bits notice the more
_GAINS: dict[TrellisCode, tuple[float, ...]] = {
    "mul1": (0.9, 1.02, 1.08, 1.13, 1.18, 1.23, 1.26, 1.3),
    "3inst": (0.7, 0.84, 0.88, 0.91, 0.96, 1.02, 1.05, 1.06),
}


@dataclass(frozen=True)
class TrellisCodec:
    """A trellis code of some rate, over tiles of some shape.

    :param bits: K, bits of a weight, 1 to 8
    :param state_bits: L, bits of a state, 10 to 16
    :param code: turns states into values
    :param columns: columns of a tile, which has 256 / columns rows
    """

    bits: int
    state_bits: int = 12
    code: TrellisCode = "mul1"
    columns: int = 16

    @property
    def rows(self) -> int:
        """Return the number of rows of a tile."""
        return TILE // self.columns

    @property
    def words(self) -> int:
        """Return the number of int32 words of a tile."""
        return TILE * self.bits // _WORD

    @cached_property
    def values(self) -> torch.Tensor:
        """Return the values of all states, shape (S,), float32."""
        return state_values(self.code, self.state_bits)

    @property
    def gain(self) -> float:
        """Return the scale of values at which numbers of variance one are coded best."""
        return _GAINS[self.code][self.bits - 1]

    @property
    def distortion(self) -> float:
        """Return the mean squared error of coding Gaussian numbers of variance one, at that
        scale."""
        return _distortion(self)

    def encode(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the codes that are nearest to a band of columns, and what they decode to.

        :param target: numbers of variance ``1 / gain^2`` or so, shape (out, columns); out is a
            multiple of the rows of a tile
        :return: codes, int32, shape (out / rows, words), and values, shape (out, columns)
        """
        tiles = target.reshape(-1, TILE)  # row after row: (T, 256)
        symbols, values = encode_tiles(tiles, self.values, self.bits)
        return pack_symbols(symbols, self.bits), values.view_as(target).to(target)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the values of codes.

        :param codes: int32, shape (out / rows, in / columns, words)
        :return: float32, shape (out, in)
        """
        states = window_states(codes, self.bits, self.state_bits)  # (., ., 256)
        values = self.values.to(codes.device)[states].unflatten(-1, (self.rows, self.columns))
        return values.transpose(1, 2).flatten(2).flatten(0, 1)


@cache
def state_values(code: TrellisCode, state_bits: int) -> torch.Tensor:
    """Return the values of all states of a code.

    - ``mul1``: X = 0x83DCD12D x mod 2^32; (sum of the four bytes of X + 1024) * .0067673 - 10.3828
    - ``3inst``: X = 89226354 x + 64248484 mod 2^32; r = (X & 0x8FFF8FFF) ^ 0x3B603B60; the sum, in
      float16, of the two halves of r read as float16

    :param state_bits: L
    :return: shape (2^L,), float32
    """
    x = torch.arange(1 << state_bits, dtype=torch.int64, device="cpu")
    if code == "mul1":
        scrambled = 0x83DCD12D * x & 0xFFFFFFFF
        total = sum(scrambled >> shift & 0xFF for shift in (0, 8, 16, 24))
        return (total + 1024).float() * 0.0067673 - 10.3828
    scrambled = 89226354 * x + 64248484 & 0xFFFFFFFF
    halves = scrambled & 0x8FFF8FFF ^ 0x3B603B60
    high, low = (
        (half - (half >> 15 << 16)).to(torch.int16).view(torch.float16)
        for half in (halves >> 16, halves & 0xFFFF)
    )
    return (high + low).float()


def pack_symbols(symbols: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the streams of tiles, the first bit of a stream in the highest bit of its first word.

    :param symbols: the newest K bits of every state, uint8, shape (..., 256)
    :return: int32, shape (..., 8 K)
    """
    shifts = torch.arange(bits - 1, -1, -1, device=symbols.device)
    stream = (symbols[..., None].int() >> shifts & 1).flatten(-2)  # (..., 256 K)
    words = stream.unflatten(-1, (-1, _WORD)).long()  # (..., 8 K, 32)
    shifts = torch.arange(_WORD - 1, -1, -1, device=symbols.device)
    words = (words << shifts).sum(-1)
    return (words - (words >> 31 << 32)).int()


def window_states(codes: torch.Tensor, bits: int, state_bits: int) -> torch.Tensor:
    """Return the states of all weights, the inverse of :func:`pack_symbols`.

    :param codes: int32, shape (..., 8 K)
    :return: int32, shape (..., 256): the L bits that end at bit ``(i + 1) K`` of the circle
    """
    ends = torch.arange(1, TILE + 1, device=codes.device) * bits
    last = (ends - 1) // _WORD  # the word that holds the last bit of a window
    words = codes.long() & 0xFFFFFFFF
    both = words[..., last - 1] << _WORD | words[..., last]  # word -1 is the last of the circle
    return (both >> (_WORD - 1 - (ends - 1) % _WORD) & (1 << state_bits) - 1).int()


@cache
def _distortion(codec: TrellisCodec) -> float:
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randn(_PROBES, TILE, generator=generator)
    _, values = encode_tiles(tiles / codec.gain, codec.values, codec.bits)
    return (tiles - values * codec.gain).square().mean().item()

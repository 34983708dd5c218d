"""Lattice codes of eight weights: E8P of QuIP#, alone or with a code for what it leaves.

E8P has 2^16 points around D8 + 1/2, the half-integer vectors with an even sum, all moved by +1/4 or
by -1/4: a code holds one of 256 vectors of absolute values, seven signs (the eighth follows from
the sum) and the direction of the move. Its points are almost those of the E8 lattice, the densest
in eight dimensions (QuIP#, arXiv 2402.04396, section 5). 3 and 4 bits code the remainder once more:
by 256 short vectors of E8, or by E8P again (residual vector quantization, section 5.1).

Shapes: N vectors of 8 numbers.
"""

from dataclasses import dataclass
from functools import cache
from itertools import combinations, product

import torch

__all__ = [
    "LatticeCodec",
    "absolute_values",
    "decode_e8p",
    "nearest_e8p",
    "nearest_vector",
    "short_vectors",
]

_SIZE = 8
_SHIFT = 0.25
#: vectors that are compared at once, to limit memory
_CHUNK = 4096
#: numbers by which targets of variance one are multiplied for the first code, and the remainder for
#: the second; they have the least error for Gaussian numbers
_GAIN = {2: (1.03, None), 3: (0.97, 2.05), 4: (0.92, 3.6)}


@dataclass(frozen=True)
class LatticeCodec:
    """Codes of 8 weights, 8 bits for each bit of a weight.

    :param bits: 2, 3 or 4
    """

    bits: int

    columns = _SIZE
    rows = 1
    #: values are those of targets of variance one
    gain = 1.0

    @property
    def gains(self) -> tuple[float, float | None]:
        """Return the numbers that targets, and what the first code leaves, are multiplied by."""
        return _GAIN[self.bits]

    @property
    def distortion(self) -> float:
        """Return the mean squared error of coding Gaussian numbers of variance one."""
        return _distortion(self.bits)

    def encode(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the codes that are nearest to a band of columns, and what they decode to.

        :param target: numbers of variance one or so, shape (N, 8)
        :return: codes, uint8, shape (N, bits), and values, shape (N, 8)
        """
        gain, inner = self.gains
        first = nearest_e8p(target * gain)
        codes = [first & 255, first >> 8]
        values = decode_e8p(first)
        if inner is not None:
            rest = (target * gain - values) * inner
            if self.bits == 3:
                second = nearest_vector(rest, short_vectors().to(rest))
                codes.append(second)
                values = values + short_vectors().to(rest)[second] / inner
            else:
                second = nearest_e8p(rest)
                codes += [second & 255, second >> 8]
                values = values + decode_e8p(second) / inner
        return torch.stack(codes, 1).to(torch.uint8), (values / gain).to(target)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the values of codes.

        :param codes: uint8, shape (out, in / 8, bits)
        :return: float32, shape (out, in)
        """
        gain, inner = self.gains
        parts = codes.long().unbind(-1)
        values = decode_e8p(parts[0] | parts[1] << 8)
        if self.bits == 3:
            values = values + short_vectors().to(values)[parts[2]] / inner
        elif self.bits == 4:
            values = values + decode_e8p(parts[2] | parts[3] << 8) / inner
        return (values / gain).flatten(1)


@cache
def absolute_values() -> torch.Tensor:
    """Return the vectors of absolute values of E8P, shape (256, 8): the 227 of halves, three halves
    and five halves with a squared norm of at most 10, then the first 29 of norm 12 with five three
    halves, each kind in the order of its places."""
    vectors = []
    for fives, threes in ((0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (0, 5)):
        for five in combinations(range(_SIZE), fives):
            others = [place for place in range(_SIZE) if place not in five]
            for three in combinations(others, threes):
                vector = [0.5] * _SIZE
                for place in five:
                    vector[place] = 2.5
                for place in three:
                    vector[place] = 1.5
                vectors.append(vector)
    return torch.tensor(vectors[:256], dtype=torch.float32, device="cpu")


@cache
def short_vectors() -> torch.Tensor:
    """Return 256 short vectors of E8, shape (256, 8): zero, the 240 of squared norm 2, and 15 of
    the 16 with one entry of 2 or -2."""
    vectors = [[0.0] * _SIZE]
    for places in combinations(range(_SIZE), 2):
        for signs in product((1.0, -1.0), repeat=2):
            vector = [0.0] * _SIZE
            for place, sign in zip(places, signs, strict=True):
                vector[place] = sign
            vectors.append(vector)
    halves = (v for v in product((0.5, -0.5), repeat=_SIZE) if sum(v) % 2 == 0)
    vectors += [list(vector) for vector in halves]
    for place, sign in product(range(_SIZE), (2.0, -2.0)):
        vectors.append([sign if other == place else 0.0 for other in range(_SIZE)])
    return torch.tensor(vectors[:256], dtype=torch.float32, device="cpu")


def decode_e8p(codes: torch.Tensor) -> torch.Tensor:
    """Return the points of E8P codes.

    Bits 8 to 15 choose the absolute values, bits 0 to 6 the signs of the first seven entries, 1 for
    minus; the last sign makes the sum even. All entries move by +1/4, by -1/4 where bit 7 is set.

    :param codes: int64, shape (...,)
    :return: float32, shape (..., 8)
    """
    table = absolute_values().to(codes.device)
    size = table[codes >> 8]  # (..., 8)
    minus = codes[..., None] >> torch.arange(_SIZE - 1, device=codes.device) & 1
    # flipping a half-integer entry changes the sum by an odd number
    odd = (size.sum(-1).long() + minus.sum(-1)) & 1
    minus = torch.cat([minus, odd[..., None]], -1)
    shift = _SHIFT - 2 * _SHIFT * (codes >> 7 & 1)
    return size * (1 - 2 * minus) + shift.to(size)[..., None]


def nearest_e8p(points: torch.Tensor) -> torch.Tensor:
    """Return the codes of the nearest points of E8P.

    :param points: shape (N, 8)
    :return: int64, shape (N,)
    """
    return torch.cat([_nearest_e8p(part) for part in points.float().split(_CHUNK)])


def _nearest_e8p(points: torch.Tensor) -> torch.Tensor:
    table = absolute_values().to(points)
    odd = table.sum(1).long() & 1  # (256,)
    norms = table.square().sum(1)
    best = None
    for moved in (0, 1):
        centred = points - (_SHIFT - 2 * _SHIFT * moved)
        size, minus = centred.abs(), centred < 0
        distance = norms - 2 * size @ table.T  # (N, 256), less |x|^2
        least = size[:, :1] * table[:, 0]
        for place in range(1, _SIZE):
            least = torch.minimum(least, size[:, place, None] * table[:, place])
        # where the signs would make the sum odd, the cheapest one is turned
        wrong = (minus.sum(1)[:, None] + odd) & 1
        distance = distance + 4 * wrong * least + centred.square().sum(1)[:, None]
        value, at = distance.min(1)
        turned = (size * table[at]).argmin(1)
        flip = wrong.gather(1, at[:, None])[:, 0].bool()
        signs = minus.clone()
        rows = torch.arange(len(points), device=points.device)
        signs[rows, turned] ^= flip
        bits = (signs[:, : _SIZE - 1] << torch.arange(_SIZE - 1, device=points.device)).sum(1)
        code = at << 8 | moved << 7 | bits
        if best is None:
            best = value, code
        else:
            nearer = value < best[0]
            best = torch.where(nearer, value, best[0]), torch.where(nearer, code, best[1])
    return best[1]


def nearest_vector(points: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return the indices of the nearest vectors of a table, shape (N,)."""
    norms = table.square().sum(1)
    return torch.cat([(norms - 2 * part @ table.T).argmin(1) for part in points.split(_CHUNK)])


@cache
def _distortion(bits: int) -> float:
    points = torch.randn(2048, _SIZE, generator=torch.Generator().manual_seed(0))
    return (points - LatticeCodec(bits).encode(points)[1]).square().mean().item()

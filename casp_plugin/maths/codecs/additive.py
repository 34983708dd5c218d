"""Additive codebooks that are learned for each weight (AQLM, arXiv 2401.06118).

``W = diag(s) V``, each vector of 8 entries of V the sum of one vector from each of M codebooks. The
codebooks start as those of residual k-means; then, in turns, codes are searched with a beam, and
codebooks and scales descend in the metric of the input, ``tr((W - W') H (W - W')^T)``.

Unlike in the paper the search goes through the groups of columns by BlockLDLQ, so that every group
makes up for what the groups behind it have lost, in one pass instead of many.

Shapes: out and in are those of a weight, N vectors of 8 numbers, E entries of a codebook.
"""

from dataclasses import dataclass
from functools import cache

import torch

from casp_plugin.maths.block_ldl import BlockLDL, round_by_blocks
from casp_plugin.maths.codecs.lattice import nearest_vector

__all__ = ["AdditiveCodec", "AdditiveWeight", "additive_distortion", "learn"]

_SIZE = 8
#: vectors that k-means looks at, at least and for each entry, and its rounds
_KMEANS_VECTORS, _KMEANS_EACH, _KMEANS_ROUNDS = 1 << 15, 16, 12
#: numbers of a table of distances that a search makes at once
_SEARCHED = 1 << 25
#: random vectors that measure the distortion
_PROBES = 1 << 15
#: turns of search and descent, and steps of a descent
_TURNS, _STEPS, _RATE = 3, 40, 3e-3


@dataclass(frozen=True)
class AdditiveCodec:
    """Sums of vectors from codebooks.

    :param codebooks: M
    :param code_bits: bits of a code: every codebook has 2^bits vectors
    :param beam: sums that the search keeps
    """

    codebooks: int
    code_bits: int = 8
    beam: int = 8

    columns = _SIZE
    rows = 1

    def search(
        self, target: torch.Tensor, tables: torch.Tensor, metric: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the codes whose sums are nearest to vectors, and the sums.

        :param target: shape (N, 8)
        :param tables: codebooks, shape (M, E, 8)
        :param metric: D of the block, shape (8, 8): the distance is e D e^T
        :return: codes, int64, shape (N, M), and sums, shape (N, 8)
        """
        size = max(1, _SEARCHED // (self.beam << self.code_bits))
        if len(target) > size:
            parts = [self.search(part, tables, metric) for part in target.split(size)]
            codes, sums = zip(*parts, strict=True)
            return torch.cat(codes), torch.cat(sums)
        root = torch.linalg.cholesky(metric)  # D = R R^T
        points, turned = target @ root, tables @ root
        rest = points[:, None]  # what is left of a vector, by beam: (N, beam, 8)
        codes = torch.empty(len(target), 1, 0, dtype=torch.int64, device=target.device)
        for table in turned:
            distance = table.square().sum(1) - 2 * rest @ table.T  # (N, beam, E)
            distance = distance + rest.square().sum(2, keepdim=True)
            keep = min(self.beam, distance[0].numel())
            _, at = distance.flatten(1).topk(keep, largest=False, sorted=True)
            of, entry = at // len(table), at % len(table)  # (N, beam)
            rest = rest.gather(1, of[..., None].expand(-1, -1, _SIZE)) - table[entry]
            known = codes.gather(1, of[..., None].expand(-1, -1, codes.shape[2]))
            codes = torch.cat([known, entry[..., None]], 2)
        best = codes[:, 0]  # the beam is sorted by its last distance
        return best, self.sums(best, tables)

    @staticmethod
    def sums(codes: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
        """Return the sums of codes.

        :param codes: int64, shape (..., M)
        :param tables: shape (M, E, 8)
        :return: shape (..., 8)
        """
        return sum(table[part] for table, part in zip(tables, codes.unbind(-1), strict=True))


@dataclass(frozen=True)
class AdditiveWeight:
    """A weight as sums of codebook vectors.

    :param codes: int64, shape (out, in / 8, M)
    :param tables: shape (M, E, 8)
    :param scale: s, shape (out,)
    """

    codes: torch.Tensor
    tables: torch.Tensor
    scale: torch.Tensor

    @property
    def dense(self) -> torch.Tensor:
        """Return the weight, shape (out, in)."""
        return AdditiveCodec.sums(self.codes, self.tables).flatten(1) * self.scale[:, None]


def learn(
    weight: torch.Tensor, moment: torch.Tensor, ldl: BlockLDL, codec: AdditiveCodec, seed: int
) -> AdditiveWeight:
    """Return codes, codebooks and scales of a weight.

    :param weight: W, shape (out, in), float32
    :param moment: H, shape (in, in)
    :param ldl: of H, in blocks of 8 columns
    :param codec: the codebooks
    :param seed: of the vectors that the codebooks start from
    """
    weight = weight.detach()
    tiny = torch.finfo(weight.dtype).tiny
    scale = weight.square().mean(1).sqrt().clamp_min(tiny)  # (out,)
    tables = _residual_kmeans((weight / scale[:, None]).reshape(-1, _SIZE), codec, seed)
    best, least = None, None
    for turn in range(_TURNS):
        codes = _search_all(weight, ldl, codec, tables, scale)
        if turn < _TURNS - 1 or best is None:
            tables, scale = _descend(weight, moment, codes, tables, scale)
        made = AdditiveWeight(codes, tables, scale)
        error = weight - made.dense
        cost = (error @ moment * error).sum()
        if least is None or cost < least:
            best, least = made, cost
    return best


@cache
def additive_distortion(codec: AdditiveCodec) -> float:
    """Return the mean squared error of coding Gaussian numbers of variance one."""
    probes = max(_PROBES, _KMEANS_EACH << codec.code_bits)
    numbers = torch.randn(probes, _SIZE, generator=torch.Generator().manual_seed(0))
    tables = _residual_kmeans(numbers, codec, 0)
    fresh = torch.randn(2048, _SIZE, generator=torch.Generator().manual_seed(1))
    _, values = codec.search(fresh, tables, torch.eye(_SIZE))
    return (fresh - values).square().mean().item()


def _search_all(
    weight: torch.Tensor,
    ldl: BlockLDL,
    codec: AdditiveCodec,
    tables: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    codes = {}

    def encode(target: torch.Tensor, index: int) -> torch.Tensor:
        codes[index], values = codec.search(target / scale[:, None], tables, ldl.blocks[index])
        return values * scale[:, None]

    round_by_blocks(weight, ldl, encode)
    return torch.stack([codes[index] for index in range(len(codes))], 1)


@torch.enable_grad()
def _descend(
    weight: torch.Tensor,
    moment: torch.Tensor,
    codes: torch.Tensor,
    tables: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codebooks and scales after some steps of Adam on the output error."""
    tables = tables.detach().clone().requires_grad_()
    scale = scale.detach().clone().requires_grad_()
    norm = (weight @ moment * weight).sum().clamp_min(torch.finfo(weight.dtype).tiny)
    optimizer = torch.optim.Adam(
        [{"params": [tables], "lr": _RATE}, {"params": [scale], "lr": _RATE * scale.mean().item()}]
    )
    for _ in range(_STEPS):
        error = weight - AdditiveWeight(codes, tables, scale).dense
        loss = (error @ moment * error).sum() / norm
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return tables.detach(), scale.detach()


def _residual_kmeans(vectors: torch.Tensor, codec: AdditiveCodec, seed: int) -> torch.Tensor:
    """Return codebooks, each of the remainders that the ones before it leave, shape (M, E, 8)."""
    generator = torch.Generator().manual_seed(seed)
    rest = vectors
    most = max(_KMEANS_VECTORS, _KMEANS_EACH << codec.code_bits)
    if len(vectors) > most:
        picked = torch.randperm(len(vectors), generator=generator)[:most]
        rest = vectors[picked.to(vectors.device)]
    tables = []
    for _ in range(codec.codebooks):
        start = torch.randint(len(rest), (1 << codec.code_bits,), generator=generator)
        table = rest[start.to(rest.device)].clone()
        for _ in range(_KMEANS_ROUNDS):
            nearest = nearest_vector(rest, table)
            sums = torch.zeros_like(table).index_add_(0, nearest, rest)
            counts = torch.bincount(nearest, minlength=len(table)).to(table)[:, None]
            table = torch.where(counts > 0, sums / counts.clamp_min(1), table)
        tables.append(table)
        rest = rest - table[nearest_vector(rest, table)]
    return torch.stack(tables)

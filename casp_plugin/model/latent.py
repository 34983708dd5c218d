"""Linears that may become low-rank products of one latent: which they are, and their factors."""

from collections.abc import Iterable
from functools import cached_property

from torch import nn

from casp_plugin.maths.knapsack import choose
from casp_plugin.maths.low_rank import Factors, Spectrum, random_rotation
from casp_plugin.model.low_rank_linear import LowRankLinear

__all__ = ["Latent", "global_ranks"]


class Latent:
    """Linears that read one input, and what becomes of them at each rank.

    :param linears: the dense layers by name, one or more, in order
    :param spectrum: their stacked weights, whitened; None while there are no statistics: then
        factors are empty and errors unknown
    :param rotate: turn the latent by a random rotation, so that the factors round well
    """

    def __init__(
        self, linears: dict[str, nn.Linear], spectrum: Spectrum | None, rotate: bool = True
    ):
        self.linears = linears
        self.spectrum = spectrum
        self.rotate = rotate

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the stacked weight."""
        rows = sum(linear.out_features for linear in self.linears.values())
        return rows, next(iter(self.linears.values())).in_features

    @property
    def parameters(self) -> int:
        """Weights of the dense layers."""
        return self.shape[0] * self.shape[1]

    def kept(self, rank: int | None) -> float:
        """Parameters of the factors over those of the dense layers; 1 without factors."""
        return 1.0 if rank is None else rank * sum(self.shape) / self.parameters

    @property
    def largest_rank(self) -> int:
        """The largest rank whose factors are smaller than the layers."""
        return min((self.parameters - 1) // sum(self.shape), *self.shape)

    def ranks(self, multiple: int) -> list[int]:
        """Every rank, a multiple of ``multiple``, whose factors are smaller than the layers."""
        return list(range(multiple, self.largest_rank + 1, multiple))

    def factors(self, rank: int) -> Factors:
        """The best factors of a rank, rows of ``up`` stacked as the layers are."""
        return self.spectrum.factors(rank, random_rotation(rank) if self.rotate else None)

    def layers(self, rank: int) -> dict[str, LowRankLinear]:
        """The factored layers that replace the dense ones; the first holds the latent."""
        linears = self.linears.items()
        first = None
        made = {}
        if self.spectrum is not None:
            factors = self.factors(rank)
            ups = factors.up.split([linear.out_features for linear in self.linears.values()])
        for index, (name, linear) in enumerate(linears):
            if self.spectrum is None:
                made[name] = LowRankLinear.like(linear, rank, first)
            else:
                made[name] = LowRankLinear.from_factors(linear, factors.down, ups[index], first)
            first = first or made[name]
        return made


def global_ranks(latents: Iterable[Latent], multiple: int, keep: float) -> list[int | None]:
    """Ranks that lose the least energy in all, within a share of the parameters.

    Exact, by the knapsack that allocates bits too; singular values fall, so the marginal gain of
    a rank does, and the choice is that of taking the best next step everywhere.

    :param latents: with their spectra in one unit
    :param multiple: ranks are multiples of this
    :param keep: parameters of all factors over those of all dense layers, in (0, 1)
    :return: rank of each latent, None where it stays dense
    """
    latents = list(latents)
    options = [[*latent.ranks(multiple), None] for latent in latents]
    sizes = [
        [round(latent.kept(rank) * latent.parameters) for rank in ranks]
        for latent, ranks in zip(latents, options, strict=True)
    ]
    lost = [
        [0.0 if rank is None else latent.spectrum.lost(rank) for rank in ranks]
        for latent, ranks in zip(latents, options, strict=True)
    ]
    least = sum(min(row) for row in sizes)
    budget = max(least, int(keep * sum(latent.parameters for latent in latents)))
    chosen = choose(lost, sizes, budget, slack=budget)
    return [ranks[index] for ranks, index in zip(options, chosen, strict=True)]

"""Linears that can be factored with one shared latent, their factors and their ranks."""

from collections.abc import Iterable
from functools import cached_property

from torch import nn

from casp_plugin.maths.knapsack import choose
from casp_plugin.maths.low_rank import Factors, Spectrum, random_rotation
from casp_plugin.model.low_rank_linear import LowRankLinear

__all__ = ["Latent", "global_ranks"]


class Latent:
    """Linears that read one input, and their factored layers at any rank.

    :param linears: the dense layers by name, one or more, in order
    :param spectrum: spectrum of their stacked weights; None without statistics, when factors are
        empty and errors unknown
    :param rotate: whether to rotate the latent at random, so that the factors round well
    """

    def __init__(
        self, linears: dict[str, nn.Linear], spectrum: Spectrum | None, rotate: bool = True
    ):
        self.linears = linears
        self.spectrum = spectrum
        self.rotate = rotate

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Return (out, in) of the stacked weight."""
        rows = sum(linear.out_features for linear in self.linears.values())
        return rows, next(iter(self.linears.values())).in_features

    @property
    def parameters(self) -> int:
        """Return the number of weights of the dense layers."""
        return self.shape[0] * self.shape[1]

    def kept(self, rank: int | None) -> float:
        """Return parameters of the factors over parameters of the dense layers; 1 for rank None."""
        return 1.0 if rank is None else rank * sum(self.shape) / self.parameters

    @property
    def largest_rank(self) -> int:
        """Return the largest rank whose factors are smaller than the layers."""
        return min((self.parameters - 1) // sum(self.shape), *self.shape)

    def ranks(self, multiple: int) -> list[int]:
        """Return all multiples of ``multiple`` whose factors are smaller than the layers."""
        return list(range(multiple, self.largest_rank + 1, multiple))

    def factors(self, rank: int) -> Factors:
        """Return the best factors of a rank, rows of ``up`` stacked in the order of the layers."""
        return self.spectrum.factors(rank, random_rotation(rank) if self.rotate else None)

    def layers(self, rank: int) -> dict[str, LowRankLinear]:
        """Return the factored layers that replace the dense ones; the first holds the latent."""
        linears = self.linears.items()
        first = None
        factored = {}
        if self.spectrum is not None:
            factors = self.factors(rank)
            ups = factors.up.split([linear.out_features for linear in self.linears.values()])
        for index, (name, linear) in enumerate(linears):
            if self.spectrum is None:
                factored[name] = LowRankLinear.like(linear, rank, first)
            else:
                up = ups[index]
                factored[name] = LowRankLinear.from_factors(linear, factors.down, up, first)
            first = first or factored[name]
        return factored


def global_ranks(latents: Iterable[Latent], multiple: int, keep: float) -> list[int | None]:
    """Return the ranks that lose the least energy in all, within a share of the parameters.

    Exact, by the knapsack that allocates bits too. Singular values fall, so the marginal gain of a
    rank falls, and the choice equals taking the best next step everywhere.

    :param latents: latents whose spectra share one unit of energy
    :param multiple: ranks are multiples of this
    :param keep: parameters of all factors over parameters of all dense layers, in (0, 1)
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
    most_parameters = max(least, int(keep * sum(latent.parameters for latent in latents)))
    chosen = choose(lost, sizes, most_parameters, slack=most_parameters)
    return [ranks[index] for ranks, index in zip(options, chosen, strict=True)]

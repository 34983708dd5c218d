"""Layer notes: what is kept of a layer once its statistics are gone, prices and spectra."""

from dataclasses import dataclass, field

from casp_plugin.maths.low_rank import Spectrum
from casp_plugin.plan.plan import UnitPlan
from casp_plugin.statistics.statistics import Statistics

__all__ = ["LayerNotes"]


@dataclass
class LayerNotes:
    """Notes of the modifiers of a recipe about some layers.

    :param priced: single linears, or the linears of one latent, with the prices of all candidates
    :param spectra: spectra of linears that may share a latent, by their names
    :param statistics: the statistics that are needed when all layers have been measured: small
        ones, and the second moments of gradients, which lie on disk
    :param end: number of subgraphs of the model that have run
    :param last: whether the whole model has run
    """

    priced: list[UnitPlan] = field(default_factory=list)
    spectra: dict[tuple[str, ...], Spectrum] = field(default_factory=dict)
    statistics: Statistics = field(default_factory=Statistics)
    end: int = 0
    last: bool = True

    def __or__(self, other: "LayerNotes") -> "LayerNotes":
        """Return the notes of the layers of both, the other's being later layers."""
        return LayerNotes(
            self.priced + other.priced,
            self.spectra | other.spectra,
            self.statistics | other.statistics,
            other.end,
            other.last,
        )

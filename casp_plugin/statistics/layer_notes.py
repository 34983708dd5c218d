"""What is kept of the layers of a model once their statistics are gone: prices and spectra."""

from dataclasses import dataclass, field

from casp_plugin.maths.low_rank import Spectrum
from casp_plugin.plan.plan import UnitPlan
from casp_plugin.statistics.statistics import Statistics

__all__ = ["Measured"]


@dataclass
class Measured:
    """What the modifiers of a recipe noted down about some layers.

    :param units: single linears, or those of one latent, with the prices of all candidates
    :param spectra: of linears that may share a latent, by their names
    :param statistics: what is still needed when all layers were seen
    :param end: subgraphs of the model that have run by then
    :param last: whether it has run as a whole
    """

    units: list[UnitPlan] = field(default_factory=list)
    spectra: dict[tuple[str, ...], Spectrum] = field(default_factory=dict)
    statistics: Statistics = field(default_factory=Statistics)
    end: int = 0
    last: bool = True

    def __or__(self, other: "Measured") -> "Measured":
        """Of the layers of both, of which the others come later."""
        return Measured(
            self.units + other.units,
            self.spectra | other.spectra,
            self.statistics | other.statistics,
            other.end,
            other.last,
        )

"""CompressionPlan: the ranks and schemes chosen for a model, and the reasons.

A plan is plain data: it is printed before the long work starts, returned by the API, and
stored as ``casp_plan.json`` beside the checkpoint.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from casp_plugin.maths.average_bits import average_bits
from casp_plugin.model.components import LANGUAGE

__all__ = [
    "PLAN_NAME",
    "AttentionPlan",
    "Budget",
    "Candidate",
    "CompressionPlan",
    "CopiedTensor",
    "LowRankPlan",
    "ParetoPoint",
    "SpectrumPlan",
    "UnitPlan",
]

PLAN_NAME = "casp_plan.json"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Candidate(_Model):
    """One scheme on offer for a unit.

    :param bits: bit width of the codes
    :param group_size: columns that share a scale, -1 for a whole row
    :param bytes: bytes of the unit's weights on disk: codes, scales, zero points, shapes
    :param rank: rank of the unit's factors; None where its layers stay dense
    :param error: output error summed over the unit's linears, in the unit of the modifier's
        `importance`; None if unknown
    :param needs: package that stock vLLM on CUDA needs for this scheme; None if none
    :param codec: codec of a codebook quantizer; None for integers with scales
    """

    bits: int
    rank: int | None = None
    group_size: int
    bytes: int
    error: float | None = None
    needs: str | None = None
    codec: str | None = None


class UnitPlan(_Model):
    """The smallest set of linears that one bit width is chosen for; or, before ``join_units``, a
    piece of it.

    :param name: layer and members
    :param modules: stored weights, name to (out, in), as chosen; a factored layer stores ``up``
        and, unless its latent is another layer's, ``down``
    :param weights: number of original weights of the unit's linears, before any factorisation
    :param component: component of a multimodal model that holds the unit
    :param importance: weight of the error in the solver; None if unknown
    :param candidates: schemes on offer, by rising bits
    :param chosen: index of the chosen candidate; None without statistics
    """

    name: str
    modules: dict[str, tuple[int, int]]
    weights: int
    component: str = LANGUAGE
    importance: float | None = None
    candidates: list[Candidate]
    chosen: int | None = None

    @property
    def choice(self) -> Candidate | None:
        """Return the chosen candidate; None if none is chosen."""
        return None if self.chosen is None else self.candidates[self.chosen]


class LowRankPlan(_Model):
    """One linear that low rank was considered for.

    :param module: name of the linear
    :param component: component of a multimodal model that holds it
    :param shape: (out, in)
    :param rank: rank of the factors; None where the layer stays dense
    :param keep: parameters of the factors over parameters of the matrix, 1 where dense
    :param error: share of the output energy that is lost; None if unknown
    :param note: why the layer stays dense
    """

    module: str
    component: str = LANGUAGE
    shape: tuple[int, int]
    rank: int | None
    keep: float
    error: float | None = None
    note: str | None = None


class SpectrumPlan(_Model):
    """Energy lost by factors, rank by rank.

    :param modules: linears that share a latent
    :param ranks: ranks from 0 to the largest
    :param lost: share of the output energy lost at these ranks, under the modifier's metric
    """

    modules: list[str]
    ranks: list[int]
    lost: list[float]


class AttentionPlan(_Model):
    """Density of the maps of one attention module.

    :param module: name of the module
    :param component: component of a multimodal model that holds it
    :param heads: share of map entries that are not nearly zero, by head
    :param entropy: keys effectively looked at over visible keys, by head
    :param image: ``heads`` over keys that stand for images; None without images
    :param text: ``heads`` over the other keys; None without images
    """

    module: str
    component: str = LANGUAGE
    heads: list[float]
    entropy: list[float]
    image: list[float] | None = None
    text: list[float] | None = None


class CopiedTensor(_Model):
    """A tensor of the source checkpoint that the output holds unchanged.

    :param name: name on disk
    :param bytes: bytes of its data
    :param why: reason why it is not compressed
    """

    name: str
    bytes: int
    why: str


class ParetoPoint(_Model):
    """The least error that the same candidates allow at another budget.

    :param component: component that the budget is for; None for all components together
    :param average_bits: all bits stored, divided by the number of original weights
    :param error: importance x error summed over the units; with the importance of a study,
        relative to the value at the fewest bits
    """

    component: str | None = None
    average_bits: float
    error: float


@dataclass(frozen=True)
class Budget:
    """Units that share one budget.

    :param component: component that holds the units; None where all components share the budget
    :param average_bits: the budget, as given
    :param units: the units
    """

    component: str | None
    average_bits: float
    units: list[UnitPlan]

    @property
    def weights(self) -> int:
        """Return the number of original weights of all units."""
        return sum(unit.weights for unit in self.units)

    @property
    def reached_bits(self) -> float | None:
        """Return the average bits of the chosen candidates; None unless all units have one."""
        if any(unit.chosen is None for unit in self.units):
            return None
        return average_bits(sum(unit.choice.bytes for unit in self.units), self.weights)

    @property
    def reachable_bits(self) -> tuple[float, float]:
        """Return the least and the largest average bits that the candidates allow."""
        least = sum(min(c.bytes for c in unit.candidates) for unit in self.units)
        most = sum(max(c.bytes for c in unit.candidates) for unit in self.units)
        return average_bits(least, self.weights), average_bits(most, self.weights)


class TunedPart(_Model):
    """A part of the model whose real numbers were trained.

    :param module: a decoder layer; empty for the whole model
    :param before: loss of held-out data, squared error of a layer or KL divergence of the whole
    :param after: the same at the end
    :param epoch: the best epoch; 0 where none was better, and all is as it was
    """

    module: str
    before: float
    after: float
    epoch: int


class CompressionPlan(_Model):
    """Ranks and schemes chosen for a whole model.

    :param format: version of this file format
    :param model: name or path of the source model
    :param versions: package versions that made the plan
    :param seed: torch's seed when the plan was made
    :param calibration_tokens: number of tokens of the calibration data; None without data
    :param settings: fields of the modifiers, as given, by class name
    :param average_bits: the budget, or the budgets by component, as given; None if no bits were
        allocated
    :param attention: densities of attention modules, where requested
    :param low_rank: linears that low rank was considered for
    :param spectra: spectra of these linears; empty without statistics
    :param units: units that bits were chosen for
    :param pareto: errors at other budgets, by rising bits; empty if errors are unknown
    :param tuned: parts of the model that were trained, in that order
    :param copied: tensors of the source checkpoint that the model's class does not build
    :param other_bytes: bytes of all tensors outside the units (embeddings, norms, biases, copied
        tensors)
    :param original_bytes: bytes of all tensors of the source model
    :param warnings: warnings for whoever deploys the checkpoint
    """

    format: Literal[1] = 1
    model: str
    versions: dict[str, str] = Field(default_factory=dict)
    seed: int | None = None
    calibration_tokens: int | None = None
    settings: dict[str, dict] = Field(default_factory=dict)
    average_bits: float | dict[str, float] | None = None
    attention: list[AttentionPlan] = Field(default_factory=list)
    low_rank: list[LowRankPlan] = Field(default_factory=list)
    spectra: list[SpectrumPlan] = Field(default_factory=list)
    units: list[UnitPlan] = Field(default_factory=list)
    pareto: list[ParetoPoint] = Field(default_factory=list)
    tuned: list[TunedPart] = Field(default_factory=list)
    copied: list[CopiedTensor] = Field(default_factory=list)
    other_bytes: int | None = None
    original_bytes: int | None = None
    warnings: list[str] = Field(default_factory=list)

    @property
    def decided(self) -> bool:
        """Tell whether bits are chosen for every unit."""
        return bool(self.units) and all(unit.chosen is not None for unit in self.units)

    @property
    def budgets(self) -> list[Budget]:
        """Return the budgets, one per component or one for all units; none where one width was
        given."""
        if self.average_bits is None:
            return []
        if not isinstance(self.average_bits, dict):
            return [Budget(None, self.average_bits, self.units)]
        return [
            Budget(component, bits, [unit for unit in self.units if unit.component == component])
            for component, bits in self.average_bits.items()
        ]

    @property
    def weights(self) -> int:
        """Return the number of original weights of all units."""
        return sum(unit.weights for unit in self.units)

    @property
    def unit_bytes(self) -> int | None:
        """Return the bytes of all units under the chosen schemes; None if undecided."""
        return sum(unit.choice.bytes for unit in self.units) if self.decided else None

    @property
    def total_bytes(self) -> int | None:
        """Return the bytes of all tensors of the checkpoint; None if undecided."""
        if not self.decided or self.other_bytes is None:
            return None
        return self.unit_bytes + self.other_bytes

    @property
    def reached_bits(self) -> float | None:
        """Return the average bits of the chosen candidates; None unless all units have one."""
        return average_bits(self.unit_bytes, self.weights) if self.decided else None

    @property
    def kept(self) -> float | None:
        """Return the share of parameters kept over all linears that low rank was considered for.

        None without such linears.
        """
        sizes = [entry.shape[0] * entry.shape[1] for entry in self.low_rank]
        if not sizes:
            return None
        kept = sum(p.keep * size for p, size in zip(self.low_rank, sizes, strict=True))
        return kept / sum(sizes)

    def save(self, path: Path | str) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.model_dump(mode="json"), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> "CompressionPlan":
        """Read a plan from a file, or from a checkpoint folder that holds one.

        :raises FileNotFoundError: if there is no such file
        :raises pydantic.ValidationError: if it holds no plan
        """
        path = Path(path)
        path = path / PLAN_NAME if path.is_dir() else path
        return cls.model_validate_json(path.read_text())

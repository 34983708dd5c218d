"""CompressionPlan: what was decided for each part of a model, and why.

A plan is plain data: it is printed before the long work starts, returned by the API, and
stored as ``casp_plan.json`` beside the checkpoint.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

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
    :param error: output error summed over the unit's linears, in the terms of the modifier's
        `importance`; None if unknown
    :param needs: package that stock vLLM on CUDA needs for this scheme, None if none
    :param rank: rank of the unit's factors, None where its layers stay as they are
    """

    bits: int
    rank: int | None = None
    group_size: int
    bytes: int
    error: float | None = None
    needs: str | None = None


class UnitPlan(_Model):
    """Linears that share one bit width.

    :param name: layer and members
    :param modules: stored weights, name to (out, in), as chosen; a factored layer stores ``up``
        and, unless it shares another's, ``down``
    :param weights: original weights of the unit's linears, before any factorisation
    :param component: part of a multimodal model that it lies in
    :param importance: what the solver weighted the error with; None if unknown
    :param candidates: schemes on offer, by rising bits
    :param chosen: index of the chosen candidate; None until statistics are there
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
        return None if self.chosen is None else self.candidates[self.chosen]


class LowRankPlan(_Model):
    """One linear that low rank was considered for.

    :param module: its name
    :param shape: (out, in)
    :param rank: rank of the factors; None where the layer stays dense
    :param keep: parameters of the factors over those of the matrix, 1 where dense
    :param error: share of the output energy lost; None if unknown
    :param note: why it stays dense
    :param component: part of a multimodal model that it lies in
    """

    module: str
    component: str = LANGUAGE
    shape: tuple[int, int]
    rank: int | None
    keep: float
    error: float | None = None
    note: str | None = None


class SpectrumPlan(_Model):
    """What factors lose, rank by rank.

    :param modules: linears that share a latent
    :param ranks: some ranks from 0 to the largest there is
    :param lost: share of the output energy that is lost at each, under the modifier's metric
    """

    modules: list[str]
    ranks: list[int]
    lost: list[float]


class AttentionPlan(_Model):
    """How sparse one attention module is.

    :param module: its name
    :param component: part of a multimodal model that it lies in
    :param heads: share of the entries of its maps that are not nearly zero, one a head
    :param entropy: keys effectively looked at over visible keys, one a head
    :param image: the same over keys that stand for images; None without images
    :param text: the same over the other keys
    """

    module: str
    component: str = LANGUAGE
    heads: list[float]
    entropy: list[float]
    image: list[float] | None = None
    text: list[float] | None = None


class CopiedTensor(_Model):
    """A tensor of the source checkpoint that is in the output unchanged.

    :param name: its name on disk
    :param bytes: of its data
    :param why: it is not compressed
    """

    name: str
    bytes: int
    why: str


class ParetoPoint(_Model):
    """The best that the same tables allow at another budget.

    :param component: that the budget is for; None for all together
    :param average_bits: over the units' original weights, everything counted
    :param error: importance x error summed over the units; by the importance of a study, over
        that at the fewest bits
    """

    component: str | None = None
    average_bits: float
    error: float


@dataclass(frozen=True)
class Budget:
    """Units that share one budget.

    :param component: part of the model that they lie in; None where all share it
    :param average_bits: the budget, as given
    """

    component: str | None
    average_bits: float
    units: list[UnitPlan]

    @property
    def weights(self) -> int:
        """Original weights of all units."""
        return sum(unit.weights for unit in self.units)

    @property
    def reached_bits(self) -> float | None:
        """Average bits over the units' original weights, everything counted."""
        if any(unit.chosen is None for unit in self.units):
            return None
        return sum(unit.choice.bytes for unit in self.units) * 8 / self.weights

    @property
    def reachable_bits(self) -> tuple[float, float]:
        """Least and largest average bits that the candidates allow."""
        least = sum(min(c.bytes for c in unit.candidates) for unit in self.units)
        most = sum(max(c.bytes for c in unit.candidates) for unit in self.units)
        return least * 8 / self.weights, most * 8 / self.weights


class CompressionPlan(_Model):
    """The whole decision.

    :param model: name or path of the source model
    :param versions: package versions that made the plan
    :param seed: torch seed at the time
    :param calibration_tokens: tokens the statistics come from; None without statistics
    :param settings: fields of each modifier, as given
    :param average_bits: the budget, or that of each component, as given; None if no bits were
        allocated
    :param attention: attention modules whose maps were looked at
    :param low_rank: every linear that was considered for factors
    :param spectra: of what was considered; empty without statistics
    :param units: every unit that bits were chosen for
    :param pareto: what other budgets would cost, by rising bits; empty if errors are unknown
    :param copied: tensors of the source checkpoint that the model's class does not build
    :param other_bytes: bytes of all tensors outside the units (embeddings, norms, biases, copied
        ones)
    :param original_bytes: bytes of all tensors of the model that it was made from
    :param warnings: what a user should know before deploying
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
    copied: list[CopiedTensor] = Field(default_factory=list)
    other_bytes: int | None = None
    original_bytes: int | None = None
    warnings: list[str] = Field(default_factory=list)

    @property
    def decided(self) -> bool:
        """Whether every unit has its bits."""
        return bool(self.units) and all(unit.chosen is not None for unit in self.units)

    @property
    def budgets(self) -> list[Budget]:
        """What the units share, component by component or all together."""
        if not isinstance(self.average_bits, dict):
            return [Budget(None, self.average_bits, self.units)]
        return [
            Budget(component, bits, [unit for unit in self.units if unit.component == component])
            for component, bits in self.average_bits.items()
        ]

    @property
    def weights(self) -> int:
        """Original weights of all units."""
        return sum(unit.weights for unit in self.units)

    @property
    def unit_bytes(self) -> int | None:
        """Bytes of all units under the chosen schemes."""
        return sum(unit.choice.bytes for unit in self.units) if self.decided else None

    @property
    def total_bytes(self) -> int | None:
        """Bytes of all tensors of the checkpoint."""
        if not self.decided or self.other_bytes is None:
            return None
        return self.unit_bytes + self.other_bytes

    @property
    def reached_bits(self) -> float | None:
        """Average bits over the units' original weights, everything counted."""
        return self.unit_bytes * 8 / self.weights if self.decided else None

    @property
    def kept(self) -> float | None:
        """Share of parameters kept over all linears that low rank was considered for."""
        sizes = [entry.shape[0] * entry.shape[1] for entry in self.low_rank]
        if not sizes:
            return None
        kept = sum(e.keep * s for e, s in zip(self.low_rank, sizes, strict=True))
        return kept / sum(sizes)

    def save(self, path: Path | str) -> None:
        Path(path).write_text(json.dumps(self.model_dump(mode="json"), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> "CompressionPlan":
        """Read a plan from a file, or from a checkpoint folder that holds one.

        :raises FileNotFoundError: if there is none
        :raises pydantic.ValidationError: if it is malformed
        """
        path = Path(path)
        path = path / PLAN_NAME if path.is_dir() else path
        return cls.model_validate_json(path.read_text())

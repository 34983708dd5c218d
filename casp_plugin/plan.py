"""CompressionPlan: what was decided for each part of a model, and why.

A plan is plain data: it is printed before the long work starts, returned by the API, and
stored as ``casp_plan.json`` beside the checkpoint.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from rich import box
from rich.table import Table

from casp_plugin.components import LANGUAGE
from casp_plugin.sparsity import THRESHOLD

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

    def tables(self) -> list[Table]:
        """The plan as rich tables: ranks, units, totals. Unknown values show as ``?``."""
        tables = []
        if self.attention:
            tables.append(self._attention_table())
        if self.low_rank:
            tables.append(self._low_rank_table())
        if self.units:
            tables.append(self._unit_table())
        if len({unit.component for unit in self.units}) > 1:
            tables.append(self._component_table())
        if self.pareto:
            tables.append(self._pareto_table())
        tables.append(self._total_table())
        return tables

    def _attention_table(self) -> Table:
        title = f"Attention density: share of a map's entries above {THRESHOLD}"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("module", "mean", "least head", "largest head", "images", "text", "entropy"):
            table.add_column(column, justify="left" if column == "module" else "right")
        for one in self.attention:
            values = [fmean(one.heads), min(one.heads), max(one.heads)]
            kinds = (one.image, one.text)
            table.add_row(
                one.module,
                *(f"{value:.3f}" for value in values),
                *("" if shares is None else f"{fmean(shares):.3f}" for shares in kinds),
                f"{fmean(one.entropy):.3f}",
            )
        return table

    def _low_rank_table(self) -> Table:
        table = Table(title="Low rank", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("module", "shape", "rank", "kept", "error", "note"):
            table.add_column(column, justify="left" if column in ("module", "note") else "right")
        for entry in self.low_rank:
            table.add_row(
                entry.module,
                "x".join(map(str, entry.shape)),
                str(entry.rank) if entry.rank else "dense",
                f"{entry.keep:.3f}",
                _shown(entry.error, ".4f") if entry.rank else "-",
                entry.note or "",
            )
        return table

    def _unit_table(self) -> Table:
        table = Table(title="Bits", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("unit", overflow="fold", min_width=38)
        for column in ("importance", "rank", "bits", "error", "bytes"):
            table.add_column(column, justify="right")
        for unit in self.units:
            options = [unit.choice] if unit.choice else unit.candidates
            sizes = [c.bytes for c in options]
            ranks = dict.fromkeys("dense" if c.rank is None else str(c.rank) for c in options)
            table.add_row(
                unit.name,
                _shown(unit.importance, ".4g"),
                "" if list(ranks) == ["dense"] else "|".join(ranks),
                "|".join(map(str, dict.fromkeys(c.bits for c in options))),
                _shown(options[0].error if unit.choice else None, ".4f"),
                f"{sizes[0]:,}" if unit.choice else f"from {min(sizes):,}",
            )
        return table

    def _component_table(self) -> Table:
        """What components weigh, got and cost; "at fewest bits" tells how sensitive they are."""
        columns = ("component", "weights", "average bits", "error", "error at fewest bits")
        table = Table(title="Components", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            table.add_column(column, justify="left" if column == "component" else "right")
        parts: dict[str, list[UnitPlan]] = {}
        for unit in self.units:
            parts.setdefault(unit.component, []).append(unit)
        whole = sum(unit.weights for unit in self.units)
        decided = [_expected(units, chosen=True) for units in parts.values()]
        fewest = [_expected(units, chosen=False) for units in parts.values()]
        for (component, units), now, least in zip(parts.items(), decided, fewest, strict=True):
            weights = sum(unit.weights for unit in units)
            bytes_ = None if now is None else sum(unit.choice.bytes for unit in units)
            table.add_row(
                component,
                f"{weights / whole:.1%}",
                _shown(bytes_ and bytes_ * 8 / weights, ".4f"),
                _share(now, decided),
                _share(least, fewest),
            )
        return table

    def _pareto_table(self) -> Table:
        title = "Budgets: expected error, importance x error over all units"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("component", "average bits", "error"):
            table.add_column(column, justify="right")
        for point in self.pareto:
            component = point.component or "all"
            table.add_row(component, f"{point.average_bits:.3f}", f"{point.error:.4f}")
        return table

    def _total_table(self) -> Table:
        table = Table(title="Totals", title_justify="left", show_header=False)
        table.add_row("model", self.model)
        if self.low_rank:
            table.add_row("low-rank parameters kept", f"{self.kept:.3f}")
        if self.units:
            for budget in self.budgets:
                name = f"average bits of {budget.component}" if budget.component else "average bits"
                least, most = budget.reachable_bits
                table.add_row(f"{name}, budget", f"{budget.average_bits:.4f}")
                table.add_row(f"{name}, reached", _shown(budget.reached_bits, ".4f"))
                table.add_row(f"{name}, reachable", f"{least:.4f} to {most:.4f}")
            table.add_row("bytes of the units", _shown(self.unit_bytes, ",d"))
            table.add_row("bytes of all tensors", _shown(self.total_bytes, ",d"))
        if self.copied:
            size = sum(each.bytes for each in self.copied)
            names = ", ".join(each.name for each in self.copied[:3])
            more = ", ..." if len(self.copied) > 3 else ""
            what = f"{len(self.copied)} tensors, {size:,} bytes ({names}{more})"
            table.add_row("copied unchanged", f"{what}: {self.copied[0].why}")
        tokens = self.calibration_tokens
        table.add_row("calibration tokens", f"{tokens:,}" if tokens else "none: ? is unknown")
        for warning in self.warnings:
            table.add_row("warning", warning)
        return table

    def plot(self, path: Path | str) -> None:
        """Draw bits over the layers, and how sparse the attention is, as a PNG.

        :raises ValueError: if the bits are not decided yet, or matplotlib is missing
        """
        if not self.decided:
            raise ValueError("nothing to draw: the plan has no bits yet (it needs statistics)")
        try:  # an extra, and slow to import
            from casp_plugin.drawing.plans import draw
        except ImportError:
            raise ValueError("drawing needs: pip install 'casp-plugin[report]'") from None
        draw(self).savefig(path, dpi=120)


def _expected(units: list[UnitPlan], chosen: bool) -> float | None:
    """Importance x error of units as chosen, or dense at the fewest bits; None if unknown."""
    found = [(unit.importance, unit.choice if chosen else unit.candidates[0]) for unit in units]
    if any(importance is None or c is None or c.error is None for importance, c in found):
        return None
    return sum(importance * candidate.error for importance, candidate in found)


def _share(value: float | None, values: list[float | None]) -> str:
    """An error, and its share of all components'."""
    if value is None or None in values:
        return "?"
    return f"{value:.4f} ({value / sum(values):.0%})" if sum(values) else f"{value:.4f}"


def _shown(value, spec: str) -> str:
    return "?" if value is None else format(value, spec)

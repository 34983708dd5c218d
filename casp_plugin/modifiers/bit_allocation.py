"""BitAllocationModifier: each unit gets the bit width that its importance earns."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from compressed_tensors.transform import TransformConfig
from compressed_tensors.utils import is_match, match_name
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationMixin
from pydantic import Field, PrivateAttr, field_validator, model_validator
from torch import nn
from torch.nn.modules.conv import _ConvNd
from tqdm import tqdm

from casp_plugin.maths.coupled_knapsack import Coupled
from casp_plugin.maths.knapsack import choose, closed_form_bits, distance_costs, pareto
from casp_plugin.model.components import LANGUAGE
from casp_plugin.model.latent import Latent
from casp_plugin.model.location import find_parts
from casp_plugin.model.low_rank_linear import LowRankLinear, stored_tensors
from casp_plugin.model.schemes import quantized_bytes, weight_args
from casp_plugin.model.transforms import stored_transforms
from casp_plugin.model.units import OUTPUT_HEAD, Unit, decoder_layers, find_units, matched_linears
from casp_plugin.modifiers.awq import point_awq
from casp_plugin.modifiers.base import CaspModifier
from casp_plugin.modifiers.factoring import install
from casp_plugin.modifiers.quantizer import (
    find_quantizer,
    give_schemes,
    method_of,
    observer_of,
    round_unseen,
    rounds_to_nearest,
    tunes_layers,
)
from casp_plugin.plan.plan import CompressionPlan, ParetoPoint, UnitPlan
from casp_plugin.plan.sensitivity_file import Sensitivity
from casp_plugin.pricing.candidates import Pricing, joined, stored_shapes
from casp_plugin.statistics.layer_notes import Measured
from casp_plugin.statistics.statistics import Request, Statistics
from casp_plugin.system.distributed import shared

__all__ = ["BitAllocationModifier"]

#: bits of the average that may stay unspent
TOLERANCE = 0.01
#: share of the weights that matrices which are no linear layers may have without a word
NOTED_SHARE = 0.05
#: budgets that a plan tells the cost of
PARETO_POINTS = 9
#: ranks are multiples of this where no group size asks for more
RANK_MULTIPLE = 64


class BitAllocationModifier(CaspModifier):
    """
    Gives each unit of the model its own bit width, so that the average over all of them meets
    a budget: phase 2 of CASP (CVPR 2025, https://arxiv.org/abs/2503.05936). The quantizing
    modifier that follows in the recipe, left without a config of its own, runs at these widths.

    Sample yaml:

    ```yaml
    casp_stage:
      casp_modifiers:
        LowRankQKModifier:
          keep: 0.25
        BitAllocationModifier:
          average_bits: 2.5
          candidates: [2, 3, 4]
          group_size: 64
        GPTQModifier: {}
    ```

    Average bits are all bits stored for the targeted layers (codes, scales, zero points,
    low-rank factors, shapes; not biases) over the number of their original weights: what low
    rank saves comes back as bits elsewhere.

    Lifecycle:

    - on_initialize
        - measure importances and rounding errors (once for all casp modifiers)
        - choose
        - write config groups into the quantizing modifier that follows

    :param average_bits: the budget; the plan stays at or below it, within 0.01 of the best that
        the candidates can reach. One number for all `components` together, or a mapping from
        component to a budget of its own
    :param component_weights: factors on the importance of whole components, 1 where not given
    :param candidates: bit widths on offer, 2 to 8
    :param group_size: columns that share a scale, -1 for one scale a row; one number, or a
        mapping from bit width to number
    :param symmetric: symmetric codes without zero points. Below 4 bits they cost far more
        quality than the zero points cost bytes
    :param importance: what an output error costs. `fisher`: the squared gradient of the loss at
        each output channel, from a backward pass over a few batches; `block_influence`:
        1 - cosine similarity of a decoder layer's input and output, as in the paper; `uniform`;
        a mapping from names (a unit, a decoder layer, a module, a `re:` pattern) to positive
        numbers, 1 for units that no entry matches; or the path of a `sensitivity.json` that
        `casp sensitivity` wrote: errors are as with `fisher`, but what components cost at the
        fewest bits, alone and two together, is in the proportions of their importance there, by
        the method that follows (`gptq` for GPTQ and AutoRound, `awq`, else `uniform`)
    :param rounding: how the measured errors are made: `gptq`, one layer at a time on the second
        moments of its input, which take (columns x columns) floats for every layer; `nearest`; or
        `auto`: `gptq` unless the quantizer that follows rounds to nearest
    :param solver: `exact`: least sum of importance x measured rounding error, by a
        multiple-choice knapsack; `closed_form`: bits as near as the budget allows to the
        paper's b_l = B + 1/2 log2(s_l / geometric mean); not with `fisher`, which has no one
        number a layer
    :param granularity: `unit`: one width for each layer that vLLM fuses; `layer`: one for each
        decoder layer, as in the paper; `matrix`: one for each linear, which only a vLLM with this
        plugin runs
    :param share_layers: number of adjacent decoder layers that share their widths
    :param targets: layers to allocate bits to, in llm-compressor's matching syntax
    :param ignore: layers to leave unquantized although they match; by default the output head
    """

    average_bits: float | dict[str, float]
    component_weights: dict[str, float] = Field(default_factory=dict)
    candidates: list[int] = Field(default_factory=lambda: [2, 3, 4], min_length=1)
    group_size: int | dict[int, int] = 128
    symmetric: bool = False
    importance: Literal["fisher", "block_influence", "uniform"] | dict[str, float] | str = "fisher"
    rounding: Literal["auto", "gptq", "nearest"] = "auto"
    solver: Literal["exact", "closed_form"] = "exact"
    granularity: Literal["unit", "layer", "matrix"] = "unit"
    share_layers: int = Field(default=1, ge=1)
    targets: list[str] = Field(default_factory=lambda: ["Linear"])
    ignore: list[str] = Field(default_factory=lambda: [OUTPUT_HEAD])

    _latents: list[Latent] = PrivateAttr(default_factory=list)
    _rank_multiple: int = PrivateAttr(default=1)
    _waits_for: frozenset[str] = PrivateAttr(default=frozenset())
    _study: Sensitivity | None = PrivateAttr(default=None)
    _unseen: list[str] = PrivateAttr(default_factory=list)

    @field_validator("targets", mode="before")
    @classmethod
    def _one_target(cls, value: str | list[str]) -> list[str]:
        return [value] if isinstance(value, str) else value

    @field_validator("average_bits", "component_weights")
    @classmethod
    def _positive(cls, value: float | dict[str, float]) -> float | dict[str, float]:
        for number in value.values() if isinstance(value, dict) else [value]:
            if not (number > 0 and np.isfinite(number)):
                raise ValueError(f"must be positive, got {value}")
        return value

    @field_validator("candidates")
    @classmethod
    def _valid_candidates(cls, value: list[int]) -> list[int]:
        wrong = [bits for bits in value if not 2 <= bits <= 8]
        if wrong:
            raise ValueError(f"candidates must lie in 2..8 bits, got {wrong}")
        return sorted(set(value))

    @field_validator("importance")
    @classmethod
    def _positive_importance(cls, value: str | dict[str, float]) -> str | dict[str, float]:
        if isinstance(value, dict):
            wrong = {k: v for k, v in value.items() if not (v > 0 and np.isfinite(v))}
            if wrong or not value:
                raise ValueError(f"importance needs positive numbers, got {wrong or 'no entry'}")
        return value

    @model_validator(mode="after")
    def _sizes_for_candidates(self) -> "BitAllocationModifier":
        sizes = self.group_size
        if isinstance(sizes, dict):
            missing = set(self.candidates) - set(sizes)
            if missing:
                raise ValueError(f"group_size has no entry for candidates {sorted(missing)}")
        given = sizes.values() if isinstance(sizes, dict) else [sizes]
        wrong = [size for size in given if size < 1 and size != -1]
        if wrong:
            raise ValueError(f"group_size must be positive, or -1 for one a row; got {wrong}")
        return self

    @model_validator(mode="after")
    def _budgets_name_components(self) -> "BitAllocationModifier":
        budgets = self.average_bits
        if isinstance(budgets, dict):
            if "components" not in self.model_fields_set:
                self.components = list(budgets)
            if set(budgets) != set(self.components):
                raise ValueError(
                    f"average_bits has budgets for {list(budgets)}, components are "
                    f"{self.components}: they must agree"
                )
        unknown = set(self.component_weights) - set(self.components)
        if unknown:
            raise ValueError(
                f"component_weights: {sorted(unknown)} are not among the components "
                f"{self.components}"
            )
        return self

    @model_validator(mode="after")
    def _reads_study(self) -> "BitAllocationModifier":
        known = ("fisher", "block_influence", "uniform")
        if isinstance(self.importance, str) and self.importance not in known:
            if not self.importance.endswith(".json"):
                raise ValueError(
                    f"importance must be one of {', '.join(known)}, a mapping, or a .json file of "
                    f"casp sensitivity, got {self.importance!r}"
                )
            self._study = Sensitivity.load(self.importance)
            if isinstance(self.average_bits, dict):
                raise ValueError(
                    "importance from a study divides one budget among components: average_bits "
                    "must be one number"
                )
            if self.component_weights:
                raise ValueError(
                    "importance from a study weighs components: leave out component_weights"
                )
        return self

    @model_validator(mode="after")
    def _closed_form_needs_numbers(self) -> "BitAllocationModifier":
        if self.solver == "closed_form" and self._fisher:
            raise ValueError(
                "solver closed_form needs one importance a layer: use block_influence, uniform or "
                "a mapping; fisher goes with solver exact, and so does a study"
            )
        return self

    @property
    def _fisher(self) -> bool:
        """Whether squared gradients weigh the errors."""
        return self.importance == "fisher" or self._study is not None

    @property
    def group_sizes(self) -> list[int]:
        """Every group size in use; ranks of low-rank factors must be multiples of them."""
        return [size for size in map(self._group_size, self.candidates) if size > 0]

    def _group_size(self, bits: int) -> int:
        return self.group_size[bits] if isinstance(self.group_size, dict) else self.group_size

    def on_finalize(self, state: State, **kwargs) -> bool:
        round_unseen(state.model, self._unseen)
        return super().on_finalize(state, **kwargs)

    def request(self, model: nn.Module, following: list[Modifier]) -> Request:
        measured = self.solver == "exact"
        matched = self._matched(model)
        linears = frozenset(matched)
        none = frozenset()
        squares = frozenset((name, self.input_block(name, m)) for name, m in matched.items())
        by_gptq = self._by_gptq(find_quantizer(following, matched))
        fisher, influenced = self._fisher, self.importance == "block_influence"
        return Request(
            second_moments=linears if measured and by_gptq else none,
            mean_squares=squares if measured and not by_gptq else none,
            energies=linears if measured and not fisher else none,
            influences=frozenset(decoder_layers(model)) if influenced else none,
            gradients=linears if fisher else none,
            routed=linears if measured else none,
        )

    def note(
        self,
        model: nn.Module,
        statistics: Statistics,
        measured: Measured,
        following: list[Modifier],
    ) -> None:
        matched = self._matched(model)
        reached = {name: each for name, each in matched.items() if name in statistics.reached}
        if self.solver == "exact":
            later = statistics.of(self._waits_for & reached.keys())
            measured.statistics |= replace(later, gradient_moments={}, attention_moments={})
            known = {name: each for name, each in reached.items() if name not in self._waits_for}
            quantizer = find_quantizer(following, matched)
            measured.units += self._priced(known, quantizer, statistics)
        self._latents, self._waits_for = [], frozenset()

    def prepare(
        self,
        model: nn.Module,
        plan: CompressionPlan,
        measured: Measured | None,
        following: list[Modifier],
    ) -> None:
        plan.settings[type(self).__name__] = self.settings
        plan.average_bits = self.average_bits
        linears = self._matched(model)
        self._check_latents(linears)
        quantizer = find_quantizer(following, linears)
        layers = decoder_layers(model)
        if tunes_layers(quantizer):
            self._check_tuned(linears, layers)
        statistics = None if measured is None else measured.statistics
        priced = [] if measured is None else measured.units
        known = {name for unit in priced for name in unit.modules}
        rest = {name: each for name, each in linears.items() if name not in known}
        priced = priced + self._priced(rest, quantizer, statistics)
        plan.units = self._units(linears, layers, priced, statistics)
        plan.other_bytes = _other_bytes(model, plan, self._transforms, self._beside)
        self._check_budget(plan)
        self._warn(model, plan, linears, statistics)
        self._choose(plan, self._coupled(model, plan, following))
        if plan.decided and measured is not None:
            self._factor(model, plan)
            give_schemes(self, plan, self._schemes(quantizer), quantizer)
            known = linears if self._reached is None else self._reached
            self._unseen = [name for name in linears if name not in known]
        point_awq(self, model, following)
        self._latents = []  # the quantizer that follows needs the memory

    def without_data(self) -> "BitAllocationModifier":
        """Return the same modifier with bits spread evenly."""
        made = self.model_copy(update={"importance": "uniform", "solver": "closed_form"}, deep=True)
        made._study = None
        return made

    def note_facts(self, model: nn.Module, following: list[Modifier]) -> dict[str, Any]:
        quantizer = find_quantizer(following, self._matched(model))
        chosen_later = ("average_bits", "component_weights")
        kept = {k: v for k, v in self.settings.items() if k not in chosen_later}
        return {
            "settings": kept | ({"importance": "fisher"} if self._study else {}),
            "quantizer": [type(quantizer).__name__, observer_of(quantizer)],
            "transforms": self._transforms and self._transforms.model_dump(mode="json"),
        }

    def _priced(
        self,
        linears: dict[str, nn.Linear | LowRankLinear],
        quantizer: QuantizationMixin,
        statistics: Statistics | None,
    ) -> list[UnitPlan]:
        """Single linears, or those of one latent, with all candidates; nothing chosen yet."""
        measured = statistics is not None and self.solver == "exact"
        pricing = Pricing(
            self._schemes(quantizer),
            statistics if measured else None,
            fisher=self._fisher,
            by_gptq=self._by_gptq(quantizer),
            input_block=self.input_block,
            rank_multiple=self._rank_multiple,
        )
        latents = {name: latent for latent in self._latents for name in latent.linears}
        groups = dict.fromkeys(
            tuple(latents[name].linears) if name in latents else (name,) for name in linears
        )
        progress = tqdm(
            groups, desc="Measuring rounding errors", disable=not (measured and groups), leave=False
        )
        found = [
            pricing.layers({name: linears[name] for name in names}, latents.get(names[0]))
            for names in progress
        ]
        pricing.finish()
        return found

    def _units(
        self,
        linears: dict[str, nn.Linear | LowRankLinear],
        layers: list[str],
        priced: list[UnitPlan],
        statistics: Statistics | None,
    ) -> list[UnitPlan]:
        """Layers that were priced apart, put together to units; nothing chosen yet."""
        together = [latent.linears for latent in self._latents]
        units = find_units(linears, layers, self.granularity, self.share_layers, together)
        of = {part.name: part for part in priced}
        found = []
        for unit, importance in zip(
            units, self._importances(units, layers, statistics), strict=True
        ):
            parts = [of[name] for name in unit.modules if name in of]
            made = joined(unit.name, parts)
            made.component = self.component_of(unit.modules[0])
            made.importance = importance
            found.append(made)
        return found

    def consider(self, latents: list[Latent], rank_multiple: int | None) -> None:
        """Take over the choice between dense layers and factors.

        :param latents: what may be factored, of the model that `note` or `prepare` will see
        :param rank_multiple: ranks are multiples of this; None for the largest group size
        """
        self._latents = latents
        self._rank_multiple = rank_multiple or max(self.group_sizes, default=RANK_MULTIPLE)

    def wait_for(self, names: Iterable[str]) -> None:
        """Leave linears unpriced until all layers were seen: what becomes of them hangs on it."""
        self._waits_for |= frozenset(names)

    def _matched(self, model: nn.Module) -> dict[str, nn.Linear | LowRankLinear]:
        field = f"{type(self).__name__}.targets"
        return self.in_components(matched_linears(model, self.targets, self.ignore, field))

    def _by_gptq(self, quantizer: QuantizationMixin) -> bool:
        """Whether errors are measured with GPTQ."""
        if self.rounding == "auto":
            return not rounds_to_nearest(quantizer)
        return self.rounding == "gptq"

    def _schemes(self, quantizer: QuantizationMixin) -> dict[int, QuantizationArgs]:
        """Weight scheme of each candidate, with the observer that the quantizer asks for."""
        observer = observer_of(quantizer)
        return {
            bits: weight_args(bits, self._group_size(bits), self.symmetric, observer)
            for bits in self.candidates
        }

    def _importances(
        self, units: list[Unit], layers: list[str], statistics: Statistics | None
    ) -> list[float | None]:
        weights = [self.component_weights.get(self.component_of(u.modules[0]), 1.0) for u in units]
        if self._fisher or self.importance == "uniform":  # fisher weighs the errors themselves
            return weights
        if self.importance == "block_influence":
            if statistics is None:
                return [None] * len(units)
            return [
                weight * _mean_influence(unit, statistics.influences)
                for unit, weight in zip(units, weights, strict=True)
            ]
        used = set()
        importances = []
        for unit, weight in zip(units, weights, strict=True):
            names = {unit.name, *unit.modules}
            names |= {layer for layer in layers for m in unit.modules if m.startswith(f"{layer}.")}
            key = next((k for k in self.importance if any(match_name(n, k) for n in names)), None)
            used.add(key)
            importances.append(weight * (self.importance[key] if key is not None else 1.0))
        unused = [key for key in self.importance if key not in used]
        if unused:
            known = ", ".join(unit.name for unit in units[:4])
            raise ValueError(
                f"BitAllocationModifier.importance: {unused} match no unit; units are {known}, ..."
            )
        return importances

    def _check_latents(self, linears: dict[str, nn.Module]) -> None:
        """Whether the choice of ranks that was left to this modifier can be made."""
        if not self._latents:
            return
        for field, valid in (("solver", "exact"), ("share_layers", 1)):
            if getattr(self, field) != valid:
                raise ValueError(
                    f"BitAllocationModifier.{field}: LowRankQKModifier with keep: auto needs "
                    f"{valid}, got {getattr(self, field)}"
                )
        if self.granularity == "layer":
            raise ValueError(
                "BitAllocationModifier.granularity: LowRankQKModifier with keep: auto needs unit "
                "or matrix, got layer"
            )
        missing = [n for latent in self._latents for n in latent.linears if n not in linears]
        if missing:
            raise ValueError(
                f"BitAllocationModifier.ignore: {missing[0]} gets no bits, so LowRankQKModifier "
                "with keep: auto cannot choose its rank: leave it out of both, or set keep to a "
                "number"
            )

    def _factor(self, model: nn.Module, plan: CompressionPlan) -> None:
        """Make the factors that were chosen."""
        latents = {next(iter(latent.linears)): latent for latent in self._latents}
        for unit in plan.units:
            names = list(unit.modules)
            latent = latents.get(names[0])
            if latent is not None:
                rank = unit.choice.rank
                install(
                    self, model, plan, latent, rank, None if rank else "dense is the better choice"
                )
                unit.modules = stored_shapes({name: model.get_submodule(name) for name in names})

    def _check_tuned(self, linears: dict[str, nn.Module], layers: list[str]) -> None:
        """AutoRound tunes decoder layers; others would keep the scales they were initialized with.
        Layers of a vision tower run inside code that llm-compressor cannot trace."""
        for name in linears:
            inside = any(name.startswith(f"{layer}.") for layer in layers)
            if not inside or self.component_of(name) != LANGUAGE:
                raise ValueError(
                    f"AutoRoundModifier tunes the decoder layers of the language model only, not "
                    f"{name}: put it into BitAllocationModifier.ignore, leave its component out, "
                    "or use GPTQModifier"
                )

    def _check_budget(self, plan: CompressionPlan) -> None:
        for budget in plan.budgets:
            least, most = budget.reachable_bits
            if not least <= budget.average_bits <= most + TOLERANCE:
                of = f" of {budget.component}" if budget.component else ""
                raise ValueError(
                    f"BitAllocationModifier.average_bits{of}: {budget.average_bits} cannot be "
                    f"reached; candidates {self.candidates} with group size {self.group_size} "
                    f"reach {least:.4f} to {most:.4f}"
                )

    def _warn(
        self,
        model: nn.Module,
        plan: CompressionPlan,
        linears: dict[str, nn.Linear | LowRankLinear],
        statistics: Statistics | None,
    ) -> None:
        """What a user should know: widths without a kernel, layers without data."""
        candidates = [c for unit in plan.units for c in unit.candidates if c.needs]
        for package in sorted({c.needs for c in candidates}):
            bits = sorted({c.bits for c in candidates if c.needs == package})
            codes = "symmetric" if self.symmetric else "asymmetric"
            plan.warnings.append(
                f"vLLM on CUDA runs {codes} {' and '.join(map(str, bits))} bits only with an extra "
                f"package: pip install {package}"
            )
        others = {
            f"{name}.{weight}": values.numel()
            for name, module in model.named_modules()
            for weight, values in module.named_parameters(recurse=False)
            if values.ndim > 1
            and not isinstance(module, nn.Linear | nn.Embedding | LowRankLinear | _ConvNd)
        }
        if sum(others.values()) > NOTED_SHARE * sum(each.numel() for each in model.parameters()):
            plan.warnings.append(
                f"{len(others)} matrices stay as they are, since they are no linear layers: "
                f"{', '.join(sorted(others, key=others.get, reverse=True)[:4])}"
            )
        if statistics is not None and self.solver == "exact":
            routed = statistics.routed
            dead = [n for n in linears if n not in statistics.reached or routed.get(n) == 0]
            self._refuse_dead(linears, dead)
            if dead:
                plan.warnings.append(
                    f"no calibration token reached {len(dead)} layers, they count as free of "
                    f"error: {', '.join(dead[:4])}"
                )

    def check_reached(self, model: nn.Module) -> None:
        linears = self._matched(model)
        self._refuse_dead(linears, [name for name in linears if name not in self._reached])

    def _refuse_dead(self, linears: Iterable[str], dead: list[str]) -> None:
        """
        :raises ValueError: if no token reaches a component
        """
        for component in {self.component_of(name): None for name in dead}:
            if all(n in dead for n in linears if self.component_of(n) == component):
                raise ValueError(
                    f"BitAllocationModifier.components: no calibration token reached "
                    f"{component!r}: calibrate on data that does, images for one that sees, or "
                    "leave it out"
                )

    def _coupled(
        self, model: nn.Module, plan: CompressionPlan, following: list[Modifier]
    ) -> Coupled | None:
        """How a study lets groups of units share the budget; None without one."""
        if self._study is None:
            return None
        if self._study.axis == "component":
            groups = [unit.component for unit in plan.units]
        else:
            names = [next(iter(unit.modules)) for unit in plan.units]
            parts = find_parts(model, names, self._patterns)
            outside = [name for name in names if parts[name].block is None]
            if outside:
                raise ValueError(
                    f"BitAllocationModifier.importance: {self.importance} tells blocks apart, and "
                    f"{outside[0]} lies in none: put it into ignore"
                )
            groups = [parts[name].block for name in names]
        if len(set(groups)) == 1:
            raise ValueError(
                f"BitAllocationModifier.importance: {self.importance} tells {self._study.axis}s "
                f"apart, and all layers are of one, {groups[0]}: list more in components"
            )
        method = method_of(following)
        try:
            shares = self._study.of_method(method, list(dict.fromkeys(groups)))
        except ValueError as error:
            raise ValueError(f"BitAllocationModifier.importance: {error}") from None
        return Coupled(groups, shares.parts, shares.pairs)

    def _choose(self, plan: CompressionPlan, coupled: Coupled | None) -> None:
        """Pick a candidate for every unit, unless what it takes is still unknown."""
        if any(unit.importance is None for unit in plan.units):
            return
        measured = self.solver == "exact"
        if measured and any(c.error is None for unit in plan.units for c in unit.candidates):
            return
        for budget in plan.budgets:
            units = budget.units
            bytes_ = [[c.bytes for c in unit.candidates] for unit in units]
            most = int(budget.average_bits * budget.weights / 8)
            if measured:
                costs = [[u.importance * c.error for c in u.candidates] for u in units]
            else:
                costs = _closed_form_costs(units, most)
            if coupled is not None:
                frontier, chosen = coupled.solve(costs, bytes_, most, PARETO_POINTS)
            else:
                frontier = pareto(costs, bytes_, PARETO_POINTS) if measured else []
                slack = int(TOLERANCE * budget.weights / 8)
                chosen = choose(costs, bytes_, most, slack=slack)
            plan.pareto += [
                ParetoPoint(
                    component=budget.component,
                    average_bits=taken * 8 / budget.weights,
                    error=cost,
                )
                for taken, cost in frontier
            ]
            for unit, index in zip(units, shared(chosen), strict=True):
                unit.chosen = index


def _mean_influence(unit: Unit, influences: dict[str, float]) -> float:
    """Mean block influence of the decoder layers that hold a unit's modules.

    A layer that changes nothing still counts a little, so that ratios stay finite."""
    found = [
        max(value, 1e-6)
        for module in unit.modules
        for layer, value in influences.items()
        if module.startswith(f"{layer}.")
    ]
    return float(np.mean(found)) if found else float(np.mean(list(influences.values())))


def _closed_form_costs(units: list[UnitPlan], budget: int) -> list[list[float]]:
    """Distance of each candidate from the paper's closed form, scales counted in the budget."""
    sizes = [sum(rows * columns for rows, columns in u.modules.values()) for u in units]
    overhead = sum(
        u.candidates[0].bytes * 8 - u.candidates[0].bits * n
        for u, n in zip(units, sizes, strict=True)
    )
    code_bits = (budget * 8 - overhead) / sum(sizes)
    wishes = closed_form_bits([unit.importance for unit in units], code_bits, sizes)
    return distance_costs(wishes, [[c.bits for c in u.candidates] for u in units], sizes)


def _other_bytes(
    model: nn.Module,
    plan: CompressionPlan,
    transforms: TransformConfig | None,
    beside: list[QuantizationConfig],
) -> int:
    """Bytes of all tensors that a checkpoint stores beside the units' weights.

    :param beside: what other quantizers of the recipe do
    """
    units = {name for unit in plan.units for name in unit.modules}
    tied = getattr(model, "all_tied_weights_keys", {})
    stored = stored_tensors(model) | stored_transforms(transforms, model)
    found = {name: each.numel() * each.dtype.itemsize for name, each in stored.items()}
    for name, module in model.named_modules():
        scheme = None if name in units else _scheme_beside(name, module, beside)
        if scheme is not None:
            weight = f"{name}.weight"
            for one, other in tied.items():  # llm-compressor unties them
                if weight == other:
                    found[one] = module.weight.numel() * module.weight.dtype.itemsize
            found[weight] = quantized_bytes(module, scheme)
    weights = {f"{name}.weight" for name in units}
    built = sum(size for name, size in found.items() if name not in weights)
    return built + sum(each.bytes for each in plan.copied)


def _scheme_beside(
    name: str, module: nn.Module, beside: list[QuantizationConfig]
) -> QuantizationScheme | None:
    """What another quantizer than the plan's does to a layer; the last one counts."""
    if not isinstance(module, nn.Linear | nn.Embedding):
        return None
    schemes = [
        scheme
        for config in beside
        for scheme in config.config_groups.values()
        if is_match(name, module, scheme.targets, config.ignore or ())
    ]
    return schemes[-1] if schemes else None

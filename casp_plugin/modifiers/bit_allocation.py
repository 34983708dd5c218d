"""BitAllocationModifier: each unit gets the bit width that its importance earns."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from llmcompressor.core import State
from pydantic import Field, PrivateAttr, field_validator, model_validator
from torch import nn
from tqdm import tqdm

from casp_plugin.maths.coupled_knapsack import Coupled
from casp_plugin.model.low_rank_linear import LowRankLinear
from casp_plugin.model.schemes import WeightScheme, weight_args
from casp_plugin.model.units import OUTPUT_HEAD, Unit, decoder_layers, find_units, matched_linears
from casp_plugin.modifiers.allocation_checks import (
    check_components_reached,
    check_tuned,
    kernel_warnings,
    other_matrices_warnings,
)
from casp_plugin.modifiers.awq import point_awq
from casp_plugin.modifiers.base import Offers, RecipeContext, Targets
from casp_plugin.modifiers.choice import (
    TOLERANCE,
    choose_candidates,
    couple_by_study,
    influence_importances,
    named_importances,
)
from casp_plugin.modifiers.codebook import CodebookModifier
from casp_plugin.modifiers.factoring import install
from casp_plugin.modifiers.lifecycle import OneshotModifier
from casp_plugin.modifiers.quantizer import (
    Quantizer,
    facts_of,
    find_quantizer,
    give_schemes,
    method_of,
    observer_of,
    round_unseen,
    rounds_to_nearest,
    tunes_layers,
)
from casp_plugin.plan.plan import CompressionPlan, UnitPlan
from casp_plugin.plan.sensitivity_file import Sensitivity
from casp_plugin.pricing.candidates import Pricing, join_units, stored_shapes
from casp_plugin.pricing.other_bytes import other_bytes
from casp_plugin.pricing.rounding_error import Rounding
from casp_plugin.statistics.layer_notes import LayerNotes
from casp_plugin.statistics.statistics import Request, Statistics

__all__ = ["BitAllocationModifier"]

#: ranks are multiples of this where no group size asks for more
RANK_MULTIPLE = 64

Linears = dict[str, nn.Linear | LowRankLinear]


class BitAllocationModifier(OneshotModifier):
    """
    Gives every unit of the model a bit width of its own, so that the average meets a budget: phase
    2 of CASP (CVPR 2025, https://arxiv.org/abs/2503.05936). The quantizing modifier that follows in
    the recipe, left without a config of its own, runs at these widths.

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
    low-rank factors, shapes; not biases) over the number of their original weights: bits that low
    rank saves are spent elsewhere.

    Lifecycle:

    - on_initialize
        - measure importances and rounding errors (once for all casp modifiers)
        - choose ranks and widths
        - write config groups into the quantizing modifier that follows

    :param average_bits: the budget; the plan stays at or below it, within 0.01 of the best that
        the candidates can reach. One number for all `components` together, or a mapping from
        component to a budget of its own
    :param component_weights: factors on the importance of whole components, 1 where not given
    :param candidates: bit widths on offer, 2 to 8; 1 to 8 with TrellisModifier
    :param group_size: columns that share a scale, -1 for one scale a row; one number, or a
        mapping from bit width to number
    :param symmetric: symmetric codes without zero points. Below 4 bits they cost far more
        quality than the zero points cost bytes
    :param importance: cost of an output error. `fisher`: the squared gradient of the loss at
        each output channel, from a backward pass over a few batches; `block_influence`:
        1 - cosine similarity of a decoder layer's input and output, as in the paper; `uniform`;
        a mapping from names (a unit, a decoder layer, a module, a `re:` pattern) to positive
        numbers, 1 for units that no entry matches; or the path of a `sensitivity.json` that
        `casp sensitivity` wrote: errors are as with `fisher`, but the costs of components at the
        fewest bits, alone and two together, have the proportions of their importance there, by
        the method that follows (`gptq` for GPTQ and AutoRound, `awq`, else `uniform`)
    :param rounding: rounding whose errors count: `first_order`, what GPTQ leaves to first order,
        from the errors of rounding to nearest and the second moments of inputs (columns x columns
        floats, one layer at a time); `gptq`, every candidate rounded by GPTQ, which takes about as
        long as quantizing; `nearest`; or `auto`: `first_order` unless the quantizer that follows
        rounds to nearest
    :param solver: `exact`: least sum of importance x rounding error, by a multiple-choice
        knapsack; `closed_form`: bits as near as the budget allows to the
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
    rounding: Rounding | Literal["auto"] = "auto"
    solver: Literal["exact", "closed_form"] = "exact"
    granularity: Literal["unit", "layer", "matrix"] = "unit"
    share_layers: int = Field(default=1, ge=1)
    targets: Targets = Field(default_factory=lambda: ["Linear"])
    ignore: list[str] = Field(default_factory=lambda: [OUTPUT_HEAD])

    _study: Sensitivity | None = PrivateAttr(default=None)

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
        wrong = [bits for bits in value if not 1 <= bits <= 8]
        if wrong:
            raise ValueError(f"candidates must lie in 1..8 bits, got {wrong}")
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
        """Tell whether squared gradients weigh the errors."""
        return self.importance == "fisher" or self._study is not None

    @property
    def group_sizes(self) -> list[int]:
        """Return every group size in use; ranks of low-rank factors must be multiples of them."""
        return [size for size in map(self._group_size, self.candidates) if size > 0]

    def _group_size(self, bits: int) -> int:
        return self.group_size[bits] if isinstance(self.group_size, dict) else self.group_size

    def on_finalize(self, state: State, **kwargs) -> bool:
        """Give layers that no token reached scales of their own range."""
        run = getattr(state, "casp_run", None)
        if run is not None and run.context.reached is not None:
            factored = {entry.module for entry in run.plan.low_rank if entry.rank}
            weights = [name for unit in run.plan.units for name in unit.modules]
            dense = [name for name in weights if name.rpartition(".")[0] not in factored]
            round_unseen(state.model, [n for n in dense if n not in run.context.reached])
        return super().on_finalize(state, **kwargs)

    def request(self, model: nn.Module, context: RecipeContext) -> Request:
        exact = self.solver == "exact"
        matched = self._matched(model, context)
        linears = frozenset(matched)
        none = frozenset()
        squares = frozenset((n, context.input_block(n, m)) for n, m in matched.items())
        quantizer = find_quantizer(context.following(self), matched)
        nearest = self._resolved_rounding(quantizer) == "nearest"
        fisher, influenced = self._fisher, self.importance == "block_influence"
        return Request(
            second_moments=linears if exact and not nearest else none,
            mean_squares=squares if exact and nearest else none,
            energies=linears if exact and not fisher else none,
            influences=frozenset(decoder_layers(model)) if influenced else none,
            gradients=linears if fisher else none,
            routed=linears if exact else none,
        )

    def chosen_linears(self, model: nn.Module, context: RecipeContext) -> Iterable[str]:
        return self._matched(model, context)

    def check_reached(self, model: nn.Module, context: RecipeContext) -> None:
        linears = self._matched(model, context)
        unreached = [name for name in linears if name not in context.reached]
        check_components_reached(linears, unreached, context)

    def note(
        self,
        model: nn.Module,
        statistics: Statistics,
        notes: LayerNotes,
        offers: Offers,
        context: RecipeContext,
    ) -> None:
        if self.solver != "exact":
            return
        matched = self._matched(model, context)
        reached = {n: linear for n, linear in matched.items() if n in statistics.reached}
        later = statistics.of(offers.pending & reached.keys())
        notes.statistics |= replace(later, gradient_moments={}, attention_moments={})
        ready = {n: linear for n, linear in reached.items() if n not in offers.pending}
        notes.priced += self._priced(ready, offers, statistics, context)

    def prepare(
        self,
        model: nn.Module,
        plan: CompressionPlan,
        notes: LayerNotes | None,
        offers: Offers,
        context: RecipeContext,
    ) -> None:
        plan.settings[context.name_of(self)] = self.settings
        plan.average_bits = self.average_bits
        linears = self._matched(model, context)
        self._check_offers(offers, linears)
        following = context.following(self)
        quantizer = find_quantizer(following, linears)
        layers = decoder_layers(model)
        if tunes_layers(quantizer):
            check_tuned(linears, layers, context)
        statistics = None if notes is None else notes.statistics
        priced = [] if notes is None else notes.priced
        known = {name for unit in priced for name in unit.modules}
        rest = {n: linear for n, linear in linears.items() if n not in known}
        priced = priced + self._priced(rest, offers, statistics, context)
        plan.units = self._units(linears, layers, priced, offers, statistics, context)
        plan.other_bytes = other_bytes(model, plan, context.transforms, context.other_quantizers)
        self._check_budget(plan)
        plan.warnings += kernel_warnings(plan, self.symmetric)
        plan.warnings += other_matrices_warnings(model)
        self._check_data(plan, linears, statistics, context)
        choose_candidates(plan, self.solver == "closed_form", self._coupled(model, plan, context))
        if plan.decided and notes is not None:
            self._factor(model, plan, offers, context)
            if not isinstance(quantizer, CodebookModifier):  # which reads the plan
                give_schemes(self, plan, self._schemes(quantizer), quantizer)
        point_awq(self, model, context)

    def without_data(self) -> "BitAllocationModifier":
        """Return the same modifier with bits spread evenly."""
        changed = {"importance": "uniform", "solver": "closed_form"}
        spread_evenly = self.model_copy(update=changed, deep=True)
        spread_evenly._study = None
        return spread_evenly

    def note_facts(self, model: nn.Module, context: RecipeContext) -> dict[str, Any]:
        quantizer = find_quantizer(context.following(self), self._matched(model, context))
        chosen_later = ("average_bits", "component_weights")
        kept = {k: v for k, v in self.settings.items() if k not in chosen_later}
        return {
            "settings": kept | ({"importance": "fisher"} if self._study else {}),
            "quantizer": [type(quantizer).__name__, facts_of(quantizer)],
            "transforms": context.transforms and context.transforms.model_dump(mode="json"),
        }

    def _priced(
        self,
        linears: Linears,
        offers: Offers,
        statistics: Statistics | None,
        context: RecipeContext,
    ) -> list[UnitPlan]:
        """Return single linears, or those of one latent, with all candidates; nothing chosen."""
        exact = statistics is not None and self.solver == "exact"
        quantizer = find_quantizer(context.following(self), linears)
        pricing = Pricing(
            self._schemes(quantizer),
            statistics if exact else None,
            fisher=self._fisher,
            rounding=self._resolved_rounding(quantizer),
            input_block=context.input_block,
            rank_multiple=offers.rank_multiple or max(self.group_sizes, default=RANK_MULTIPLE),
        )
        latent_of = {name: latent for latent in offers.latents for name in latent.linears}
        groups = dict.fromkeys(
            tuple(latent_of[name].linears) if name in latent_of else (name,) for name in linears
        )
        progress = tqdm(
            groups, desc="Measuring rounding errors", disable=not (exact and groups), leave=False
        )
        priced = [
            pricing.layers({name: linears[name] for name in names}, latent_of.get(names[0]))
            for names in progress
        ]
        pricing.finish()
        return priced

    def _units(
        self,
        linears: Linears,
        layers: list[str],
        priced: list[UnitPlan],
        offers: Offers,
        statistics: Statistics | None,
        context: RecipeContext,
    ) -> list[UnitPlan]:
        """Put layers that were priced apart together to units; nothing chosen."""
        together = [latent.linears for latent in offers.latents]
        units = find_units(linears, layers, self.granularity, self.share_layers, together)
        importances = self._importances(units, layers, statistics)
        price_of = {unit.name: unit for unit in priced}
        plans = []
        for index, unit in enumerate(units):
            made = join_units(
                unit.name, [price_of[name] for name in unit.modules if name in price_of]
            )
            made.component = context.component_of(unit.modules[0])
            if importances is not None:
                weight = self.component_weights.get(made.component, 1.0)
                made.importance = weight * importances[index]
            plans.append(made)
        return plans

    def _matched(self, model: nn.Module, context: RecipeContext) -> Linears:
        field = f"{type(self).__name__}.targets"
        matched = matched_linears(model, self.targets, self.ignore, field)
        return self.in_components(matched, context)

    def _resolved_rounding(self, quantizer: Quantizer) -> Rounding:
        """Return the rounding whose errors count.

        :raises ValueError: if it is not that of the quantizer
        """
        if isinstance(quantizer, CodebookModifier) and self.rounding not in ("auto", "first_order"):
            raise ValueError(
                f"BitAllocationModifier.rounding: the errors of {type(quantizer).__name__} are "
                f"those of its codec: set auto, got {self.rounding}"
            )
        if self.rounding == "auto":
            return "nearest" if rounds_to_nearest(quantizer) else "first_order"
        return self.rounding

    def _schemes(self, quantizer: Quantizer) -> dict[int, WeightScheme]:
        """Return the weight scheme of every width, with the quantizer's observer or codec.

        :raises ValueError: if the quantizer has no such width
        """
        if isinstance(quantizer, CodebookModifier):
            return {bits: quantizer.scheme(bits) for bits in self.candidates}
        if self.candidates[0] < 2:
            raise ValueError(
                f"BitAllocationModifier.candidates: {type(quantizer).__name__} has no weights of "
                f"{self.candidates[0]} bit, the least are 2"
            )
        observer = observer_of(quantizer)
        return {
            bits: weight_args(bits, self._group_size(bits), self.symmetric, observer)
            for bits in self.candidates
        }

    def _importances(
        self, units: list[Unit], layers: list[str], statistics: Statistics | None
    ) -> list[float] | None:
        """Return the importance of every unit before ``component_weights``; None if unknown."""
        if self._fisher or self.importance == "uniform":  # fisher weighs the errors themselves
            return [1.0] * len(units)
        if self.importance == "block_influence":
            if statistics is None:
                return None
            return influence_importances(units, statistics.influences)
        return named_importances(units, layers, self.importance)

    def _check_offers(self, offers: Offers, linears: Linears) -> None:
        """Check that this modifier can choose the ranks that were left to it.

        :raises ValueError: if it cannot
        """
        if not offers.latents:
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
        missing = [n for latent in offers.latents for n in latent.linears if n not in linears]
        if missing:
            raise ValueError(
                f"BitAllocationModifier.ignore: {missing[0]} gets no bits, so LowRankQKModifier "
                "with keep: auto cannot choose its rank: leave it out of both, or set keep to a "
                "number"
            )

    def _factor(
        self, model: nn.Module, plan: CompressionPlan, offers: Offers, context: RecipeContext
    ) -> None:
        """Make the factors that were chosen."""
        first = {next(iter(latent.linears)): latent for latent in offers.latents}
        for unit in plan.units:
            names = list(unit.modules)
            latent = first.get(names[0])
            if latent is not None:
                rank = unit.choice.rank
                note = None if rank else "dense is the better choice"
                install(model, plan, context, latent, rank, note)
                unit.modules = stored_shapes({name: model.get_submodule(name) for name in names})

    def _coupled(
        self, model: nn.Module, plan: CompressionPlan, context: RecipeContext
    ) -> Coupled | None:
        """Return how a study lets groups of units share the budget; None without one."""
        if self._study is None:
            return None
        return couple_by_study(
            model,
            plan.units,
            self._study,
            method_of(context.following(self)),
            context.component_patterns,
            self.importance,
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

    def _check_data(
        self,
        plan: CompressionPlan,
        linears: Linears,
        statistics: Statistics | None,
        context: RecipeContext,
    ) -> None:
        """Warn of layers without data, whose errors are unknown.

        :raises ValueError: if no token reaches a component
        """
        if statistics is None or self.solver != "exact":
            return
        routed = statistics.routed
        unreached = [n for n in linears if n not in statistics.reached or routed.get(n) == 0]
        check_components_reached(linears, unreached, context)
        if unreached:
            plan.warnings.append(
                f"no calibration token reached {len(unreached)} layers, they count as free of "
                f"error: {', '.join(unreached[:4])}"
            )

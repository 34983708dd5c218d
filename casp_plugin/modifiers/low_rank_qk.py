"""LowRankQKModifier: W_q and W_k become data-aware low-rank products."""

from dataclasses import asdict
from typing import Literal

import torch
from compressed_tensors.utils import is_match, match_name
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationMixin
from pydantic import Field, field_validator
from torch import nn
from tqdm import tqdm

from casp_plugin.maths.low_rank import Spectrum, uniform_rank, whitened_spectrum
from casp_plugin.model.latent import Latent, global_ranks
from casp_plugin.model.low_rank_linear import named_linears
from casp_plugin.model.units import matched_linears, reading_together
from casp_plugin.modifiers.awq import point_awq
from casp_plugin.modifiers.base import Offers, RecipeContext, Targets
from casp_plugin.modifiers.bit_allocation import BitAllocationModifier
from casp_plugin.modifiers.factoring import install
from casp_plugin.modifiers.lifecycle import OneshotModifier
from casp_plugin.plan.plan import AttentionPlan, CompressionPlan, SpectrumPlan
from casp_plugin.statistics.layer_notes import LayerNotes
from casp_plugin.statistics.statistics import Request, Statistics
from casp_plugin.system.distributed import shared

__all__ = ["LowRankQKModifier"]

#: field of the statistics that tells a method how much the outputs matter
_METRICS = {"fisher": "gradient_moments", "attention": "attention_moments"}
#: ranks at which a plan records the lost energy
SPECTRUM_POINTS = 32
#: share of the parameters that factors keep without the data that would choose it
KEEP = 0.25
_FUSED_ON_DISK = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv")


class LowRankQKModifier(OneshotModifier):
    """
    Replaces W_q and W_k by low-rank products: phase 1 of CASP (CVPR 2025,
    https://arxiv.org/abs/2503.05936). Attention is sparse, above all over visual tokens, and
    sparsity bounds the error that compressing W_q and W_k causes.

    Sample yaml:

    ```yaml
    casp_stage:
      casp_modifiers:
        LowRankQKModifier: {}
        BitAllocationModifier:
          average_bits: 2.25
        GPTQModifier: {}
    ```

    Each W (out x in) becomes `LowRankLinear`: `down` (rank x in), then `up` (out x rank) with
    the original bias. W_q and W_k share one `down`. All are Linear layers, so any quantizer that
    follows treats them like the others. Matrices whose factors would not be smaller stay dense,
    and the plan says so.

    The paper's own way is `keep: 0.25`, `method: whitened`, `rank_allocation: uniform`,
    `share_latent: false`, `rotate: false`.

    Lifecycle:

    - on_initialize
        - collect the second moments of the layers' inputs and of the gradients at their outputs
          (once for all casp modifiers)
        - replace the modules; with `keep: auto` leave the choice to BitAllocationModifier
        - point a following AWQModifier at the factors

    :param keep: share of the parameters of W_q and W_k that their factors keep, in (0, 1); or
        `auto`: the BitAllocationModifier that follows chooses, layer by layer, between factors of
        every rank and dense layers, together with their bits
    :param ranks: explicit ranks instead of `keep`: one number for all, or a mapping from
        targets (names or `re:` patterns) to numbers
    :param targets: linear layers to factor, in llm-compressor's matching syntax
    :param ignore: layers to leave dense although they match
    :param method: objective of the factors. `fisher`: the expected loss, by the second
        moment of its gradient at the layers' outputs (a backward pass over a few sequences);
        `attention`: the output of the attention module, no backward pass through the model;
        `whitened`: the layer's own output; `svd`: the weight itself, without any data
    :param rank_allocation: `global`: the ranks that lose least in all, within `keep` of all
        parameters; `uniform`: `keep` in every layer
    :param share_latent: W_q and W_k of a layer share one `down`
    :param rotate: turn the latents by a random rotation, so that the factors round well
    :param rank_multiple: ranks are multiples of this. Defaults to the group size that the
        modifiers after this one use, because the rank is the column count of `up`
    :param dampening_frac: share of the mean diagonal added to the diagonals of the second moments
    """

    keep: float | Literal["auto"] = "auto"
    ranks: int | dict[str, int] | None = None
    targets: Targets = Field(default_factory=lambda: ["re:.*\\.q_proj$", "re:.*\\.k_proj$"])
    ignore: list[str] = Field(default_factory=list)
    method: Literal["svd", "whitened", "attention", "fisher"] = "fisher"
    rank_allocation: Literal["uniform", "global"] = "global"
    share_latent: bool = True
    rotate: bool = True
    rank_multiple: int | None = Field(default=None, ge=1)
    dampening_frac: float = Field(default=0.01, ge=0)

    @field_validator("keep")
    @classmethod
    def _valid_keep(cls, value: float | str) -> float | str:
        if value != "auto" and not 0 < value < 1:
            raise ValueError(f"keep must lie in (0, 1), or be auto; got {value}")
        return value

    @field_validator("ranks")
    @classmethod
    def _positive_ranks(cls, value: int | dict[str, int] | None) -> int | dict[str, int] | None:
        for rank in value.values() if isinstance(value, dict) else [value]:
            if rank is not None and rank < 1:
                raise ValueError(f"ranks must be positive, got {rank}")
        return value

    def without_data(self) -> "LowRankQKModifier":
        """Return the same modifier with factors of the weights alone, a quarter of every layer's
        parameters where the recipe leaves that to the data."""
        changed = {"method": "svd", "rank_allocation": "uniform"}
        changed |= {"keep": KEEP} if self.proposes else {}
        return self.model_copy(update=changed, deep=True)

    @property
    def proposes(self) -> bool:
        """Tell whether the ranks are left to BitAllocationModifier."""
        return self.keep == "auto" and self.ranks is None

    def request(self, model: nn.Module, context: RecipeContext) -> Request:
        linears = frozenset(self._matched(model, context))
        none = frozenset()
        # with bits chosen at once, the loss of a rank is measured on the same inputs, in the same
        # unit as the loss of bits
        chooser = _chooser(context.following(self))
        by_loss = self.proposes and chooser is not None and chooser.importance == "fisher"
        return Request(
            second_moments=linears if self.method != "svd" or self.proposes else none,
            gradient_moments=linears if self.method == "fisher" or by_loss else none,
            attention_moments=linears if self.method == "attention" else none,
            attention_maps=frozenset(name.rpartition(".")[0] for name in linears),
            reached=linears,
        )

    def check_reached(self, model: nn.Module, context: RecipeContext) -> None:
        for name in self._matched(model, context):
            if name not in context.reached:
                raise ValueError(f"LowRankQKModifier: no calibration token reached {name}")

    def note(
        self,
        model: nn.Module,
        statistics: Statistics,
        notes: LayerNotes,
        offers: Offers,
        context: RecipeContext,
    ) -> None:
        matched = self._matched(model, context)
        reached = {n: linear for n, linear in matched.items() if n in statistics.reached}
        groups = [part for group in self._groups(reached) for part in _by_input(group, statistics)]
        groups = [names for names in groups if self._moves(names, statistics)]
        latents = []
        for names in tqdm(groups, desc="Factoring W_q, W_k", leave=False):
            linears = {name: reached[name] for name in names}
            latent = Latent(linears, self._spectrum(linears, statistics), self.rotate)
            notes.spectra[tuple(names)] = latent.spectrum.truncated(latent.largest_rank)
            latents.append(latent)
        if self.proposes:
            offers.latents += latents
            offers.rank_multiple = self.rank_multiple
        else:
            offers.pending |= frozenset(reached)

    def prepare(
        self,
        model: nn.Module,
        plan: CompressionPlan,
        notes: LayerNotes | None,
        offers: Offers,
        context: RecipeContext,
    ) -> None:
        plan.settings[context.name_of(self)] = self.settings
        matched = self._matched(model, context)
        if notes is not None:
            self._check_notes(matched, notes)
            densities = notes.statistics.attention_densities
            modules = dict.fromkeys(name.rpartition(".")[0] for name in matched)
            plan.attention += [
                AttentionPlan(
                    module=name, component=context.component_of(name), **asdict(densities[name])
                )
                for name in modules
                if name in densities
            ]
        latents = self._latents(matched, notes)
        noted = {name for latent in latents for name in latent.linears}
        # the loss does not depend on the last layer of LLaVA's tower, for one
        left_out = [name for name in matched if name not in noted]
        if not latents:
            raise ValueError(
                "LowRankQKModifier: the loss of the calibration data depends on none of "
                f"{', '.join(left_out[:4])}"
            )
        if left_out:
            plan.warnings.append(
                f"LowRankQKModifier leaves {len(left_out)} layers dense, because the loss of the "
                f"calibration data does not depend on them: {', '.join(left_out[:4])}"
            )
        known = [latent for latent in latents if latent.spectrum is not None]
        plan.spectra += map(_spectrum_plan, known)
        following = context.following(self)
        if self.proposes:
            if _chooser(following) is None:
                raise ValueError(
                    "LowRankQKModifier.keep: auto leaves the ranks to a BitAllocationModifier, and "
                    "none follows in the recipe: add one, or set keep to a number such as 0.25"
                )
            offers.latents += latents
            offers.rank_multiple = self.rank_multiple
            return
        multiple = self.rank_multiple or _group_size(following)
        for latent, rank in zip(latents, self._ranks(latents, multiple), strict=True):
            note = None
            if rank is not None and (latent.kept(rank) >= 1 or rank > min(latent.shape)):
                rank, note = None, f"factors of rank {rank} would not be smaller"
            install(model, plan, context, latent, rank, note)
        point_awq(self, model, context)
        if self.ranks is None and plan.kept > 1.25 * self.keep:
            plan.warnings.append(
                f"LowRankQKModifier keeps {plan.kept:.3f} of the q/k parameters instead of "
                f"{self.keep}: ranks are multiples of {multiple} (rank_multiple)"
            )

    def _groups(self, linears: dict[str, nn.Linear]) -> list[list[str]]:
        """Return the names of linears that may share a latent, group by group."""
        return reading_together(linears) if self.share_latent else [[name] for name in linears]

    @staticmethod
    def _check_notes(matched: dict[str, nn.Linear], notes: LayerNotes) -> None:
        """Check that there are notes on all linears.

        :raises ValueError: if no token reached one
        """
        for name in matched:
            if name not in notes.statistics.reached:
                raise ValueError(f"LowRankQKModifier: no calibration token reached {name}")

    def _latents(self, matched: dict[str, nn.Linear], notes: LayerNotes | None) -> list[Latent]:
        """Return the layers that may be factored, with their spectra where notes are there."""
        groups: dict[tuple[str, ...], Spectrum | None]
        if notes is None:
            groups = dict.fromkeys(map(tuple, self._groups(matched)))
        else:
            first = {names[0]: names for names in notes.spectra}
            groups = {first[name]: notes.spectra[first[name]] for name in matched if name in first}
        return [
            Latent({name: matched[name] for name in names}, spectrum, self.rotate)
            for names, spectrum in groups.items()
        ]

    def _moves(self, names: list[str], statistics: Statistics) -> bool:
        """Tell whether the gradients at the outputs of some layers were measured."""
        if self.method not in _METRICS:
            return True
        metrics = getattr(statistics, _METRICS[self.method])
        return all(name in metrics for name in names)

    def _spectrum(self, linears: dict[str, nn.Linear], statistics: Statistics) -> Spectrum:
        """Return the spectrum of the stacked weights of one latent, whitened by the metrics."""
        weight = torch.cat([linear.weight for linear in linears.values()])  # (sum of out, in)
        moment = metric = None
        if self.method != "svd":
            moment = statistics.second_moments[next(iter(linears))]  # (in, in)
        if self.method in _METRICS:
            by_name = getattr(statistics, _METRICS[self.method])
            metric = [by_name[name].to(weight.device) for name in linears]  # (out, out) each
        try:
            return whitened_spectrum(weight, moment, metric, self.dampening_frac)
        except ValueError as error:
            raise ValueError(f"LowRankQKModifier: {', '.join(linears)}: {error}") from None

    def _matched(self, model: nn.Module, context: RecipeContext) -> dict[str, nn.Linear]:
        """Return the linears to factor.

        :raises ValueError: if there are none
        """
        field = f"{type(self).__name__}.targets"
        linears = named_linears(model)
        fused = [name for name, _ in linears if name.rpartition(".")[2] in _FUSED_ON_DISK]
        if fused and not any(is_match(name, module, self.targets) for name, module in linears):
            raise ValueError(
                f"{field}: {type(model).__name__} fuses q, k and v in one weight "
                f"({fused[0]}), which cannot be factored: remove LowRankQKModifier"
            )
        matched = matched_linears(model, self.targets, self.ignore, field)
        return self.in_components(matched, context)

    def _ranks(self, latents: list[Latent], multiple: int) -> list[int | None]:
        if self.ranks is not None:
            return [self._given_rank(latent) for latent in latents]
        # without statistics a uniform rank stands in for the global choice
        if self.rank_allocation == "global" and latents[0].spectrum is not None:
            return shared(global_ranks(latents, multiple, self.keep))
        return [uniform_rank(*latent.shape, self.keep, multiple) for latent in latents]

    def _given_rank(self, latent: Latent) -> int:
        """Return the explicit rank of the layers of a latent."""
        ranks = {name: self._given_rank_of(name) for name in latent.linears}
        if len(set(ranks.values())) > 1:
            raise ValueError(
                f"LowRankQKModifier.ranks: {ranks} differ, but these layers share one latent: "
                "give them one rank, or set share_latent to false"
            )
        return next(iter(ranks.values()))

    def _given_rank_of(self, name: str) -> int:
        if isinstance(self.ranks, int):
            return self.ranks
        for target, rank in self.ranks.items():
            if match_name(name, target):
                return rank
        raise ValueError(
            f"LowRankQKModifier.ranks: no entry matches {name}; entries: {list(self.ranks)}"
        )


def _chooser(following: list[Modifier]) -> BitAllocationModifier | None:
    """Return the modifier that chooses bits; a recipe has one at most."""
    return next((m for m in following if isinstance(m, BitAllocationModifier)), None)


def _spectrum_plan(latent: Latent) -> SpectrumPlan:
    largest = min(latent.shape)
    ranks = sorted({round(largest * i / SPECTRUM_POINTS) for i in range(SPECTRUM_POINTS + 1)})
    lost = [latent.spectrum.error(rank) for rank in ranks]
    return SpectrumPlan(modules=list(latent.linears), ranks=ranks, lost=lost)


def _by_input(names: list[str], statistics: Statistics) -> list[list[str]]:
    """Part linears that did not read the same: q and k of an attention across two sequences."""
    parts: dict[int, list[str]] = {}
    for name in names:
        parts.setdefault(id(statistics.second_moments.get(name)), []).append(name)
    return list(parts.values())


def _group_size(following: list[Modifier]) -> int:
    """Return the largest group size of the modifiers that follow; 1 without groups."""
    sizes = [1]
    for modifier in following:
        sizes += getattr(modifier, "group_sizes", [])
        if isinstance(modifier, QuantizationMixin) and modifier.has_config():
            groups = modifier.resolved_config.config_groups.values()
            sizes += [g.weights.group_size or 1 for g in groups if g.weights is not None]
    return max(sizes)

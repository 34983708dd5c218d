"""LowRankQKModifier: W_q and W_k become data-aware low-rank products."""

import re
from typing import Literal

from compressed_tensors.utils import is_match, match_name
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationMixin
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.modifiers.transform.awq.dynamic_mappings import get_layer_mappings_from_model
from pydantic import Field, field_validator
from torch import nn
from tqdm import tqdm

from casp_plugin.lowrank import WhitenedWeight, kept_share, saves_parameters, uniform_rank
from casp_plugin.modifiers.base import CaspModifier
from casp_plugin.modules import LowRankLinear, named_linears
from casp_plugin.plan import CompressionPlan, LowRankPlan
from casp_plugin.statistics import Request, Statistics
from casp_plugin.units import matched_linears

__all__ = ["LowRankQKModifier"]

_FUSED_ON_DISK = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv")


class LowRankQKModifier(CaspModifier):
    """
    Replaces W_q and W_k by low-rank products that keep a share of their parameters: phase 1
    of CASP (CVPR 2025, https://arxiv.org/abs/2503.05936). Attention is sparse, above all over
    visual tokens, and sparsity bounds the error that compressing W_q and W_k causes.

    Sample yaml:

    ```yaml
    casp_stage:
      casp_modifiers:
        LowRankQKModifier:
          keep: 0.25
        BitAllocationModifier:
          average_bits: 2.25
        GPTQModifier: {}
    ```

    Each W (out x in) becomes `LowRankLinear`: `down` (rank x in), then `up` (out x rank) with
    the original bias. Both are Linear layers, so any quantizer that follows treats them like
    the others. A matrix whose factors would not be smaller stays dense, and the plan says so.

    Lifecycle:

    - on_initialize
        - collect the second moments of the layers' inputs (once for all casp modifiers)
        - replace the modules
        - point a following AWQModifier at the factors

    :param keep: share of the parameters of each matrix that its factors keep, in (0, 1). The
        rank is rounded to the nearest `rank_multiple`
    :param ranks: explicit ranks instead of `keep`: one number for all, or a mapping from
        targets (names or `re:` patterns) to numbers
    :param targets: linear layers to factor, in llm-compressor's matching syntax
    :param ignore: layers to leave dense although they match
    :param method: `whitened` minimises the error of the layer's output over the calibration
        inputs; `svd` the error of the weight itself, without any data
    :param rank_multiple: ranks are multiples of this. Defaults to the group size that the
        modifiers after this one use, because the rank is the column count of `up`
    :param dampening_frac: share of the mean diagonal added to the diagonal of the second moment
    """

    keep: float = Field(default=0.25, gt=0, lt=1)
    ranks: int | dict[str, int] | None = None
    targets: list[str] = Field(default_factory=lambda: ["re:.*\\.q_proj$", "re:.*\\.k_proj$"])
    ignore: list[str] = Field(default_factory=list)
    method: Literal["svd", "whitened"] = "whitened"
    rank_multiple: int | None = Field(default=None, ge=1)
    dampening_frac: float = Field(default=0.01, ge=0)

    @field_validator("targets", mode="before")
    @classmethod
    def _one_target(cls, value: str | list[str]) -> list[str]:
        return [value] if isinstance(value, str) else value

    @field_validator("ranks")
    @classmethod
    def _positive_ranks(cls, value: int | dict[str, int] | None) -> int | dict[str, int] | None:
        for rank in value.values() if isinstance(value, dict) else [value]:
            if rank is not None and rank < 1:
                raise ValueError(f"ranks must be positive, got {rank}")
        return value

    def request(self, model: nn.Module) -> Request:
        if self.method == "svd":
            return Request()
        return Request(second_moments=frozenset(self._matched(model)))

    def prepare(
        self,
        model: nn.Module,
        plan: CompressionPlan,
        statistics: Statistics | None,
        following: list[Modifier],
    ) -> None:
        plan.settings[type(self).__name__] = self.settings
        multiple = self.rank_multiple or _group_size(following)
        replaced = False
        matched = self._matched(model).items()
        for name, module in tqdm(matched, desc="Factoring W_q, W_k", disable=statistics is None):
            shape = (module.out_features, module.in_features)
            rank = self._rank(name, shape, multiple)
            if not saves_parameters(*shape, rank):
                note = f"factors of rank {rank} would not be smaller"
                plan.low_rank.append(
                    LowRankPlan(module=name, shape=shape, rank=None, keep=1, note=note)
                )
                continue
            entry = LowRankPlan(module=name, shape=shape, rank=rank, keep=kept_share(*shape, rank))
            if statistics is None:
                factored = LowRankLinear.like(module, rank)
            else:
                factored, entry.error = self._factor(name, module, rank, statistics)
            model.set_submodule(name, factored)
            plan.low_rank.append(entry)
            replaced = True
        if replaced:
            self._point_awq_at_factors(model, following)
        if self.ranks is None and plan.kept > 1.25 * self.keep:
            plan.warnings.append(
                f"LowRankQKModifier keeps {plan.kept:.3f} of the q/k parameters instead of "
                f"{self.keep}: ranks are multiples of {multiple} (rank_multiple)"
            )

    def _matched(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The linears to factor, or the error that says why there are none."""
        field = f"{type(self).__name__}.targets"
        linears = named_linears(model)
        fused = [name for name, _ in linears if name.rpartition(".")[2] in _FUSED_ON_DISK]
        if fused and not any(is_match(name, module, self.targets) for name, module in linears):
            raise ValueError(
                f"{field}: {type(model).__name__} fuses q, k and v in one weight "
                f"({fused[0]}), which cannot be factored: remove LowRankQKModifier"
            )
        return matched_linears(model, self.targets, self.ignore, field)

    def _rank(self, name: str, shape: tuple[int, int], multiple: int) -> int:
        if self.ranks is None:
            return uniform_rank(*shape, self.keep, multiple)
        if isinstance(self.ranks, int):
            return self.ranks
        for target, rank in self.ranks.items():
            if match_name(name, target):
                return rank
        raise ValueError(
            f"LowRankQKModifier.ranks: no entry matches {name}; entries: {list(self.ranks)}"
        )

    def _factor(
        self, name: str, module: nn.Linear, rank: int, statistics: Statistics
    ) -> tuple[LowRankLinear, float]:
        moment = None
        if self.method == "whitened":
            moment = statistics.second_moments.get(name)
            if moment is None:
                raise ValueError(f"LowRankQKModifier: no calibration token reached {name}")
        try:
            factors = WhitenedWeight(module.weight, moment, self.dampening_frac).factors(rank)
        except ValueError as error:
            raise ValueError(f"LowRankQKModifier: {name}: {error}") from None
        return LowRankLinear.from_factors(module, factors.down, factors.up), factors.error

    def _point_awq_at_factors(self, model: nn.Module, following: list[Modifier]) -> None:
        """AWQ scales the layers that read a norm's output; in a factored layer that is ``down``."""

        def readers(pattern: str) -> str:
            matched = [(n, m) for n, m in model.named_modules() if is_match(n, m, pattern)]
            if not any(isinstance(module, LowRankLinear) for _, module in matched):
                return pattern
            names = [f"{n}.down" if isinstance(m, LowRankLinear) else n for n, m in matched]
            return f"re:^({'|'.join(map(re.escape, names))})$"

        for modifier in following:
            if isinstance(modifier, AWQModifier) and modifier.mappings is None:
                mappings = [
                    AWQMapping(
                        mapping.smooth_layer,
                        [readers(layer) for layer in mapping.balance_layers],
                        mapping.activation_hook_target,
                    )
                    for mapping in get_layer_mappings_from_model(model)
                ]
                self.hand_over(modifier, "mappings", mappings)


def _group_size(following: list[Modifier]) -> int:
    """The largest group size that the modifiers after this one use; 1 without groups."""
    sizes = [1]
    for modifier in following:
        sizes += getattr(modifier, "group_sizes", [])
        if isinstance(modifier, QuantizationMixin) and modifier.has_config():
            groups = modifier.resolved_config.config_groups.values()
            sizes += [g.weights.group_size or 1 for g in groups if g.weights is not None]
    return max(sizes)

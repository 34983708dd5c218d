"""Putting factored layers into a model, and telling the modifiers that follow."""

import re

from compressed_tensors.utils import is_match
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.modifiers.transform.awq.dynamic_mappings import get_layer_mappings_from_model
from torch import nn

from casp_plugin.latent import Latent
from casp_plugin.modifiers.base import CaspModifier
from casp_plugin.modules import LowRankLinear
from casp_plugin.plan import CompressionPlan, LowRankPlan

__all__ = ["install", "point_awq_at_factors"]


def install(
    model: nn.Module,
    plan: CompressionPlan,
    latent: Latent,
    rank: int | None,
    note: str | None = None,
) -> None:
    """Replace the layers of a latent by factors of this rank, and record it.

    :param rank: None to leave them dense
    :param note: what to say about it in the plan
    """
    known = rank is not None and latent.spectrum is not None
    error = latent.spectrum.error(rank) if known else None
    for name, linear in latent.linears.items():
        plan.low_rank.append(
            LowRankPlan(
                module=name,
                shape=(linear.out_features, linear.in_features),
                rank=rank,
                keep=latent.kept(rank),
                error=error,
                note=note,
            )
        )
    if rank is not None:
        for name, layer in latent.layers(rank).items():
            model.set_submodule(name, layer)


def point_awq_at_factors(
    modifier: CaspModifier, model: nn.Module, following: list[Modifier]
) -> None:
    """AWQ scales the layers that read a norm's output; in a factored layer that is ``down``."""

    def readers(pattern: str) -> str:
        matched = [(n, m) for n, m in model.named_modules() if is_match(n, m, pattern)]
        if not any(isinstance(module, LowRankLinear) for _, module in matched):
            return pattern
        names = []
        for name, module in matched:
            if not isinstance(module, LowRankLinear):
                names.append(name)
            elif module.latent_of is None:
                names.append(f"{name}.down")
        return f"re:^({'|'.join(map(re.escape, names))})$"

    for awq in following:
        if isinstance(awq, AWQModifier) and awq.mappings is None:
            mappings = [
                AWQMapping(
                    mapping.smooth_layer,
                    [readers(layer) for layer in mapping.balance_layers],
                    mapping.activation_hook_target,
                )
                for mapping in get_layer_mappings_from_model(model)
            ]
            modifier.hand_over(awq, "mappings", mappings)

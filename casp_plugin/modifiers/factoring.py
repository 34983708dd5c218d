"""Putting factored layers into a model, and telling the modifiers that follow."""

import re

from compressed_tensors.offload import OffloadCache, get_cache_init_kwargs, offload_module
from compressed_tensors.utils import match_modules_set
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.modifiers.transform.awq.dynamic_mappings import get_layer_mappings_from_model
from torch import nn

from casp_plugin.latent import Latent
from casp_plugin.modifiers.base import CaspModifier
from casp_plugin.modules import LowRankLinear
from casp_plugin.plan import CompressionPlan, LowRankPlan

__all__ = ["install", "point_awq"]


def install(
    modifier: CaspModifier,
    model: nn.Module,
    plan: CompressionPlan,
    latent: Latent,
    rank: int | None,
    note: str | None = None,
) -> None:
    """Replace the layers of a latent by factors of this rank, and record it.

    :param modifier: which does it
    :param rank: None to leave them dense
    :param note: what to say about it in the plan
    """
    known = rank is not None and latent.spectrum is not None
    error = latent.spectrum.error(rank) if known else None
    for name, linear in latent.linears.items():
        plan.low_rank.append(
            LowRankPlan(
                module=name,
                component=modifier.component_of(name),
                shape=(linear.out_features, linear.in_features),
                rank=rank,
                keep=latent.kept(rank),
                error=error,
                note=note,
            )
        )
    if rank is not None:
        for name, layer in latent.layers(rank).items():
            replaced = latent.linears[name]
            if isinstance(replaced._parameters, OffloadCache):
                for factor in layer.children():
                    offload_module(factor, **get_cache_init_kwargs(replaced))
            model.set_submodule(name, layer)


def point_awq(modifier: CaspModifier, model: nn.Module, following: list[Modifier]) -> None:
    """AWQ scales the layers that read a norm's output; in a factored layer that is ``down``.

    A mapping that meets a factored layer becomes one for each norm, with the names of what reads
    it, because that may differ from layer to layer; so does every mapping of a multimodal model,
    where llm-compressor would look for the norms of language models in the other components too.

    :raises ValueError: if no mapping is known that fits the model
    """
    names = {module: name for name, module in model.named_modules()}
    outside = [f"re:^{re.escape(name)}[.]" for name in modifier.outside_language(model)]

    def reader(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, LowRankLinear):
            return module
        return module.down if module.latent_of is None else None

    def exact(module: nn.Module) -> str:
        return f"re:^{re.escape(names[module])}$"

    def pointed(mapping: AWQMapping) -> list[AWQMapping]:
        patterns = (mapping.smooth_layer, *mapping.balance_layers)
        try:
            found = list(match_modules_set(model, patterns, outside))
        except ValueError as error:
            raise ValueError(
                f"AWQModifier.mappings: llm-compressor knows none for {type(model).__name__} ("
                f"{str(error).strip().splitlines()[0]:.120}): give them in the recipe"
            ) from None
        balanced = [module for _, *groups in found for group in groups for module in group]
        if not outside and not any(isinstance(module, LowRankLinear) for module in balanced):
            return [mapping]
        made = []
        for [norm], *groups in found:
            readers = [reader(module) for group in groups for module in group]
            balance = [exact(module) for module in readers if module is not None]
            made.append(AWQMapping(exact(norm), balance, mapping.activation_hook_target))
        return made

    for awq in following:
        if isinstance(awq, AWQModifier) and awq.mappings is None:
            known = get_layer_mappings_from_model(model)
            made = [mapping for old in known for mapping in pointed(old)]
            if made != known:
                modifier.hand_over(awq, "mappings", made)

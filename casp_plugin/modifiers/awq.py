"""Mappings of AWQ (norms and the layers that read them) for factored and multimodal models."""

import re
from collections.abc import Sequence

from compressed_tensors.utils import match_modules_set
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.modifiers.transform.awq.dynamic_mappings import get_layer_mappings_from_model
from torch import nn

from casp_plugin.model.low_rank_linear import LowRankLinear
from casp_plugin.modifiers.base import CaspModifier, RecipeContext

__all__ = ["awq_mappings", "exact_pattern", "point_awq"]

#: mappings that llm-compressor lacks, by the class of the decoder layers
_MORE = {
    "OPTDecoderLayer": [
        AWQMapping("re:.*self_attn_layer_norm$", ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"]),
        AWQMapping("re:.*v_proj$", ["re:.*out_proj$"]),
        AWQMapping(r"re:.*layers[.]\d+[.]final_layer_norm$", ["re:.*fc1$"]),
    ],
}


def awq_mappings(model: nn.Module, outside: Sequence[str]) -> list[AWQMapping]:
    """Return the mappings of AWQ for a language model, alone or in a multimodal model.

    AWQ scales the layers that read a norm's output; in a factored layer that is ``down``. A mapping
    that matches a factored layer becomes a mapping of every norm, with the names of the layers that
    read it, because these may differ from layer to layer; so does every mapping of a multimodal
    model, where llm-compressor would look for the norms of language models in the other components
    too.

    :param outside: outermost modules that are not of the language model
    :raises ValueError: if no known mapping fits the model
    """
    names = {module: name for name, module in model.named_modules()}
    ignored = [f"re:^{re.escape(name)}[.]" for name in outside]

    def reader(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, LowRankLinear):
            return module
        return module.down if module.latent_of is None else None

    def exact(module: nn.Module) -> str:
        return exact_pattern(names[module])

    def pointed(mapping: AWQMapping) -> list[AWQMapping]:
        patterns = (mapping.smooth_layer, *mapping.balance_layers)
        try:
            sets = list(match_modules_set(model, patterns, ignored))
        except ValueError as error:
            raise ValueError(
                f"AWQModifier.mappings: llm-compressor knows none for {type(model).__name__} ("
                f"{str(error).strip().splitlines()[0]:.120}): give them in the recipe"
            ) from None
        balanced = [module for _, *groups in sets for group in groups for module in group]
        if not ignored and not any(isinstance(module, LowRankLinear) for module in balanced):
            return [mapping]
        exact_mappings = []
        for [norm], *groups in sets:
            readers = [reader(module) for group in groups for module in group]
            balance = [exact(module) for module in readers if module is not None]
            exact_mappings.append(AWQMapping(exact(norm), balance, mapping.activation_hook_target))
        return exact_mappings

    kinds = {type(module).__name__ for module in model.modules()}
    more = [mapping for kind, mappings in _MORE.items() if kind in kinds for mapping in mappings]
    known = more or get_layer_mappings_from_model(model)
    return [exact_mapping for mapping in known for exact_mapping in pointed(mapping)]


def exact_pattern(name: str) -> str:
    """Return the pattern of llm-compressor's that matches the module of this name alone."""
    return f"re:^{re.escape(name)}$"


def point_awq(modifier: CaspModifier, model: nn.Module, context: RecipeContext) -> None:
    """Give every following AWQModifier without mappings of its own the mappings for the model.

    :raises ValueError: if no known mapping fits the model
    """
    outside = context.outside_language(model)
    for awq in context.following(modifier):
        if isinstance(awq, AWQModifier) and awq.mappings is None:
            mappings = awq_mappings(model, outside)
            if mappings != get_layer_mappings_from_model(model):
                modifier.hand_over(awq, "mappings", mappings)

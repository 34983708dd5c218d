"""What AWQ scales: norms and what reads them, in factored and in multimodal models too."""

import re
from collections.abc import Sequence

import torch
from compressed_tensors.utils import match_modules_set
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.modifiers.transform.awq.dynamic_mappings import get_layer_mappings_from_model
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import nn

from casp_plugin.model.low_rank_linear import LowRankLinear
from casp_plugin.modifiers.base import CaspModifier

__all__ = ["awq_mappings", "exactly", "point_awq", "register"]

#: what llm-compressor has no mappings for, by the class of its layers
_MORE = {
    "OPTDecoderLayer": [
        AWQMapping("re:.*self_attn_layer_norm$", ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"]),
        AWQMapping("re:.*v_proj$", ["re:.*out_proj$"]),
        AWQMapping(r"re:.*layers[.]\d+[.]final_layer_norm$", ["re:.*fc1$"]),
    ],
}


def awq_mappings(model: nn.Module, outside: Sequence[str]) -> list[AWQMapping]:
    """What llm-compressor's AWQ scales in a language model, wherever it stands.

    AWQ scales the layers that read a norm's output; in a factored layer that is ``down``. A mapping
    that meets a factored layer becomes one for each norm, with the names of what reads it, because
    that may differ from layer to layer; so does every mapping of a multimodal model, where
    llm-compressor would look for the norms of language models in the other components too.

    :param outside: outermost modules that are not of the language model
    :raises ValueError: if no mapping is known that fits the model
    """
    names = {module: name for name, module in model.named_modules()}
    passed = [f"re:^{re.escape(name)}[.]" for name in outside]

    def reader(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, LowRankLinear):
            return module
        return module.down if module.latent_of is None else None

    def exact(module: nn.Module) -> str:
        return exactly(names[module])

    def pointed(mapping: AWQMapping) -> list[AWQMapping]:
        patterns = (mapping.smooth_layer, *mapping.balance_layers)
        try:
            found = list(match_modules_set(model, patterns, passed))
        except ValueError as error:
            raise ValueError(
                f"AWQModifier.mappings: llm-compressor knows none for {type(model).__name__} ("
                f"{str(error).strip().splitlines()[0]:.120}): give them in the recipe"
            ) from None
        balanced = [module for _, *groups in found for group in groups for module in group]
        if not passed and not any(isinstance(module, LowRankLinear) for module in balanced):
            return [mapping]
        made = []
        for [norm], *groups in found:
            readers = [reader(module) for group in groups for module in group]
            balance = [exact(module) for module in readers if module is not None]
            made.append(AWQMapping(exact(norm), balance, mapping.activation_hook_target))
        return made

    kinds = {type(module).__name__ for module in model.modules()}
    more = [mapping for kind, mappings in _MORE.items() if kind in kinds for mapping in mappings]
    known = more or get_layer_mappings_from_model(model)
    return [mapping for one in known for mapping in pointed(one)]


def exactly(name: str) -> str:
    """A pattern of llm-compressor's that one module matches."""
    return f"re:^{re.escape(name)}$"


def point_awq(modifier: CaspModifier, model: nn.Module, following: list[Modifier]) -> None:
    """Give a following AWQModifier, which has no mappings of its own, those that fit the model.

    :raises ValueError: if no mapping is known that fits the model
    """
    outside = modifier.outside_language(model)
    for awq in following:
        if isinstance(awq, AWQModifier) and awq.mappings is None:
            made = awq_mappings(model, outside)
            if made != get_layer_mappings_from_model(model):
                modifier.hand_over(awq, "mappings", made)


def register() -> None:
    """Let AWQ run without an accelerator: llm-compressor 0.14 pins host memory all the same."""
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_: None

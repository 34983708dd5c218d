"""Experts as linear layers, the form in which llm-compressor calibrates and quantizes them."""

import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import (
    get_linearized_moes,
    get_non_linearized_moes,
    linearize_moe,
)
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from casp_plugin.model.expert_weights import STACKED

__all__ = ["linearize_experts", "name_experts_as_on_disk"]


def linearize_experts(model: nn.Module) -> None:
    """Replace the stacked weights of experts by linear layers, as oneshot does.

    :param model: the model, also on the meta device, where llm-compressor needs weights
    :raises ValueError: if llm-compressor cannot take these experts apart
    """
    try:
        if not next(model.parameters()).is_meta:
            linearize_moe(model)
            return
        for name, experts in get_non_linearized_moes(model):
            model.set_submodule(name, _bare_experts(experts, model.config))
    except Exception as error:  # families that llm-compressor was not written for
        raise ValueError(
            f"llm-compressor cannot make linear layers of the experts of {type(model).__name__}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _bare_experts(experts: nn.Module, config: PreTrainedConfig) -> nn.Module:
    """Return linear layers of the experts' sizes, without weights."""
    linear_experts = LinearExperts2D.get_linear_experts_cls(type(experts))
    with torch.device("meta"):
        if not isinstance(experts, Llama4TextExperts):
            return linear_experts(getattr(experts, "config", config))
        sizes = (experts.num_experts, experts.hidden_size, experts.expert_dim)
        return linear_experts(*sizes, config.get_text_config())


def name_experts_as_on_disk(model: PreTrainedModel) -> None:
    """Let ``save_pretrained`` write the layers of experts under the names of their family.

    llm-compressor has names of its own for some (Mixtral's `w1`, `w3`, `w2`), which readers of the
    checkpoint would miss.
    """
    kept, renamed = [], []
    for conversion in getattr(model, "_weight_conversions", None) or []:
        layers = STACKED.get(conversion.target_patterns[0].rpartition("experts.")[2])
        if layers is None or not isinstance(conversion, WeightConverter):
            kept.append(conversion)
            continue
        for pattern, layer in zip(conversion.source_patterns, layers, strict=False):
            name = pattern.removesuffix(".weight").rpartition(".")[2]
            if name != layer:
                on_disk = rf"\.experts\.(\d+)\.{name}\."
                renamed.append(WeightRenaming(on_disk, rf".experts.\1.{layer}."))
    if renamed and get_linearized_moes(model):
        model._weight_conversions = kept + renamed

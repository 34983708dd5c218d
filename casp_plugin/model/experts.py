"""Experts of a layer as linear layers, as llm-compressor calibrates and quantizes them."""

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
    """Put linear layers in place of the stacked weights of experts, as oneshot does.

    :param model: the model; on the meta device too, where llm-compressor would miss the weights
    :raises ValueError: if llm-compressor cannot take these experts apart
    """
    try:
        if not next(model.parameters()).is_meta:
            linearize_moe(model)
            return
        for name, experts in get_non_linearized_moes(model):
            model.set_submodule(name, _bare_experts(experts, model.config))
    except Exception as error:  # whatever it meets in a family that it was not written for
        raise ValueError(
            f"llm-compressor cannot make linear layers of the experts of {type(model).__name__}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _bare_experts(experts: nn.Module, config: PreTrainedConfig) -> nn.Module:
    """Linear layers of the sizes of some experts, without weights."""
    kind = LinearExperts2D.get_linear_experts_cls(type(experts))
    with torch.device("meta"):
        if not isinstance(experts, Llama4TextExperts):
            return kind(getattr(experts, "config", config))
        sizes = (experts.num_experts, experts.hidden_size, experts.expert_dim)
        return kind(*sizes, config.get_text_config())


def name_experts_as_on_disk(model: PreTrainedModel) -> None:
    """Let ``save_pretrained`` call the layers of experts what checkpoints of their family call
    them, where llm-compressor has another name that nobody would find (Mixtral: `w1`, `w3`, `w2`).
    """
    kept, renamed = [], []
    for known in getattr(model, "_weight_conversions", None) or []:
        layers = STACKED.get(known.target_patterns[0].rpartition("experts.")[2])
        if layers is None or not isinstance(known, WeightConverter):
            kept.append(known)
            continue
        for pattern, layer in zip(known.source_patterns, layers, strict=False):
            name = pattern.removesuffix(".weight").rpartition(".")[2]
            if name != layer:
                on_disk = rf"\.experts\.(\d+)\.{name}\."
                renamed.append(WeightRenaming(on_disk, rf".experts.\1.{layer}."))
    if renamed and get_linearized_moes(model):
        model._weight_conversions = kept + renamed

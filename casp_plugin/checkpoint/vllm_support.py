"""vLLM's models: those that are tested with our checkpoints, and those that cannot run them."""

from collections.abc import Iterable

from casp_plugin.checkpoint.format import read_section
from casp_plugin.model.components import component_of

__all__ = [
    "TESTED",
    "quantized_connector",
    "quantized_experts",
    "refusal",
    "reordered",
    "targets_of",
]

#: architectures that tests/runtime/test_serving.py serves with transformers' log-probabilities
TESTED = frozenset(
    {
        "Blip2ForConditionalGeneration",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma3ForConditionalGeneration",
        "Glm4ForCausalLM",
        "GraniteMoeHybridForCausalLM",
        "Idefics3ForConditionalGeneration",
        "LlamaForCausalLM",
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "LlavaNextVideoForConditionalGeneration",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3VLForConditionalGeneration",
        "SmolVLMForConditionalGeneration",
        "StableLmForCausalLM",
    }
)

_REORDERS = "vLLM reorders the rows of q_proj and k_proj while loading, as if each were one weight"
_UNSERVED = dict.fromkeys(
    [
        "Llama4ForCausalLM",
        "Llama4ForConditionalGeneration",
        "EagleLlama4ForCausalLM",
        "K2HorizonForCausalLM",
    ],
    _REORDERS,
)

#: models whose experts have other names on disk and in vLLM than in transformers, whose names
#: are the targets of compressed-tensors
_RENAMED_EXPERTS = frozenset({"MixtralForCausalLM", "MiniMaxForCausalLM", "PhiMoEForCausalLM"})

#: models whose connector vLLM builds without asking how it is quantized
_DENSE_CONNECTORS = frozenset(
    {
        "Blip2ForConditionalGeneration",
        "LlavaNextVideoForConditionalGeneration",
        "PaliGemmaForConditionalGeneration",
    }
)


def refusal(architectures: Iterable[str], quantization: dict) -> str | None:
    """Tell why vLLM would run a checkpoint wrongly; None if it would not.

    :param architectures: ``architectures`` of its ``config.json``
    :param quantization: ``quantization_config`` of its ``config.json``
    """
    targets = targets_of(quantization)
    return (
        reordered(architectures, quantization)
        or quantized_connector(architectures, targets)
        or quantized_experts(architectures, targets)
    )


def reordered(architectures: Iterable[str], quantization: dict) -> str | None:
    """Tell what of a checkpoint vLLM would reorder wrongly, because the rows of a weight are not
    all in one tensor; None for nothing. Parameters are those of ``refusal``."""
    features = []
    if read_section(quantization).ranks:
        features.append("low-rank layers")
    groups = (quantization.get("config_groups") or {}).values()
    if any(not (group.get("weights") or {}).get("symmetric", True) for group in groups):
        features.append("zero points")
    for name in architectures:
        if features and name in _UNSERVED:
            return f"{name} cannot be served with {' or '.join(features)}: {_UNSERVED[name]}"
    return None


def quantized_connector(architectures: Iterable[str], targets: Iterable[str]) -> str | None:
    """Tell that vLLM keeps the connector dense although it is quantized; None if it does not.

    :param architectures: ``architectures`` of its ``config.json``
    :param targets: names of quantized layers
    """
    for name in architectures:
        if name in _DENSE_CONNECTORS and any(map(_in_connector, targets)):
            return (
                f"{name} cannot be served with a quantized connector, which vLLM keeps as it was: "
                "leave it out of the modifiers' components"
            )
    return None


def quantized_experts(architectures: Iterable[str], targets: Iterable[str]) -> str | None:
    """Tell that vLLM would not find the quantized experts; None if it would.

    :param architectures: ``architectures`` of its ``config.json``
    :param targets: names of quantized layers
    """
    for name in architectures:
        if name in _RENAMED_EXPERTS and any(".experts." in target for target in targets):
            return (
                f"{name} cannot be served with quantized experts, which vLLM knows by other names "
                "than the checkpoint's config: put 're:.*experts.*' into "
                "BitAllocationModifier.ignore"
            )
    return None


def targets_of(quantization: dict) -> list[str]:
    """Return all targets of a ``quantization_config``."""
    groups = (quantization.get("config_groups") or {}).values()
    return [target for group in groups for target in group.get("targets") or []]


def _in_connector(target: str) -> bool:
    return component_of(target) == "connector"

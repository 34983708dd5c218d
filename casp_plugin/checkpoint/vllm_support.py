"""vLLM's models: those that are tested with our checkpoints, those that cannot run them, and the
matmuls that kernels are compiled for."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from compressed_tensors.quantization import QuantizationArgs

from casp_plugin.checkpoint.format import Section, read_section
from casp_plugin.model.components import component_of
from casp_plugin.model.schemes import missing_kernel

__all__ = [
    "TESTED",
    "Linear",
    "Matmul",
    "compiled_matmuls",
    "dense",
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

#: linears that vLLM runs as one layer, in most models
_FUSED = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj")
_FUSED |= dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj")


class Linear(NamedTuple):
    """A quantized linear of a checkpoint.

    :param rows: size of its output
    :param columns: size of its input
    :param scheme: scheme of its weight
    """

    rows: int
    columns: int
    scheme: QuantizationArgs


class Matmul(NamedTuple):
    """Everything that tells apart the kernels of two matmuls of one dtype."""

    rows: int
    columns: int
    bits: int
    group_size: int | None
    symmetric: bool


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
    section = read_section(quantization)
    if section.ranks:
        features.append("low-rank layers")
    if section.codebooks:
        features.append("codebook layers")
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
    targets = [target for group in groups for target in group.get("targets") or []]
    return targets + list(read_section(quantization).codebooks)


def compiled_matmuls(linears: Mapping[str, Linear], section: Section) -> set[Matmul]:
    """Return the different matmuls that vLLM on CUDA has kernels compiled for at its first start.

    Linears that are fused in vLLM, read the same input and have one scheme are one matmul, as
    ``SplitLinearMethod`` of the runtime joins them, unless their zero points end within a word.

    :param linears: quantized linears, by name in the checkpoint; factors are linears
    :param section: section of the checkpoint
    """
    rows_of: Counter[tuple] = Counter()
    for name, (rows, columns, scheme) in linears.items():
        if missing_kernel(scheme) is None:
            continue
        layer, factor = _factored(name, section)
        parent, _, leaf = layer.rpartition(".")
        reads = section.latent_of.get(layer, layer) if factor == "up" else None
        joined = scheme.symmetric or rows * scheme.num_bits % 32 == 0
        place = (parent, _FUSED.get(leaf, leaf), reads, None if joined else name)
        rows_of[place, columns, scheme.num_bits, scheme.group_size, scheme.symmetric] += rows
    return {Matmul(rows, *kind) for (_, *kind), rows in rows_of.items()}


def dense(linears: Mapping[str, Linear], section: Section) -> dict[str, Linear]:
    """Return the same linears without factors, and all with the scheme of the first that has no
    kernel in vLLM itself.

    :raises StopIteration: if there is none. Other parameters are those of ``compiled_matmuls``
    """
    scheme = next(linear.scheme for linear in linears.values() if missing_kernel(linear.scheme))
    whole = {}
    for name, linear in linears.items():
        layer, factor = _factored(name, section)
        if factor == "down":
            continue
        reads = linear
        if factor == "up":
            reads = linears.get(f"{section.latent_of.get(layer, layer)}.down", linear)
        whole[layer] = Linear(linear.rows, reads.columns, scheme)
    return whole


def _in_connector(target: str) -> bool:
    return component_of(target) == "connector"


def _factored(name: str, section: Section) -> tuple[str, str | None]:
    """Return the layer that a linear is a factor of, and which: ``up`` or ``down``; else the linear
    itself and None."""
    layer, _, factor = name.rpartition(".")
    return (layer, factor) if layer in section.ranks else (name, None)

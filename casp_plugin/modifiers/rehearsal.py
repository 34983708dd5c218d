"""Check before any data runs that the checkpoint of a recipe is whole and loads.

The tensors of the checkpoint are named on the meta device, read as loading reads them, and matched
name by name. The tensors of the model's own checkpoint that its class does not build are found here
too.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable

import torch
from compressed_tensors import ModelCompressor
from compressed_tensors.compressors import compress_module
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
    initialize_module_for_quantization,
)
from compressed_tensors.quantization.utils import is_module_quantized
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    revert_weight_conversion,
)
from transformers.modeling_utils import _get_tied_weight_keys

from casp_plugin.checkpoint.bare import bare_from_config
from casp_plugin.checkpoint.check import compare_tensors, expected_shapes
from casp_plugin.checkpoint.format import (
    SECTION,
    casp_section,
    read_config,
    unsavable_generation_config,
)
from casp_plugin.checkpoint.source import source_folder, unbuilt_tensors
from casp_plugin.checkpoint.vllm_support import refusal, reordered
from casp_plugin.model.experts import name_experts_as_on_disk
from casp_plugin.model.load import runs_remote_code
from casp_plugin.model.schemes import FORMAT, weight_args
from casp_plugin.model.weights import Header, tensor_bytes
from casp_plugin.plan.plan import CompressionPlan, CopiedTensor

__all__ = ["find_copied", "planned_groups", "rehearse"]

_OBSERVER = "memoryless_minmax"


def find_copied(model: PreTrainedModel) -> list[CopiedTensor]:
    """Return the tensors of a model's own checkpoint that its class does not build.

    :param model: loaded, or on the meta device
    :return: the tensors; none for a model that was made in memory
    :raises ValueError: if the checkpoint is of another class
    """
    source = source_folder(model.name_or_path)
    if source is None or not (source / "config.json").exists():
        return []
    config, kind = read_config(source), type(model).__name__
    named = config.get("architectures") or []
    if named and kind not in named and not runs_remote_code(model):
        own = ", its code with --trust-remote-code (trust_remote_code=True)"
        raise ValueError(
            f"{source} is of {', '.join(named)}, but was loaded as {kind}, which leaves parts of "
            f"it out: load it by its own class{own if config.get('auto_map') else ''}"
        )
    if not any(source.glob("*.safetensors")):
        return []
    known = model.state_dict()
    unbuilt = {
        name: header
        for name, header in unbuilt_tensors(source, _as_loaded(model)).items()
        if name not in known  # as names of experts that were loaded one by one are
    }
    why = f"{kind} does not build them"
    return [CopiedTensor(name=n, bytes=tensor_bytes(h), why=why) for n, h in unbuilt.items()]


def rehearse(
    bare: PreTrainedModel, plan: CompressionPlan, quantization: Iterable[QuantizationConfig]
) -> list[str]:
    """Name the tensors of the checkpoint that a recipe leads to, and read them as loading does.

    :param bare: the model on the meta device with its factors, of no use afterwards
    :param plan: a plan with bits chosen in any way
    :param quantization: configs of the recipe's quantizers for layers outside the plan
    :return: warnings for the user
    :raises ValueError: if the checkpoint would not load, or vLLM would run it wrongly
    """
    warnings = []
    if refused := unsavable_generation_config(bare):
        warnings.append(f"generation_config.json is copied as it is; transformers says: {refused}")
    for scheme in planned_groups(plan).values():
        for module in map(bare.get_submodule, scheme.targets):
            initialize_module_for_quantization(module, scheme)
    for config in quantization:
        if config.config_groups:
            apply_quantization_config(bare, config, show_progress=False)
    _check_groups(bare)
    untied = _untie_quantized(bare)
    for module in bare.modules():
        compress_module(module)
        if is_module_quantized(module):
            module.quantization_status = QuantizationStatus.COMPRESSED
    compressor = ModelCompressor.from_pretrained_model(bare)
    name = type(bare).__name__
    try:
        headers = _written(bare, untied)
    except Exception as error:  # from conversions that were written for dense weights
        raise ValueError(
            f"{name} cannot be compressed by this recipe: transformers cannot write its weights "
            f"in the form of the checkpoint once they are quantized: {error}"
        ) from error
    factors = tuple(
        f"{layer.module}.{factor}." for layer in plan.low_rank for factor in ("up", "down")
    )
    clash = [t.name for t in plan.copied if t.name in headers or t.name.startswith(factors)]
    if clash:
        raise ValueError(
            f"{bare.name_or_path} holds {clash[0]}, which {name} does not build and the compressed "
            "model writes: remove it"
        )
    config = _planned_config(bare, compressor)
    architectures = config.get("architectures") or [name]
    quantization = config["quantization_config"]
    promised = type(bare.config).from_dict(config)
    promised._name_or_path = bare.name_or_path  # the place of code that comes with the model
    checkpoint = bare_from_config(promised, runs_remote_code(bare))
    finding = compare_tensors(headers, checkpoint, None)
    why = reordered(architectures, quantization)
    if finding.passed is False:
        why = finding.detail
        if "experts" in why:
            why += (
                "; transformers has no conversion that reads these experts one by one, quantized "
                "or not"
            )
    if why is not None:
        raise ValueError(f"{name} cannot be compressed by this recipe: {why}")
    unserved = refusal(architectures, quantization)
    return [*warnings, *([unserved] if unserved else [])]


def planned_groups(plan: CompressionPlan) -> dict[str, QuantizationScheme]:
    """Return the schemes of a plan with chosen bits, rounding to nearest, by name of the group;
    those of codebooks left out."""
    targets, sizes = defaultdict(list), {}
    for unit in plan.units:
        if unit.choice.codec is not None:
            continue
        targets[unit.choice.bits] += unit.modules
        sizes[unit.choice.bits] = unit.choice.group_size
    symmetric = bool(targets) and plan.settings["BitAllocationModifier"]["symmetric"]
    return {
        f"w{bits}": QuantizationScheme(
            targets=names,
            weights=weight_args(bits, sizes[bits], symmetric, _OBSERVER),
            format=FORMAT,
        )
        for bits, names in targets.items()
    }


def _check_groups(bare: PreTrainedModel) -> None:
    """Check that the groups of quantizers divide the columns of their layers.

    :raises ValueError: if they do not
    """
    for name, module in bare.named_modules():
        args = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        size = args.group_size if args is not None else None
        columns = module.weight.shape[-1] if size and hasattr(module, "weight") else 0
        if size and size > 0 and columns % size:
            raise ValueError(
                f"groups of {size} of a quantizer in the recipe do not divide the {columns} "
                f"columns of {name}: use a divisor"
            )


def _as_loaded(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model as loading builds it, with stacked experts, on the meta device."""
    with torch.device("meta"):
        return type(model)._from_config(copy.deepcopy(model.config))


def _untie_quantized(bare: PreTrainedModel) -> bool:
    """Note in the config of a model that its tied weights are two, where one of them is quantized,
    as llm-compressor does.

    :return: whether one of them is
    :raises ValueError: if both are: transformers would look for the codes of both
    """
    pairs = [
        [name.rpartition(".")[0] for name in pair]
        for pair in bare.all_tied_weights_keys.items()
        if pair[0].endswith(".weight")
    ]
    coded = [[is_module_quantized(bare.get_submodule(n)) for n in pair] for pair in pairs]
    for pair, are_coded in zip(pairs, coded, strict=True):
        if all(are_coded) and pair[0].rpartition(".")[2] != pair[1].rpartition(".")[2]:
            raise ValueError(
                f"{' and '.join(pair)} are one tied weight, and the recipe quantizes both: leave "
                "one of them out"
            )
    if not any(map(any, coded)):
        return False
    bare.config.get_text_config().tie_word_embeddings = False
    bare.config.tie_word_embeddings = False
    return True


def _written(bare: PreTrainedModel, untied: bool) -> dict[str, Header]:
    """Return the headers of a compressed model by the names that `save_pretrained` writes."""
    _get_tied_weight_keys(bare)  # may fail in code for older versions of transformers
    aliases = {n for n in bare.all_tied_weights_keys if not (untied and n.endswith(".weight"))}
    state = {n: t for n, t in bare.state_dict().items() if n not in aliases}
    for name in bare._keys_to_ignore_on_save or ():
        state.pop(name, None)
    shapes = expected_shapes(bare, None)
    if getattr(bare, "_weight_conversions", None) is None:  # made in memory
        known = get_model_conversion_mapping(bare, add_legacy=False)
        bare._weight_conversions = [rule for rule in known if not isinstance(rule, PrefixChange)]
    name_experts_as_on_disk(bare)
    joining = [rule for rule in bare._weight_conversions if isinstance(rule, WeightConverter)]
    for name in state if joining else ():
        if name.endswith(".weight_packed"):
            for converter in joining:
                if converter.reverse_transform().rename_source_key(name)[1] is not None:
                    raise ValueError(f"{name.removesuffix('_packed')} is a part of a larger matrix")
    # an empty tensor of the packed shape stands for zero points
    state = {n: t.new_empty(shapes.get(n, t.shape)) for n, t in state.items()}
    # without conversions every name stays, after one regular expression for each
    written = revert_weight_conversion(bare, state) if bare._weight_conversions else state
    return {name: (tuple(tensor.shape), "U8") for name, tensor in written.items()}


def _planned_config(bare: PreTrainedModel, compressor: ModelCompressor) -> dict:
    """Return the ``config.json`` of the checkpoint: the source's, which llm-compressor keeps, and
    the quantization."""
    config = bare.config.to_dict()
    source = source_folder(bare.name_or_path)
    if source is not None and (source / "config.json").exists():
        own, _ = bare.config.get_config_dict(str(source))
        if "tie_word_embeddings" in config:  # llm-compressor may have untied them
            own["tie_word_embeddings"] = config["tie_word_embeddings"]
        config = own
    quantization = {"quant_method": "compressed-tensors", SECTION: casp_section(bare)}
    if compressor.quantization_config is not None:
        quantization |= compressor.quantization_config.model_dump(mode="json")
    return config | {"quantization_config": quantization}

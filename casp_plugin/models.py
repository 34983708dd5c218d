"""Models by name: their class, a copy without weights, the names of their tensors on disk."""

import copy
from pathlib import Path

import torch
from compressed_tensors.offload import disable_onloading, remove_dispatch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

__all__ = [
    "bare_model",
    "bytes_on_disk",
    "is_multimodal",
    "load_model",
    "names_in_memory",
    "skeleton",
]


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Whether a model of this config also takes images."""
    return config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def load_model(name: str, **arguments) -> PreTrainedModel:
    """A language or vision-language model in its own dtype, from safetensors only: files of pickle
    run code.

    :param name: folder or Hugging Face id
    :param arguments: more for ``from_pretrained``
    :raises ValueError: if a file is broken, or weights are missing or of another shape
    :raises OSError: if there is no such model, or it has no safetensors
    """
    kind = _auto_class(AutoConfig.from_pretrained(name))
    arguments = {"dtype": "auto", "use_safetensors": True, **arguments}
    try:
        model, found = kind.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    except SafetensorError as error:
        raise ValueError(f"{name}: a safetensors file is broken or cut off: {error}") from None
    if found["missing_keys"]:  # transformers would make them up
        raise ValueError(f"{name} lacks {', '.join(sorted(found['missing_keys'])[:4])}")
    for weight, stored, wanted in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"{weight} of {name} is {tuple(stored)}, but its config says {tuple(wanted)}"
        )
    return model


def bytes_on_disk(model: str | Path) -> int | None:
    """Bytes of a model's safetensors files; None where it is no folder that has any."""
    return sum(path.stat().st_size for path in Path(model).glob("*.safetensors")) or None


def bare_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without weights, on the meta device."""
    with torch.device("meta"):
        return _auto_class(config).from_config(config, dtype=config.dtype or torch.float32)


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model's structure on the meta device: shapes without weights, and without what
    moves these about."""
    memo = {}
    with torch.no_grad(), disable_onloading():
        for parameter in model.parameters():
            empty = torch.empty_like(parameter, device="meta")
            memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for buffer in model.buffers():
            memo[id(buffer)] = torch.empty_like(buffer, device="meta")
        return remove_dispatch(copy.deepcopy(model, memo))


def names_in_memory(names: list[str], model: PreTrainedModel) -> dict[str, str]:
    """What transformers calls tensors of a checkpoint once they are loaded, by their name there.

    :param names: names on disk
    :param model: a model of the checkpoint's class; the meta device will do
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    known = model.state_dict()
    prefix = model.base_model_prefix
    found = {}
    for name in names:
        renamed, _ = rename_source_key(name, renamings, converters, prefix, known)
        found[name] = name if renamed not in known and name in known else renamed
    return found


def _auto_class(config: PreTrainedConfig) -> type:
    return AutoModelForImageTextToText if is_multimodal(config) else AutoModelForCausalLM

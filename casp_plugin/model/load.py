"""Models by name: their class, a copy without weights, the names of their tensors on disk."""

import copy
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from compressed_tensors.offload import disable_onloading, remove_dispatch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.quantizers import HfQuantizer
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from casp_plugin.model.weights import weight_files
from casp_plugin.system.messages import one_line

__all__ = [
    "auto_class",
    "bare_model",
    "bare_source_model",
    "bytes_on_disk",
    "copy_without_weights",
    "is_multimodal",
    "load_model",
    "mapped_copy",
    "names_in_memory",
    "parted_in_memory",
    "read_model_config",
    "runs_remote_code",
]

#: class names that an Auto class builds, by model type; the first Auto class that fits is taken
_AUTO_CLASSES = {
    AutoModelForImageTextToText: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}


def read_model_config(name: str | Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the config of a folder or Hugging Face id.

    :param trust_remote_code: whether Python code that comes with the model may run
    :raises ValueError: if it cannot be read, or needs code of its own that is not trusted
    :raises OSError: if there is no such model
    """
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if not trust_remote_code and "trust_remote_code=True" in str(error):
            raise ValueError(
                f"{name} comes with Python code of its own: read it, then pass "
                "--trust-remote-code (trust_remote_code=True)"
            ) from None
        raise ValueError(f"config.json of {name}: {one_line(error)}") from error
    except (OSError, ImportError):
        raise
    except Exception as error:  # a config's class raises anything at odd fields
        raise ValueError(
            f"config.json of {name}: {type(error).__name__}: {one_line(error)}"
        ) from error


def auto_class(config: PreTrainedConfig) -> type:
    """Return the Auto class that builds the class which ``architectures`` of a config names.

    Any other class would leave tensors of the checkpoint out.

    :raises ValueError: if neither Auto class builds it
    """
    named, known = config.architectures or [], []
    for auto, classes in _AUTO_CLASSES.items():
        built = classes.get(config.model_type, ())
        built = [built] if isinstance(built, str) else list(built)
        if set(built) & set(named) or (built and not named):
            return auto
        if auto.__name__ in (getattr(config, "auto_map", None) or {}):  # code of its own
            return auto
        known += [name for name in built if name not in known]
    where = config.name_or_path or "the model"
    if not known:
        raise ValueError(
            f"{where} is of model type {config.model_type!r}, which transformers builds as neither "
            "a causal language model nor an image-text model"
        )
    raise ValueError(
        f"architectures of {where} is {', '.join(named)}: of model type {config.model_type!r} only "
        f"{' and '.join(known)} can be compressed, which would leave out what else that class has"
    )


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Tell whether a model of this config takes images, too."""
    return auto_class(config) is AutoModelForImageTextToText


def runs_remote_code(model: PreTrainedModel) -> bool:
    """Tell whether a model's class is Python code that came with it, which a user trusted."""
    return type(model).__module__.partition(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME


def load_model(name: str, trust_remote_code: bool = False, **arguments) -> PreTrainedModel:
    """Load a language or vision-language model in its own dtype.

    From safetensors only: pickle files run code.

    :param name: folder or Hugging Face id
    :param trust_remote_code: whether Python code that comes with the model may run
    :param arguments: further arguments of ``from_pretrained``
    :raises ValueError: if a file is broken, weights are missing or of another shape, or
        ``architectures`` names another kind of model
    :raises OSError: if there is no such model, or it has no safetensors
    """
    auto = auto_class(read_model_config(name, trust_remote_code))
    arguments = {"dtype": "auto", "use_safetensors": True, **arguments}
    try:
        model, report = auto.from_pretrained(
            name,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=trust_remote_code,
            **arguments,
        )
    except SafetensorError as error:
        raise ValueError(f"{name}: a safetensors file is broken or cut off: {error}") from None
    except (OSError, ImportError):
        raise
    except Exception as error:  # transformers raises anything at odd files
        _check_generation_config(name)
        told = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"{name} cannot be loaded: {told}") from error
    if report["missing_keys"]:  # transformers would make them up
        raise ValueError(f"{name} lacks {', '.join(sorted(report['missing_keys'])[:4])}")
    for weight, stored, wanted in sorted(report["mismatched_keys"]):
        raise ValueError(
            f"{weight} of {name} is {tuple(stored)}, but its config says {tuple(wanted)}"
        )
    return model


def _check_generation_config(name: str) -> None:
    """Check that the generation settings of a model can be read.

    :raises ValueError: if they cannot
    """
    try:
        GenerationConfig.from_pretrained(name)
    except OSError:  # the model has none
        pass
    except Exception as error:
        raise ValueError(
            f"generation_config.json of {name}: {type(error).__name__}: {one_line(error)}"
        ) from error


def bytes_on_disk(model: str | Path) -> int | None:
    """Return the bytes of a model's safetensors files; None for anything but a folder of them."""
    try:
        return sum(path.stat().st_size for path in weight_files(model))
    except ValueError:
        return None


def bare_model(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the model without weights, on the meta device.

    :raises ValueError: as :func:`auto_class` does
    """
    arguments = {"dtype": config.dtype or torch.float32, "trust_remote_code": trust_remote_code}
    with torch.device("meta"):
        return auto_class(config).from_config(config, **arguments)


def bare_source_model(model: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the model to be compressed without weights, from its config alone.

    :param model: folder or Hugging Face id
    :param trust_remote_code: whether Python code that comes with the model may run
    :raises ValueError: if the model cannot be found, is quantized already, or is of a class that
        cannot be compressed
    """
    config = read_model_config(model, trust_remote_code)
    if getattr(config, "quantization_config", None):
        method = config.quantization_config.get("quant_method")
        raise ValueError(
            f"{model} is already quantized ({method}): start from the full-precision model"
        )
    bare = bare_model(config, trust_remote_code)
    bare.config._name_or_path = model
    return bare


def copy_without_weights(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the meta device: shapes without weights, nothing offloaded."""
    memo = {}
    with torch.no_grad(), disable_onloading():
        for parameter in model.parameters():
            empty = torch.empty_like(parameter, device="meta")
            memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for buffer in model.buffers():
            memo[id(buffer)] = torch.empty_like(buffer, device="meta")
        return remove_dispatch(copy.deepcopy(model, memo))


def mapped_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose weights are read from disk when they are needed.

    They lie in a file that has no name any more, so that nothing is left behind.
    """
    memo = {}
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="casp-") as folder:
        for module in model.modules():
            for name in list(module._parameters):
                with disable_onloading():
                    stored = module._parameters[name]
                if stored is None or id(stored) in memo:
                    continue
                path = Path(folder) / f"{len(memo)}.safetensors"
                value = module._parameters[name].detach().to("cpu", copy=True)
                save_file({"weight": value.contiguous()}, path)
                memo[id(stored)] = nn.Parameter(load_file(path)["weight"], requires_grad=False)
        with disable_onloading():
            for buffer in model.buffers():
                memo[id(buffer)] = buffer.detach().to("cpu", copy=True)
            return remove_dispatch(copy.deepcopy(model, memo)).eval()


def names_in_memory(
    names: Iterable[str], model: PreTrainedModel, quantizer: HfQuantizer | None = None
) -> dict[str, str]:
    """Return the names of a checkpoint's tensors in the loaded model, by their name on disk.

    Tensors that loading merges (experts) share one name; a tensor that the model does not build
    has a name that its ``state_dict`` lacks.

    :param names: names on disk
    :param model: a model of the checkpoint's class, on any device, meta included
    :param quantizer: the quantizer that loads a quantized checkpoint
    """
    renamed, known = _renamed(names, model, quantizer), model.state_dict()
    return {
        name: name if in_memory not in known and name in known else in_memory
        for name, (in_memory, _) in renamed.items()
    }


def parted_in_memory(
    names: Iterable[str], model: PreTrainedModel, quantizer: HfQuantizer | None = None
) -> set[str]:
    """Return the tensors of a model that loading cuts out of larger ones on disk, by name.

    :param names: names on disk
    :param model: a model of the checkpoint's class, on any device, meta included
    :param quantizer: the quantizer that loads a quantized checkpoint
    """
    return {
        in_memory.replace(targets[0], target)
        for in_memory, targets in _renamed(names, model, quantizer).values()
        if len(targets) > 1
        for target in targets
    }


def _renamed(
    names: Iterable[str], model: PreTrainedModel, quantizer: HfQuantizer | None
) -> dict[str, tuple[str, list[str]]]:
    """Return a tensor's name in memory and the target patterns of its converter, by its name on
    disk."""
    conversions = get_model_conversion_mapping(model, hf_quantizer=quantizer)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_source = {s: converter for converter in converters for s in converter.source_patterns}
    known, prefix, names_and_targets = model.state_dict(), model.base_model_prefix, {}
    for name in names:
        renamed, source = rename_source_key(name, renamings, converters, prefix, known)
        targets = by_source[source].target_patterns if source else []
        names_and_targets[name] = renamed, targets
    return names_and_targets

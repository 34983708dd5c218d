"""Round weights by the methods of a study; return them dequantized."""

import re
from collections.abc import Iterable, Sequence

import torch
from compressed_tensors.offload import disable_onloading, remove_dispatch
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from torch import nn
from transformers import PreTrainedModel, set_seed

from casp_plugin.model.components import LANGUAGE, component_of, outside_language
from casp_plugin.model.schemes import weight_args
from casp_plugin.modifiers.awq import awq_mappings, exact_pattern

__all__ = ["changed_by", "mappings_of", "uniform"]

#: norms of vision towers and the layers that read them: CLIP, SigLIP; BLIP-2; Qwen2-VL and later
_VISION_MAPPINGS = [
    (r"(layer_norm|norm)1", r"(q_proj|k_proj|v_proj|qkv)"),
    (r"(layer_norm|norm)2", r"(fc1|gate_proj|up_proj)"),
]


def uniform(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Round a weight to ``bits`` bits with one range for the whole tensor; return it dequantized.

    ``Q(w) = (max - min) / (2^k - 1) * round((2^k - 1) (w - min) / (max - min)) + min``
    (arXiv 2601.15287, appendix A.1).

    :param weight: of any shape
    :param bits: k
    :return: of the shape and dtype of ``weight``
    """
    wide = weight.float()
    low, high = wide.aminmax()
    if low == high:
        return weight.clone()
    step = (high - low) / (2**bits - 1)
    return (((wide - low) / step).round() * step + low).to(weight.dtype)


def changed_by(
    method: str,
    model: PreTrainedModel,
    names: Sequence[str],
    bits: int,
    group_size: int,
    batches: Iterable[dict],
    seed: int,
) -> dict[str, torch.Tensor]:
    """Quantize some layers of a model by llm-compressor's GPTQ or AWQ; return the changed tensors.

    :param method: ``gptq`` or ``awq``
    :param model: the model, of no use afterwards
    :param names: names of the layers, all of one component
    :param bits: width of the codes
    :param group_size: columns that share a scale; -1 for all
    :param batches: calibration data
    :param seed: seed of all random generators
    :return: tensors that differ afterwards, by name, the layers' weights dequantized
    :raises ValueError: if AWQ does not know the model
    """
    with disable_onloading():
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    set_seed(seed)
    oneshot(model=model, recipe=_recipe(method, model, names, bits, group_size), dataset=batches)
    remove_dispatch(model)  # else the copies below go into tensors on the accelerator alone
    for name in names:
        layer = model.get_submodule(name)
        rounded = fake_quantize(
            layer.weight,
            layer.weight_scale,
            layer.weight_zero_point,
            layer.quantization_scheme.weights,
        )
        layer.weight.data.copy_(rounded)
    after = model.state_dict()
    return {
        name: after[name].cpu().clone()
        for name, old in before.items()
        if not torch.equal(after[name], old.to(after[name].device))
    }


def _recipe(
    method: str, model: nn.Module, names: Sequence[str], bits: int, group_size: int
) -> list[Modifier]:
    scheme = QuantizationScheme(targets=list(names), weights=weight_args(bits, group_size))
    groups = {"config_groups": {"group_0": scheme}}
    if method == "gptq":
        return [GPTQModifier(**groups)]
    mappings = mappings_of(model, names)
    scaled = [AWQModifier(mappings=mappings)] if mappings else []
    return [*scaled, QuantizationModifier(**groups)]


def mappings_of(model: nn.Module, names: Sequence[str]) -> list[AWQMapping]:
    """Return the mappings of AWQ for some layers; none where no norm before them is known, so that
    they are rounded to nearest.

    :param names: names of the layers, all of one component
    :raises ValueError: if llm-compressor does not know the language model
    """
    if component_of(names[0]) == LANGUAGE:
        return awq_mappings(model, outside_language(name for name, _ in model.named_modules()))
    return _vision_mappings(model, names)


def _vision_mappings(model: nn.Module, names: Sequence[str]) -> list[AWQMapping]:
    """Return the mappings of the norms of a vision tower that ``_VISION_MAPPINGS`` knows."""
    readers: dict[str, list[str]] = {}
    for name in names:
        block = re.match(r"(.*[.]\d+)[.]", name)
        for norm, leaf in _VISION_MAPPINGS if block else ():
            if re.fullmatch(leaf, name.rpartition(".")[2]):
                for child, _ in model.get_submodule(block[1]).named_children():
                    if re.fullmatch(norm, child):
                        readers.setdefault(f"{block[1]}.{child}", []).append(name)
    return [
        AWQMapping(exact_pattern(norm), [exact_pattern(name) for name in layers])
        for norm, layers in readers.items()
    ]

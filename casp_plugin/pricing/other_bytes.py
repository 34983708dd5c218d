"""Bytes of all tensors that a checkpoint stores beside the weights that bits are chosen for."""

from collections.abc import Sequence

from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.transform import TransformConfig
from compressed_tensors.utils import is_match
from torch import nn

from casp_plugin.model.low_rank_linear import stored_tensors
from casp_plugin.model.schemes import quantized_bytes
from casp_plugin.model.transforms import stored_transforms
from casp_plugin.plan.plan import CompressionPlan

__all__ = ["other_bytes"]


def other_bytes(
    model: nn.Module,
    plan: CompressionPlan,
    transforms: TransformConfig | None,
    quantizers: Sequence[QuantizationConfig],
) -> int:
    """Return the bytes of embeddings, norms, biases, transforms and copied tensors.

    :param plan: whose units are left out
    :param transforms: rotations that the recipe applies
    :param quantizers: configs of other quantizers of the recipe
    """
    units = {name for unit in plan.units for name in unit.modules}
    tied = getattr(model, "all_tied_weights_keys", {})
    stored = stored_tensors(model) | stored_transforms(transforms, model)
    sizes = {name: tensor.numel() * tensor.dtype.itemsize for name, tensor in stored.items()}
    for name, module in model.named_modules():
        scheme = None if name in units else _scheme(name, module, quantizers)
        if scheme is not None:
            weight = f"{name}.weight"
            for target, source in tied.items():  # llm-compressor unties them
                if weight == source:
                    sizes[target] = module.weight.numel() * module.weight.dtype.itemsize
            sizes[weight] = quantized_bytes(module, scheme)
    weights = {f"{name}.weight" for name in units}
    built = sum(size for name, size in sizes.items() if name not in weights)
    return built + sum(tensor.bytes for tensor in plan.copied)


def _scheme(
    name: str, module: nn.Module, quantizers: Sequence[QuantizationConfig]
) -> QuantizationScheme | None:
    """Return the scheme that another quantizer gives a layer; the last one counts."""
    if not isinstance(module, nn.Linear | nn.Embedding):
        return None
    schemes = [
        scheme
        for config in quantizers
        for scheme in config.config_groups.values()
        if is_match(name, module, scheme.targets, config.ignore or ())
    ]
    return schemes[-1] if schemes else None

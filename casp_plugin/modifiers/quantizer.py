"""The quantizing modifier that runs at the chosen widths: found, checked, given its schemes."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from compressed_tensors.offload import update_offload_parameter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.utils import match_name
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.autoround import AutoRoundModifier as StockAutoRoundModifier
from llmcompressor.modifiers.quantization import QuantizationMixin, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from torch import nn

from casp_plugin.model.codebook_linear import CodebookLinear
from casp_plugin.model.schemes import DEFAULT_OBSERVER, FORMAT
from casp_plugin.modifiers.auto_round import AutoRoundModifier
from casp_plugin.modifiers.base import CaspModifier
from casp_plugin.modifiers.codebook import CodebookModifier
from casp_plugin.plan.plan import CompressionPlan

__all__ = [
    "Quantizer",
    "facts_of",
    "find_quantizer",
    "give_schemes",
    "method_of",
    "observer_of",
    "round_unseen",
    "rounds_to_nearest",
    "tunes_layers",
]


#: fields of a codebook modifier that makes a plan of its own
_OF_ONE_WIDTH = ("bits", "targets", "ignore", "components")

#: a modifier that runs at chosen widths
Quantizer = QuantizationMixin | CodebookModifier


def find_quantizer(following: list[Modifier], linears: Iterable[str]) -> Quantizer:
    """Return the first of some modifiers that quantizes.

    :param linears: names of the layers that bits are chosen for
    :raises ValueError: if there is none, or it has settings of its own for these layers
    """
    quantizer = next((m for m in following if isinstance(m, Quantizer)), None)
    if quantizer is None:
        raise ValueError(
            "BitAllocationModifier only chooses bit widths: add a quantizing modifier after it, "
            "without a config of its own (GPTQModifier, QuantizationModifier, AutoRoundModifier "
            "or TrellisModifier)"
        )
    name = type(quantizer).__name__
    if isinstance(quantizer, StockAutoRoundModifier) and not tunes_layers(quantizer):
        raise ValueError(
            "llm-compressor's own AutoRoundModifier tunes all layers of a plan under one scheme "
            "and loses their zero points: use casp_plugin.AutoRoundModifier"
        )
    unset = {"config_groups": None, "scheme": None, "targets": ["Linear"]}
    if isinstance(quantizer, CodebookModifier):
        fields = type(quantizer).model_fields
        unset = {f: fields[f].get_default(call_default_factory=True) for f in _OF_ONE_WIDTH}
    given = [field for field, default in unset.items() if getattr(quantizer, field) != default]
    if given:
        raise ValueError(
            f"{name} after BitAllocationModifier must leave {', '.join(given)} unset: "
            "BitAllocationModifier fills them"
        )
    for module in linears if isinstance(quantizer, QuantizationMixin) else ():
        if any(match_name(module, pattern) for pattern in quantizer.ignore):
            raise ValueError(
                f"{name}.ignore excludes {module}, which BitAllocationModifier allocates bits to: "
                "put it into BitAllocationModifier.ignore instead"
            )
    return quantizer


def tunes_layers(quantizer: Quantizer) -> bool:
    """Tell whether a quantizer tunes decoder layers as a whole, and no layer outside them."""
    return isinstance(quantizer, AutoRoundModifier)


def rounds_to_nearest(quantizer: Quantizer) -> bool:
    """Tell whether a quantizer rounds every weight by itself."""
    return isinstance(quantizer, QuantizationModifier)


def method_of(following: list[Modifier]) -> str:
    """Return the name that ``casp sensitivity`` has for the method of some modifiers: ``gptq``,
    ``awq``, or ``uniform`` for rounding to nearest."""
    if any(isinstance(modifier, AWQModifier) for modifier in following):
        return "awq"
    quantizer = next(m for m in following if isinstance(m, Quantizer))
    return "uniform" if rounds_to_nearest(quantizer) else "gptq"


def facts_of(quantizer: Quantizer) -> str | dict:
    """Return what the prices of widths depend on: the observer, or the settings of a codec."""
    if isinstance(quantizer, CodebookModifier):
        return quantizer.settings
    return observer_of(quantizer)


def observer_of(quantizer: QuantizationMixin) -> str:
    """Return the observer that a quantizer takes the ranges of weights from."""
    asked = (quantizer.observer or {}).get("weights") or quantizer.weight_observer
    return asked or DEFAULT_OBSERVER


@torch.no_grad()
def round_unseen(model: nn.Module, names: Iterable[str]) -> None:
    """Give layers that no token reached scales and zero points of their own range; a quantizer that
    goes by data leaves these as they were allocated.

    :param names: of quantized linears
    """
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, CodebookLinear):
            continue
        args = module.quantization_scheme.weights
        weight = module.weight.float()
        size = args.group_size if (args.group_size or -1) > 0 else weight.shape[1]
        groups = weight.unflatten(1, (-1, size))  # (rows, groups, columns)
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        update_offload_parameter(module, "weight_scale", scale.to(module.weight_scale.dtype))
        if hasattr(module, "weight_zero_point"):
            zero = zero.to(module.weight_zero_point.dtype)
            update_offload_parameter(module, "weight_zero_point", zero)


def give_schemes(
    modifier: CaspModifier,
    plan: CompressionPlan,
    schemes: dict[int, QuantizationArgs],
    quantizer: QuantizationMixin,
) -> None:
    """Write the choice of a plan into the quantizer, as explicit module names.

    :param modifier: hands it over, and takes it back when the run is over
    :param schemes: weight scheme of each bit width
    """
    targets = defaultdict(list)
    for unit in plan.units:
        targets[unit.choice.bits] += unit.modules
    groups = {
        f"w{bits}": QuantizationScheme(targets=names, weights=schemes[bits], format=FORMAT)
        for bits, names in sorted(targets.items())
    }
    modifier.hand_over(quantizer, "config_groups", groups)
    quantizer._resolved_config = None  # resolved from nothing when the recipe was parsed
    quantizer.requires_calibration_data |= any(
        args.observer == DEFAULT_OBSERVER for args in schemes.values()
    )

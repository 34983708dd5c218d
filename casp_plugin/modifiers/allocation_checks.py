"""Checks and warnings of an allocation of bits: layers without data, other matrices, kernels."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

from casp_plugin.model.components import LANGUAGE
from casp_plugin.model.low_rank_linear import LowRankLinear
from casp_plugin.modifiers.base import RecipeContext
from casp_plugin.plan.plan import CompressionPlan

__all__ = [
    "check_components_reached",
    "check_tuned",
    "kernel_warnings",
    "other_matrices_warnings",
]

#: share of the weights that matrices which are no linear layers may have without a warning
WARNED_SHARE = 0.05


def check_tuned(linears: Iterable[str], layers: Sequence[str], context: RecipeContext) -> None:
    """Check that AutoRound tunes all layers, since others would keep the scales they begin with.
    Layers of a vision tower run inside code that llm-compressor cannot trace.

    :param linears: names of the layers that bits are chosen for
    :param layers: names of the decoder layers
    :raises ValueError: if a linear lies outside the decoder layers of the language model
    """
    for name in linears:
        inside = any(name.startswith(f"{layer}.") for layer in layers)
        if not inside or context.component_of(name) != LANGUAGE:
            raise ValueError(
                f"AutoRoundModifier tunes the decoder layers of the language model only, not "
                f"{name}: put it into BitAllocationModifier.ignore, leave its component out, "
                "or use GPTQModifier"
            )


def check_components_reached(
    linears: Iterable[str], unreached: Iterable[str], context: RecipeContext
) -> None:
    """Check that the data reaches every component.

    :param linears: names of the layers that bits are chosen for
    :param unreached: names of those that no token reaches
    :raises ValueError: if no token reaches a component
    """
    reached = set(linears) - set(unreached)
    alive = {context.component_of(name) for name in reached}
    for component in dict.fromkeys(map(context.component_of, linears)):
        if component not in alive:
            raise ValueError(
                f"BitAllocationModifier.components: no calibration token reached {component!r}: "
                "calibrate on data that does, images for a vision-language model, or leave it out"
            )


def kernel_warnings(plan: CompressionPlan, symmetric: bool) -> list[str]:
    """Return the packages that vLLM on CUDA needs for the widths on offer.

    :param symmetric: whether the codes are
    """
    bits = defaultdict(set)
    for unit in plan.units:
        for candidate in unit.candidates:
            if candidate.needs:
                bits[candidate.needs, candidate.codec].add(candidate.bits)
    warnings = []
    for (package, codec), widths in sorted(bits.items(), key=str):
        what = f"{codec} codes"
        if codec is None:
            integers = "symmetric" if symmetric else "asymmetric"
            what = f"{integers} {' and '.join(map(str, sorted(widths)))} bits"
        warnings.append(
            f"vLLM on CUDA runs {what} only with an extra package: pip install {package}"
        )
    return warnings


def other_matrices_warnings(model: nn.Module) -> list[str]:
    """Name the largest matrices of a model that are no linear layers, where they weigh much."""
    others = {
        f"{name}.{weight}": values.numel()
        for name, module in model.named_modules()
        for weight, values in module.named_parameters(recurse=False)
        if values.ndim > 1
        and not isinstance(module, nn.Linear | nn.Embedding | LowRankLinear | _ConvNd)
    }
    whole = sum(weight.numel() for weight in model.parameters())
    if sum(others.values()) <= WARNED_SHARE * whole:
        return []
    largest = sorted(others, key=others.get, reverse=True)[:4]
    return [
        f"{len(others)} matrices stay as they are, since they are no linear layers: "
        f"{', '.join(largest)}"
    ]

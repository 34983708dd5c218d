"""Warnings that a plan gives a user before deploying."""

from torch import nn
from torch.nn.modules.conv import _ConvNd

from casp_plugin.model.low_rank_linear import LowRankLinear
from casp_plugin.plan.plan import CompressionPlan

__all__ = ["kernel_warnings", "other_matrices_warnings"]

#: share of the weights that matrices which are no linear layers may have without a warning
WARNED_SHARE = 0.05


def kernel_warnings(plan: CompressionPlan, symmetric: bool) -> list[str]:
    """Return the packages that vLLM on CUDA needs for the widths on offer.

    :param symmetric: whether the codes are
    """
    candidates = [c for unit in plan.units for c in unit.candidates if c.needs]
    warnings = []
    for package in sorted({c.needs for c in candidates}):
        bits = sorted({c.bits for c in candidates if c.needs == package})
        codes = "symmetric" if symmetric else "asymmetric"
        warnings.append(
            f"vLLM on CUDA runs {codes} {' and '.join(map(str, bits))} bits only with an extra "
            f"package: pip install {package}"
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

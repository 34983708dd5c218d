"""Hadamard transforms of the inputs of linear layers, as QuIPModifier of llm-compressor makes them.

A layer that runs ``(W R^T)(R x)`` instead of ``W x`` computes the same, but its weights and inputs
have no outliers left (QuIP, arXiv 2307.13304; QuaRot, arXiv 2404.00456). The weight is rotated
once, the input each time. Which layers are rotated stands in the ``transform_config`` of a
checkpoint; here is how it is read, and what the rotation is.
"""

import torch
from compressed_tensors.transform import TransformConfig, TransformLocation
from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix
from compressed_tensors.utils import is_match
from torch import nn

__all__ = [
    "check_transforms",
    "hadamard",
    "input_block",
    "rotate",
    "rotate_moment",
    "stored_transforms",
]


def check_transforms(config: TransformConfig) -> None:
    """
    :raises ValueError: for transforms that cannot be made again from the config alone
    """
    for name, scheme in config.config_groups.items():
        if scheme.type != "hadamard" or scheme.randomize:
            raise ValueError(
                f"transform {name!r} is of type {scheme.type!r}: use transform_type 'hadamard' "
                "without randomize, which needs no stored matrix"
            )
        where = {args.location for args in scheme.apply}
        wrong = where - {TransformLocation.INPUT, TransformLocation.WEIGHT_INPUT}
        if wrong:
            raise ValueError(
                f"transform {name!r} is applied at {sorted(wrong)}: only rotations of the inputs "
                "('v') can be served"
            )


def input_block(config: TransformConfig | None, name: str, linear: nn.Module, columns: int) -> int:
    """Size of the Hadamard blocks that rotate the input of a linear layer; 1 for none.

    :param config: transforms of the model, None for none
    :param name: name of the layer
    :param linear: the layer, or what stands for it; its class may be a target
    :param columns: size of its input
    :raises ValueError: if the blocks do not divide the input, or are no power of two
    """
    for scheme in config.config_groups.values() if config is not None else ():
        for args in scheme.apply:
            if args.location == TransformLocation.INPUT and is_match(
                name, linear, args.targets, args.ignore
            ):
                block = scheme.head_dim or columns
                if columns % block or block & (block - 1):
                    raise ValueError(
                        f"{name}: its {columns} columns cannot be rotated in blocks of {block}: "
                        "set transform_block_size to a power of two that divides them"
                    )
                return block
    return 1


def hadamard(block: int, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """Sylvester's Hadamard matrix, shape (block, block), scaled by a power of two, which 16 bits
    hold exactly: orthogonal for blocks of 4^n, too large by the square root of two for the others.

    :param block: a power of two
    """
    return deterministic_hadamard_matrix(block, dtype, device) * 2.0 ** -(_log2(block) // 2)


def rotate(values: torch.Tensor, block: int, matrix: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply the last dimension by Sylvester's Hadamard matrix, block by block. The matrix is
    orthogonal, symmetric and its own inverse: inputs and rows of weights turn alike.

    :param values: shape (..., columns)
    :param block: a power of two that divides the columns; 1 changes nothing
    :param matrix: what :func:`hadamard` gives, if it is at hand
    """
    if block == 1:
        return values
    if matrix is None:
        matrix = hadamard(block, values.dtype, values.device)
    turned = (values.unflatten(-1, (-1, block)) @ matrix).flatten(-2)
    return turned * 0.5**0.5 if _log2(block) % 2 else turned


def _log2(power: int) -> int:
    return power.bit_length() - 1


def rotate_moment(moment: torch.Tensor, block: int) -> torch.Tensor:
    """E[x x^T] of the rotated input from that of the input, shape (columns, columns)."""
    return rotate(rotate(moment, block).T, block)


def stored_transforms(config: TransformConfig | None, model: nn.Module) -> dict[str, torch.Tensor]:
    """Matrices that compressed-tensors stores, one for each scheme and size, though they follow
    from the config: tensor name to (block, block) entries of the scheme's precision.

    :param model: with its factored layers in place
    :return: tensor name to an empty tensor of its shape and type
    """
    found = {}
    for group, scheme in config.config_groups.items() if config is not None else ():
        seen = set()
        one = TransformConfig(config_groups={group: scheme})
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                block = input_block(one, name, module, module.in_features)
                if block > 1 and block not in seen:
                    seen.add(block)
                    matrix = torch.empty(block, block, dtype=scheme.precision, device="meta")
                    found[f"{name}.{group}_{TransformLocation.INPUT.value}.weight"] = matrix
    return found

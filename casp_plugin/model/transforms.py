"""Hadamard transforms of the inputs of linear layers, as QuIPModifier of llm-compressor makes them.

A layer that runs ``(W R^T)(R x)`` instead of ``W x`` computes the same, but its weights and inputs
have no outliers (QuIP, arXiv 2307.13304; QuaRot, arXiv 2404.00456). The weight is rotated once, the
input at every call. The ``transform_config`` of a checkpoint lists the rotated layers.
"""

import torch
from compressed_tensors.transform import TransformConfig, TransformLocation
from compressed_tensors.utils import is_match
from torch import nn

__all__ = ["check_transforms", "input_block", "stored_transforms"]


def check_transforms(config: TransformConfig) -> None:
    """Check that transforms can be made again from the config alone, and be served.

    :raises ValueError: if they cannot
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
    """Return the size of the Hadamard blocks that rotate the input of a linear layer.

    :param config: transforms of the model; None for none
    :param name: name of the layer
    :param linear: the layer, or a module of its class, which may be a target
    :param columns: size of its input
    :return: a power of two; 1 for no rotation
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


def stored_transforms(config: TransformConfig | None, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the matrices that compressed-tensors stores, one per scheme and block size.

    They follow from the config, but are stored all the same.

    :param model: with its factored layers in place
    :return: tensor name to an empty tensor, shape (block, block), of the scheme's precision
    """
    matrices = {}
    for group, scheme in config.config_groups.items() if config is not None else ():
        blocks = set()
        single = TransformConfig(config_groups={group: scheme})
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                block = input_block(single, name, module, module.in_features)
                if block > 1 and block not in blocks:
                    blocks.add(block)
                    matrix = torch.empty(block, block, dtype=scheme.precision, device="meta")
                    matrices[f"{name}.{group}_{TransformLocation.INPUT.value}.weight"] = matrix
    return matrices

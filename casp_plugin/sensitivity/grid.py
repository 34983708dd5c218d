"""The models of a study: what is quantized in each, by which method, to how many bits."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations

import numpy as np
import torch

from casp_plugin.model.location import AXES, Part, levels
from casp_plugin.model.schemes import stored_bytes, weight_args

__all__ = [
    "METHODS",
    "UNIFORM",
    "Configuration",
    "Layer",
    "features",
    "grid",
    "space_filling",
    "weights_of",
]

UNIFORM = "uniform"
#: bit widths of each method (arXiv 2601.15287, sections 3 and 4)
METHODS: dict[str, tuple[int, ...]] = {
    UNIFORM: (2, 4, 6, 8),
    "gptq": (2, 3, 4, 5, 6, 8),
    "awq": (2, 3, 4, 5, 6, 8),
}


@dataclass(frozen=True)
class Layer:
    """A linear layer that a study may quantize.

    :param part: where it stands
    :param shape: (out, in) of its weight
    """

    part: Part
    shape: tuple[int, int]


@dataclass(frozen=True)
class Configuration:
    """One model of a study.

    :param method: one of ``METHODS``
    :param bits: of the layers that are quantized
    :param component: components that hold them
    :param block: thirds of the blocks that hold them; layers outside blocks are in all
    :param kind: kinds of layer that they are; layers outside blocks are of all
    """

    method: str
    bits: int
    component: tuple[str, ...]
    block: tuple[str, ...]
    kind: tuple[str, ...]

    def takes(self, part: Part) -> bool:
        """Whether layers of a part are quantized."""
        return all(
            (level := getattr(part, axis)) is None or level in getattr(self, axis)
            for axis in AXES.values()
        )

    def row(self) -> dict[str, str | int]:
        """As columns of a table; levels joined by ``+``."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {k: "+".join(v) if isinstance(v, tuple) else v for k, v in values.items()}


def grid(method: str, layers: Mapping[str, Layer]) -> list[Configuration]:
    """All that a study of a method looks at (arXiv 2601.15287, algorithm 1).

    ``uniform``: every width for every subset of components, of block groups and of layer types;
    others: for every subset of components, or as ``uniform`` where there is but one. Subsets that
    quantize the same layers count once, by the largest of their names.

    :param layers: all layers, by name
    """
    parts = [layer.part for layer in layers.values()]
    found = {}
    sets = [list(_subsets(levels(parts, axis))) for axis in AXES]
    if method != UNIFORM and len(sets[0]) > 1:
        sets[1:] = [each[-1:] for each in sets[1:]]
    for bits in METHODS[method]:
        for component in sets[0]:
            for block in sets[1]:
                for kind in sets[2]:
                    one = Configuration(method, bits, component, block, kind)
                    taken = frozenset(name for name, each in layers.items() if one.takes(each.part))
                    if taken:
                        found[bits, taken] = one
    return list(found.values())


def features(
    configuration: Configuration,
    layers: Mapping[str, Layer],
    dtype: torch.dtype,
    group_size: int,
) -> dict[str, float]:
    """Average bits of a configuration: of all layers, as ``bits_per_weight``, and of each level of
    each axis, as ``bits_vision`` and so on. Scales and zero points count.

    :param dtype: of the model; layers left alone have its width
    :param group_size: of methods that share scales in groups; ``uniform`` has one a tensor
    """
    spent = {}
    for name, layer in layers.items():
        if not configuration.takes(layer.part):
            spent[name] = _weights(layer) * dtype.itemsize * 8
        elif configuration.method == UNIFORM:  # least and largest weight beside the codes
            spent[name] = _weights(layer) * configuration.bits + 2 * dtype.itemsize * 8
        else:
            scheme = weight_args(configuration.bits, group_size)
            spent[name] = stored_bytes(layer.shape, scheme, dtype) * 8

    def average(names: Sequence[str]) -> float:
        return sum(spent[name] for name in names) / sum(_weights(layers[name]) for name in names)

    found = {"bits_per_weight": average(list(layers))}
    parts = [layer.part for layer in layers.values()]
    for axis, field in AXES.items():
        for level in levels(parts, axis):
            inside = [n for n, each in layers.items() if getattr(each.part, field) == level]
            found[f"bits_{level}"] = average(inside)
    return found


def weights_of(layers: Mapping[str, Layer], axis: str) -> dict[str, float]:
    """Share of all weights that each level of an axis holds.

    :param axis: one of ``AXES``
    """
    whole = sum(map(_weights, layers.values()))
    found = dict.fromkeys(levels((layer.part for layer in layers.values()), axis), 0.0)
    for layer in layers.values():
        level = getattr(layer.part, AXES[axis])
        if level is not None:
            found[level] += _weights(layer) / whole
    return found


def space_filling(points: np.ndarray, first: Sequence[int]) -> list[int]:
    """An order in which every beginning covers the points well: each one is the farthest from all
    before it (Gonzalez' k-center).

    :param points: (points, dimensions); each dimension counts by its own range
    :param first: those that come first, at least one
    """
    spread = np.ptp(points, axis=0)
    scaled = (points - points.min(axis=0)) / np.where(spread > 0, spread, 1)
    nearest = np.full(len(scaled), np.inf)
    order: list[int] = []
    while len(order) < len(scaled):
        order.append(first[len(order)] if len(order) < len(first) else int(nearest.argmax()))
        nearest = np.minimum(nearest, np.linalg.norm(scaled - scaled[order[-1]], axis=1))
        nearest[order] = -1
    return order


def _subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """All that are not empty, the largest last; the empty one where there are no names."""
    if not names:
        yield ()
    for size in range(1, len(names) + 1):
        yield from combinations(names, size)


def _weights(layer: Layer) -> int:
    return layer.shape[0] * layer.shape[1]

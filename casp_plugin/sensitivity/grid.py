"""The models of a study: which layers each quantizes, by which method, to how many bits."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations, product

import numpy as np
import torch

from casp_plugin.maths.average_bits import average_bits, bytes_of
from casp_plugin.model.location import AXES, Location, levels
from casp_plugin.model.schemes import stored_bytes, weight_args

__all__ = [
    "COLUMNS",
    "METHODS",
    "UNIFORM",
    "Configuration",
    "Layer",
    "features",
    "grid",
    "space_filling",
    "weights_of",
]

#: columns of the points of a study, by axis
COLUMNS = dict(zip(AXES, ("component", "block", "kind"), strict=True))
UNIFORM = "uniform"
#: bit widths of every method (arXiv 2601.15287, sections 3 and 4)
METHODS: dict[str, tuple[int, ...]] = {
    UNIFORM: (2, 4, 6, 8),
    "gptq": (2, 3, 4, 5, 6, 8),
    "awq": (2, 3, 4, 5, 6, 8),
}


@dataclass(frozen=True)
class Layer:
    """A linear layer that a study may quantize.

    :param location: its location in the model
    :param shape: shape of its weight, (out, in)
    """

    location: Location
    shape: tuple[int, int]

    @property
    def weights(self) -> int:
        """Return the number of its weights."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Configuration:
    """One model of a study: it quantizes the layers that are in one of the components, in one of
    the thirds of the blocks and of one of the layer types.

    :param method: one of ``METHODS``
    :param bits: width of the quantized layers
    :param component: components
    :param block: thirds of the blocks; layers outside blocks are in all of them
    :param kind: layer types; layers outside blocks are of all of them
    """

    method: str
    bits: int
    component: tuple[str, ...]
    block: tuple[str, ...]
    kind: tuple[str, ...]

    def takes(self, location: Location) -> bool:
        """Return whether layers of a location are quantized."""
        return all(
            (level := location.level(axis)) is None or level in getattr(self, column)
            for axis, column in COLUMNS.items()
        )

    def row(self) -> dict[str, str | int]:
        """Return the columns of a table's row, levels joined by ``+``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: "+".join(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }


def grid(method: str, layers: Mapping[str, Layer]) -> list[Configuration]:
    """Return all models of a method (arXiv 2601.15287, algorithm 1).

    ``uniform`` takes every width with every subset of components, of block groups and of layer
    types; other methods take subsets of components only, unless there is a single component.
    Subsets that quantize the same layers count once, as the largest of them.

    :param method: one of ``METHODS``
    :param layers: layers that may be quantized, by name
    """
    locations = [layer.location for layer in layers.values()]
    components, blocks, kinds = (list(_subsets(levels(locations, axis))) for axis in AXES)
    if method != UNIFORM and len(components) > 1:
        blocks, kinds = blocks[-1:], kinds[-1:]  # the largest subsets
    points = {}
    for bits in METHODS[method]:
        for component, block, kind in product(components, blocks, kinds):
            point = Configuration(method, bits, component, block, kind)
            quantized = frozenset(
                name for name, layer in layers.items() if point.takes(layer.location)
            )
            if quantized:
                points[bits, quantized] = point
    return list(points.values())


def features(
    configuration: Configuration,
    layers: Mapping[str, Layer],
    dtype: torch.dtype,
    group_size: int,
) -> dict[str, float]:
    """Return average bits of a configuration, scales and zero points included: of all layers, as
    ``bits_per_weight``, and of every level of every axis, as ``bits_vision`` and so on.

    :param configuration: one model of a study
    :param layers: layers that may be quantized, by name
    :param dtype: dtype of the layers that are not quantized
    :param group_size: columns that share a scale; ``uniform`` has one range for every tensor
    """
    stored = {}  # bytes
    for name, layer in layers.items():
        if not configuration.takes(layer.location):
            stored[name] = layer.weights * dtype.itemsize
        elif configuration.method == UNIFORM:  # codes, and the least and the largest weight
            stored[name] = bytes_of(layer.weights * configuration.bits) + 2 * dtype.itemsize
        else:
            scheme = weight_args(configuration.bits, group_size)
            stored[name] = stored_bytes(layer.shape, scheme, dtype)

    def average(names: Sequence[str]) -> float:
        weights = sum(layers[name].weights for name in names)
        return average_bits(sum(stored[name] for name in names), weights)

    bits = {"bits_per_weight": average(list(layers))}
    locations = [layer.location for layer in layers.values()]
    for axis in AXES:
        for level in levels(locations, axis):
            inside = [name for name in layers if layers[name].location.level(axis) == level]
            bits[f"bits_{level}"] = average(inside)
    return bits


def weights_of(layers: Mapping[str, Layer], axis: str) -> dict[str, float]:
    """Return the share of all weights in every level of an axis, 0 to 1.

    :param layers: layers that may be quantized, by name
    :param axis: one of ``AXES``
    """
    whole = sum(layer.weights for layer in layers.values())
    shares = dict.fromkeys(levels((layer.location for layer in layers.values()), axis), 0.0)
    for layer in layers.values():
        level = layer.location.level(axis)
        if level is not None:
            shares[level] += layer.weights / whole
    return shares


def space_filling(points: np.ndarray, first: Sequence[int]) -> list[int]:
    """Return the indices of points in an order whose every beginning covers them well: the next
    point is the one farthest from all before it (Gonzalez' k-center, 1985).

    :param points: (points, dimensions); distances are relative to the range of a dimension
    :param first: indices of the points that come first, at least one
    """
    spread = np.ptp(points, axis=0)
    scaled = (points - points.min(axis=0)) / np.where(spread > 0, spread, 1)
    nearest = np.full(len(scaled), np.inf)  # distances to the nearest ordered point, (points,)
    order: list[int] = []
    while len(order) < len(scaled):
        order.append(first[len(order)] if len(order) < len(first) else int(nearest.argmax()))
        nearest = np.minimum(nearest, np.linalg.norm(scaled - scaled[order[-1]], axis=1))
        nearest[order] = -1
    return order


def _subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield all subsets that are not empty, the largest last; without names, the empty subset."""
    if not names:
        yield ()
    for size in range(1, len(names) + 1):
        yield from combinations(names, size)

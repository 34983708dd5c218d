"""Location of a linear layer in a model: its component, its third of the blocks, its type."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from casp_plugin.model.components import component_of

__all__ = ["AXES", "BLOCKS", "LAYER_TYPES", "Location", "find_locations", "levels"]

#: thirds of a stack of blocks
BLOCKS = ("front", "middle", "end")
ATTENTION, FEED_FORWARD = LAYER_TYPES = ("attention", "feed-forward")
#: axes that tell layers apart, in the order of the fields of a location
AXES = ("component", "block group", "layer type")


@dataclass(frozen=True)
class Location:
    """Location of one linear layer.

    :param component: as :func:`~casp_plugin.model.components.component_of` names it
    :param block: third of its component's blocks; None outside a stack of at least three
    :param layer_type: ``attention`` or ``feed-forward``; None outside such a stack
    """

    component: str
    block: str | None
    layer_type: str | None

    def level(self, axis: str) -> str | None:
        """Return the level of an axis that the layer belongs to; None where it has none.

        :param axis: one of ``AXES``
        """
        values = self.component, self.block, self.layer_type
        return dict(zip(AXES, values, strict=True))[axis]


def find_locations(
    model: nn.Module,
    names: Iterable[str],
    patterns: Mapping[str, Iterable[str]] | None = None,
) -> dict[str, Location]:
    """Return the location of linear layers, by name.

    Blocks are the modules of the outermost list that holds a layer; the thirds are cut as in
    arXiv 2601.15287, at n // 3 and 2 n // 3 of n blocks.

    :param names: names of the layers
    :param patterns: parts of paths that begin a component, beside the known ones
    """
    stacks = {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    return {name: _location(name, stacks, component_of(name, patterns)) for name in names}


def levels(locations: Iterable[Location], axis: str) -> list[str]:
    """Return the levels of an axis that occur, blocks and layer types in their own order.

    :param axis: one of ``AXES``
    """
    occurring = dict.fromkeys(location.level(axis) for location in locations)
    known = [*BLOCKS, *LAYER_TYPES]
    place = {level: known.index(level) if level in known else -1 for level in occurring if level}
    return sorted(place, key=place.__getitem__)


def _location(name: str, stacks: Mapping[str, int], component: str) -> Location:
    path = name.split(".")
    for cut in range(1, len(path)):
        stack = ".".join(path[:cut])
        if stack in stacks and path[cut].isdecimal():
            count, index = stacks[stack], int(path[cut])
            if count < len(BLOCKS):
                break
            third = 0 if index < count // 3 else 1 if index < 2 * count // 3 else 2
            inside = ".".join(path[cut + 1 :])
            attends = re.search(r"attn|attention", inside, re.IGNORECASE)
            return Location(component, BLOCKS[third], ATTENTION if attends else FEED_FORWARD)
    return Location(component, None, None)

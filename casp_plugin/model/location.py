"""Where a linear layer stands in a model: its component, its third of the blocks, its kind."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from casp_plugin.model.components import component_of

__all__ = ["AXES", "BLOCKS", "KINDS", "Part", "find_parts", "levels"]

#: thirds of a stack of blocks
BLOCKS = ("front", "middle", "end")
ATTENTION, FEED_FORWARD = KINDS = ("attention", "feed-forward")
#: fields of a ``Part``, by what tables call them
AXES = {"component": "component", "block group": "block", "layer type": "kind"}


@dataclass(frozen=True)
class Part:
    """
    :param component: as :func:`~casp_plugin.model.components.component_of` names it
    :param block: third of its component's blocks; None outside a stack of at least three
    :param kind: ``attention`` or ``feed-forward``; None outside a stack
    """

    component: str
    block: str | None
    kind: str | None


def find_parts(
    model: nn.Module,
    names: Iterable[str],
    patterns: Mapping[str, Iterable[str]] | None = None,
) -> dict[str, Part]:
    """The part that each of some linear layers is.

    Blocks are the modules of the outermost list that holds a layer; the thirds are cut where
    arXiv 2601.15287 cuts them, at n // 3 and 2 n // 3 of n blocks.

    :param names: of the layers
    :param patterns: more parts of paths that begin a component
    """
    stacks = {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    return {name: _part(name, stacks, component_of(name, patterns)) for name in names}


def levels(parts: Iterable[Part], axis: str) -> list[str]:
    """What an axis tells apart among some parts, blocks and kinds in their own order.

    :param axis: one of ``AXES``
    """
    found = dict.fromkeys(getattr(part, AXES[axis]) for part in parts)
    known = [*BLOCKS, *KINDS]
    place = {level: known.index(level) if level in known else -1 for level in found if level}
    return sorted(place, key=place.__getitem__)


def _part(name: str, stacks: Mapping[str, int], component: str) -> Part:
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
            return Part(component, BLOCKS[third], ATTENTION if attends else FEED_FORWARD)
    return Part(component, None, None)

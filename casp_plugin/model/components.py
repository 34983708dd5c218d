"""Components of a multimodal model, told from the names of its modules."""

import re
from collections.abc import Iterable, Mapping
from functools import cache

__all__ = [
    "COMPONENTS",
    "LANGUAGE",
    "component_of",
    "find_components",
    "merged_patterns",
    "outside_language",
]

LANGUAGE = "language"
#: regular expressions for one part of a module's path, by component; the first match names the
#: component, and a path without any match belongs to the language model
COMPONENTS: dict[str, list[str]] = {
    "connector": [
        "multi_modal_projector",  # LLaVA and its kin, PaliGemma, Gemma3
        "connector",  # Idefics3, SmolVLM
        "merger",  # Qwen2-VL to Qwen3-VL, inside `visual`
        "deepstack_merger_list",
        "qformer",  # BLIP-2
        "language_projection",
        "(generation_)?aligner",  # Janus
        "embed_vision",  # Gemma 4
    ],
    "vision": ["(vision|image|video)_(tower|model)", "visual", "vision_embed_tokens"],
    "audio": ["audio_(tower|model)"],
}


def component_of(name: str, patterns: Mapping[str, Iterable[str]] | None = None) -> str:
    """Return the component that a module belongs to.

    :param name: name of the module, for instance ``model.visual.merger.mlp.0``
    :param patterns: expressions that come before ``COMPONENTS``, for known or new components
    :return: ``connector``, ``vision``, ``language`` or a component of ``patterns``
    """
    parts = name.split(".")
    for table in (patterns or {}, COMPONENTS):
        for component, expressions in table.items():
            if any(_fits(pattern, part) for pattern in expressions for part in parts):
                return component
    return LANGUAGE


@cache
def _fits(pattern: str, part: str) -> bool:
    return re.fullmatch(pattern, part) is not None


def find_components(
    names: Iterable[str], patterns: Mapping[str, Iterable[str]] | None = None
) -> dict[str, list[str]]:
    """Return module names by component, in the order of the names."""
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(component_of(name, patterns), []).append(name)
    return members


def merged_patterns(tables: Iterable[Mapping[str, Iterable[str]]]) -> dict[str, list[str]]:
    """Return the patterns of all tables, by component, those of earlier tables first."""
    merged: dict[str, list[str]] = {}
    for table in tables:
        for component, patterns in table.items():
            merged.setdefault(component, []).extend(patterns)
    return merged


def outside_language(
    names: Iterable[str], patterns: Mapping[str, Iterable[str]] | None = None
) -> list[str]:
    """Return the names outside the language model whose parent module is not among them."""
    outside = dict.fromkeys(name for name in names if component_of(name, patterns) != LANGUAGE)
    return [name for name in outside if name.rpartition(".")[0] not in outside]

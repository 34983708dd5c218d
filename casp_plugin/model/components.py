"""Which component of a multimodal model a module belongs to, told from its name."""

import re
from collections.abc import Iterable, Mapping

__all__ = ["COMPONENTS", "LANGUAGE", "component_of", "find_components", "outside_language"]

LANGUAGE = "language"
#: part of a module's path that begins a component, the first that matches names it; whatever
#: matches none is the language model
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
    """
    :param name: of a module, for instance ``model.visual.merger.mlp.0``
    :param patterns: more parts of paths for components, known ones or new; they come first
    :return: ``connector``, ``vision``, ``language`` or a component of ``patterns``
    """
    parts = name.split(".")
    for table in (patterns or {}, COMPONENTS):
        for component, wanted in table.items():
            if any(re.fullmatch(pattern, part) for pattern in wanted for part in parts):
                return component
    return LANGUAGE


def find_components(
    names: Iterable[str], patterns: Mapping[str, Iterable[str]] | None = None
) -> dict[str, list[str]]:
    """Module names by component, in their order."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(component_of(name, patterns), []).append(name)
    return found


def outside_language(
    names: Iterable[str], patterns: Mapping[str, Iterable[str]] | None = None
) -> list[str]:
    """Outermost ones of some modules that are not of the language model."""
    outside = dict.fromkeys(name for name in names if component_of(name, patterns) != LANGUAGE)
    return [name for name in outside if name.rpartition(".")[0] not in outside]

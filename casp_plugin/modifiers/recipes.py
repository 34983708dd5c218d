"""Recipes read and checked, with a budget or a cache filled in."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from llmcompressor.modifiers import Modifier, ModifierFactory
from llmcompressor.recipe import Recipe

from casp_plugin.data.sources import check_utf8
from casp_plugin.modifiers.base import CaspModifier
from casp_plugin.modifiers.bit_allocation import BitAllocationModifier
from casp_plugin.system.messages import one_line

__all__ = ["allocates_bits", "load_recipe"]

_FORM = "a recipe has the form casp_stage: {casp_modifiers: {GPTQModifier: {}}}"
#: keys beside stages and modifiers that llm-compressor knows, or knew
_OTHERS = ("args", "run_type")


def load_recipe(
    recipe: Path | str,
    average_bits: float | None = None,
    cache_dir: Path | str | None = None,
    cache_limit: float | None = None,
) -> Recipe:
    """
    :param recipe: file, or text, in YAML
    :param average_bits: budget of its BitAllocationModifier, instead of the one written there
    :param cache_dir: the same of the casp modifiers
    :param cache_limit: the same of them
    :raises ValueError: if it is no recipe, in one line that names the file and what is wrong
        there; if it has no modifier to give ``average_bits`` to, or a budget for each component
    """
    made = _read(str(recipe))
    if average_bits is not None:
        if not allocates_bits(made):
            raise ValueError(f"{recipe} has no BitAllocationModifier to give average_bits to")
        for modifier in made.modifiers:
            if isinstance(modifier, BitAllocationModifier):
                if isinstance(modifier.average_bits, dict):
                    raise ValueError(
                        f"{recipe}: average_bits has a budget for each component "
                        f"({', '.join(modifier.average_bits)}): one number is needed to change it"
                    )
                modifier.average_bits = average_bits
    for modifier in made.modifiers:
        if cache_dir is not None and isinstance(modifier, CaspModifier):
            modifier.cache_dir, modifier.cache_limit = str(cache_dir), cache_limit
    return made


def allocates_bits(recipe: Recipe) -> bool:
    """Whether it has a budget."""
    return any(isinstance(modifier, BitAllocationModifier) for modifier in recipe.modifiers)


def _read(recipe: str) -> Recipe:
    """A recipe as llm-compressor reads it, which passes over keys that it does not know.

    :param recipe: file or text
    :raises ValueError: if there are such keys, or anything else is wrong
    """
    is_file = os.path.isfile(recipe)
    try:
        if is_file:
            check_utf8(Path(recipe))
        text = Path(recipe).read_text(encoding="utf-8") if is_file else recipe
        if not (is_file and recipe.lower().endswith(".md")):  # where it is a part of the text
            _check_form(_parsed(text))
        return Recipe.create_instance(recipe)
    except yaml.MarkedYAMLError as error:
        message = f"line {error.problem_mark.line + 1}: {error.problem}"
        if "\\t" in message:
            message += "; YAML is indented with spaces"
    except (ValueError, TypeError, yaml.YAMLError) as error:
        message = one_line(error)
    raise ValueError(f"{recipe if is_file else 'the recipe'}: {message}")


class _Loader(yaml.SafeLoader):
    """Refuses a key that comes twice in a table, whose first value would be lost."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for place, key in enumerate(keys):
            if key.value in [each.value for each in keys[:place]]:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} comes twice", problem_mark=key.start_mark
                )
        return node


def _parsed(text: str) -> Any:
    """The values that JSON or YAML stand for.

    :raises ValueError: if a key comes twice in a table
    :raises yaml.YAMLError: if it is neither, or a key comes twice
    """
    try:
        return json.loads(text, object_pairs_hook=_table)
    except json.JSONDecodeError:
        return yaml.load(text, _Loader)


def _table(pairs: list[tuple[str, Any]]) -> dict:
    keys = [key for key, _ in pairs]
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise ValueError(f"key {twice[0]!r} comes twice")
    return dict(pairs)


def _check_form(read: Any) -> None:
    """
    :raises ValueError: if it is not stages of modifiers that there are, with fields that they have
    """
    if read is None:
        raise ValueError(f"it is empty; {_FORM}")
    if not isinstance(read, dict):
        raise ValueError(f"it holds {read!r:.60}, not a table of stages; {_FORM}")
    found = [
        (name, fields)
        for stage, groups in _tables(read, "_stage", "stage")
        for group, modifiers in _tables(groups, "_modifiers", f"group of modifiers of {stage}")
        for name, fields in modifiers.items()
    ]
    if not found:
        raise ValueError(f"it names no modifier; {_FORM}")
    known = _known_modifiers()
    for name, fields in found:
        if name not in known:
            raise ValueError(f"there is no modifier {name!r}; there are {', '.join(sorted(known))}")
        if not isinstance(fields, dict):
            raise ValueError(
                f"{name} holds {fields!r:.60}, not a table of its fields: {name}: {{}} leaves all "
                "at their defaults"
            )
        valid = known[name].model_fields
        for field in fields:
            if field not in valid:
                own = ", ".join(each for each in valid if each not in Modifier.model_fields)
                raise ValueError(f"{name} has no field {field!r}; it has {own}")


def _tables(of: dict, ending: str, what: str) -> Iterator[tuple[str, dict]]:
    """The tables of a table, by name.

    :param ending: that llm-compressor knows them by
    :param what: what they are, for errors
    :raises ValueError: if it holds anything else
    """
    for key, value in of.items():
        if key in _OTHERS:
            continue
        if not str(key).endswith(ending):
            raise ValueError(f"{key!r} is no {what}: the name must end in {ending}; {_FORM}")
        if not isinstance(value, dict):
            raise ValueError(f"{key} holds {value!r:.60}, not a table; {_FORM}")
        yield key, value


def _known_modifiers() -> dict[str, type[Modifier]]:
    """Those that recipes can name."""
    if not ModifierFactory._loaded:
        ModifierFactory.refresh()
    known = {
        **ModifierFactory._main_registry,
        **ModifierFactory._experimental_registry,
        **ModifierFactory._registered_registry,
    }
    return {name: kind for name, kind in known.items() if kind is not Modifier}

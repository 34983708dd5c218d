"""Read and check recipes, and fill in a budget or a cache."""

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
#: keys beside stages and modifiers that some version of llm-compressor knows
_OTHERS = ("args", "run_type")


def load_recipe(
    recipe: Path | str,
    average_bits: float | dict[str, float] | None = None,
    cache_dir: Path | str | None = None,
    cache_limit: float | None = None,
) -> Recipe:
    """Return a recipe with some of its fields filled in.

    :param recipe: file, or text, in YAML or JSON
    :param average_bits: budget of its BitAllocationModifier, or of every component where the recipe
        has budgets of components; None for the one in the recipe
    :param cache_dir: folder of the cache of its casp modifiers; None for the one in the recipe
    :param cache_limit: size of that cache in GB (1e9 bytes); None for no limit
    :raises ValueError: if it is no recipe, with the file and the fault in one line; if it has no
        modifier to give ``average_bits`` to, or budgets of other components
    """
    read = _read(str(recipe))
    if average_bits is not None:
        if not allocates_bits(read):
            raise ValueError(f"{recipe} has no BitAllocationModifier to give average_bits to")
        for modifier in read.modifiers:
            if isinstance(modifier, BitAllocationModifier):
                _check_components(recipe, modifier.average_bits, average_bits)
                modifier.average_bits = average_bits
    for modifier in read.modifiers:
        if cache_dir is not None and isinstance(modifier, CaspModifier):
            modifier.cache_dir, modifier.cache_limit = str(cache_dir), cache_limit
    return read


def _check_components(
    recipe: Path | str, written: float | dict[str, float], given: float | dict[str, float]
) -> None:
    """Check that a budget can take the place of the one in a recipe.

    :param written: budget of the recipe
    :param given: budget in its place
    :raises ValueError: if they are not of the same components
    """
    if isinstance(given, dict) and not isinstance(written, dict):
        raise ValueError(
            f"{recipe}: average_bits has one budget for all components: one number is needed"
        )
    if isinstance(written, dict) and (not isinstance(given, dict) or set(given) != set(written)):
        form = ",".join(f"{component}={bits:g}" for component, bits in written.items())
        raise ValueError(
            f"{recipe}: average_bits has a budget for each component ({', '.join(written)}): one "
            f"number cannot change it, budgets of the same components can, as in {form}"
        )


def allocates_bits(recipe: Recipe) -> bool:
    """Tell whether a recipe has a budget."""
    return any(isinstance(modifier, BitAllocationModifier) for modifier in recipe.modifiers)


def _read(recipe: str) -> Recipe:
    """Return a recipe as llm-compressor reads it.

    :param recipe: file or text
    :raises ValueError: if it is no recipe, or has keys that llm-compressor does not know and would
        pass over
    """
    is_file = os.path.isfile(recipe)
    try:
        if is_file:
            check_utf8(Path(recipe))
        text = Path(recipe).read_text(encoding="utf-8") if is_file else recipe
        if not (is_file and recipe.lower().endswith(".md")):  # the recipe is a part of the text
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
    """Refuse a key that comes twice in a table: its first value would be lost."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for place, key in enumerate(keys):
            if key.value in [earlier.value for earlier in keys[:place]]:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} comes twice", problem_mark=key.start_mark
                )
        return node


def _parsed(text: str) -> Any:
    """Return the values of a text in JSON or YAML.

    :raises ValueError: if a key comes twice in a table of JSON
    :raises yaml.YAMLError: if the text is neither, or a key comes twice in a table of YAML
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
    """Check that a recipe consists of stages of known modifiers with known fields.

    :raises ValueError: if it does not
    """
    if read is None:
        raise ValueError(f"it is empty; {_FORM}")
    if not isinstance(read, dict):
        raise ValueError(f"it holds {read!r:.60}, not a table of stages; {_FORM}")
    modifiers = [
        (name, fields)
        for stage, groups in _tables(read, "_stage", "stage")
        for _, group in _tables(groups, "_modifiers", f"group of modifiers of {stage}")
        for name, fields in group.items()
    ]
    if not modifiers:
        raise ValueError(f"it names no modifier; {_FORM}")
    known = _known_modifiers()
    for name, fields in modifiers:
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
                own = ", ".join(key for key in valid if key not in Modifier.model_fields)
                raise ValueError(f"{name} has no field {field!r}; it has {own}")


def _tables(table: dict, ending: str, what: str) -> Iterator[tuple[str, dict]]:
    """Yield the tables of a table, by name.

    :param ending: end of the names, by which llm-compressor knows the tables
    :param what: name of such a table in errors
    :raises ValueError: if the table holds anything else
    """
    for key, value in table.items():
        if key in _OTHERS:
            continue
        if not str(key).endswith(ending):
            raise ValueError(f"{key!r} is no {what}: the name must end in {ending}; {_FORM}")
        if not isinstance(value, dict):
            raise ValueError(f"{key} holds {value!r:.60}, not a table; {_FORM}")
        yield key, value


def _known_modifiers() -> dict[str, type[Modifier]]:
    """Return the modifiers that recipes can name, by name."""
    if not ModifierFactory._loaded:
        ModifierFactory.refresh()
    known = {
        **ModifierFactory._main_registry,
        **ModifierFactory._experimental_registry,
        **ModifierFactory._registered_registry,
    }
    return {name: kind for name, kind in known.items() if kind is not Modifier}

"""Recipes with a budget or a cache filled in."""

from pathlib import Path

from llmcompressor.recipe import Recipe

from casp_plugin.modifiers.base import CaspModifier
from casp_plugin.modifiers.bit_allocation import BitAllocationModifier

__all__ = ["allocates_bits", "load_recipe"]


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
    :raises ValueError: if there is no such modifier, or it has a budget for each component
    """
    made = Recipe.create_instance(str(recipe))
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

"""Give recipes a budget: the bytes of one width everywhere.

    python benchmarks/budgets.py MODEL recipes/smollm2/uniform.yaml 2.56 uniform_2.56.yaml

A budget is named after the bits that one scheme takes everywhere. A recipe of one width gets its
width, and its group size, where the scheme is of its kind. A recipe with a
``BitAllocationModifier`` gets its bytes, to spend as it likes.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import typer
import yaml
from torch import nn

from casp_plugin.maths.average_bits import average_bits
from casp_plugin.model.codebook_schemes import AdditiveScheme, CodebookScheme, TrellisScheme
from casp_plugin.model.components import LANGUAGE, component_of
from casp_plugin.model.load import bare_model, read_model_config
from casp_plugin.model.low_rank_linear import named_linears
from casp_plugin.model.schemes import WeightScheme, stored_bytes, weight_args

#: schemes by their average bits on SmolLM2, all counted; QuIP#'s take the bytes of trellis codes
ONE_WIDTH: dict[float, WeightScheme] = {
    2.02: TrellisScheme(bits=2),
    2.15: AdditiveScheme(bits=2),
    2.28: weight_args(2, 64),
    2.56: weight_args(2, 32),
    3.02: TrellisScheme(bits=3),
    3.22: AdditiveScheme(bits=3),
    3.30: weight_args(3, 64),
}
#: codec of the quantizers of one width
_CODECS = {"TrellisModifier": "trellis", "QuIPSharpModifier": "trellis", "AQLMModifier": "aqlm"}
_SUFFIX = re.compile(r"_(\d+\.\d+)$")


def main(model: str, recipe: Path, budget: float, out: Path) -> None:
    """Write a recipe at a budget."""
    out.write_text(at_budget(recipe, budget, model))


def at_budgets(
    recipes: Sequence[Path], budgets: Sequence[float], model: str
) -> Iterator[tuple[str, str]]:
    """Yield name and text of every recipe at every budget, budget by budget.

    Without budgets recipes are taken as they are. A recipe like ``mix_2.56.yaml`` is made for one
    budget: it is taken there only, as it is. A recipe of one width is left out where the budget is
    none of its widths.
    """
    for budget in budgets or [None]:
        for recipe in recipes:
            made_for = _SUFFIX.search(recipe.stem)
            if budget is None or (made_for and float(made_for[1]) == budget):
                yield recipe.stem, recipe.read_text()
            elif not made_for and _fits(_modifiers(recipe.read_text())[1], _scheme(budget)):
                yield f"{recipe.stem}_{budget:.2f}", at_budget(recipe, budget, model)


def at_budget(recipe: Path, budget: float, model: str) -> str:
    """Return the text of a recipe at a budget.

    :raises ValueError: if no scheme, or none of the recipe's kind, is known to take so many bits
    """
    scheme = _scheme(budget)
    stages, modifiers = _modifiers(recipe.read_text())
    if not _fits(modifiers, scheme):
        raise ValueError(f"{recipe}: no width of its quantizer takes {budget} bits")
    for name, fields in modifiers.items():
        if name == "BitAllocationModifier":
            components = fields.get("components", [LANGUAGE])
            fields["average_bits"] = _equal_bits(components, scheme, model)
        if "bits" in fields:
            fields["bits"] = scheme.bits
        for group in fields.get("config_groups", {}).values():
            group["weights"] |= {"num_bits": scheme.num_bits, "group_size": scheme.group_size}
    return yaml.safe_dump(stages, sort_keys=False)


def _modifiers(recipe: str) -> tuple[dict, dict]:
    """Return the stages of a recipe, and the modifiers of its only one, which belong to them."""
    stages = yaml.safe_load(recipe)
    [[modifiers]] = [groups.values() for groups in stages.values()]
    return stages, modifiers


def _scheme(budget: float) -> WeightScheme:
    """Return the scheme of a budget.

    :raises ValueError: if there is none
    """
    if budget not in ONE_WIDTH:
        raise ValueError(
            f"--average-bits {budget}: one width takes {', '.join(map(str, ONE_WIDTH))}"
        )
    return ONE_WIDTH[budget]


def _fits(modifiers: dict, scheme: WeightScheme) -> bool:
    """Tell whether a recipe chooses widths, or has one width of the kind of a scheme."""
    if "BitAllocationModifier" in modifiers:
        return True
    codec = scheme.codec if isinstance(scheme, CodebookScheme) else "scalar"
    return codec == next((own for name, own in _CODECS.items() if name in modifiers), "scalar")


def linear_weights(
    model: nn.Module, components: Sequence[str] = (LANGUAGE,)
) -> list[tuple[str, nn.Parameter]]:
    """Return component and weight of the linears of some components, without the head."""
    return [
        (component_of(name), linear.weight)
        for name, linear in named_linears(model)
        if not name.endswith("lm_head") and component_of(name) in components
    ]


def _equal_bits(components: Sequence[str], scheme: WeightScheme, model: str) -> float:
    """Return the average bits over components at which they take the bytes of one scheme.

    The scheme is that of the language model's linears; those of other components count 16 bits.
    """
    weights = linear_weights(bare_model(read_model_config(model)), components)
    stored = sum(
        stored_bytes(tuple(w.shape), scheme, w.dtype) if component == LANGUAGE else w.nbytes
        for component, w in weights
    )
    exact = average_bits(stored, sum(w.numel() for _, w in weights))
    return int(exact * 1e6) / 1e6  # never more bytes


if __name__ == "__main__":
    typer.run(main)

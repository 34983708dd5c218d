"""Give recipes a budget: the bytes of one width everywhere.

    python benchmarks/budgets.py MODEL recipes/smollm2/uniform.yaml 2.56 uniform_2.56.yaml

A budget is named after the bits that one width and group size take. A stock recipe gets the two, a
recipe with a ``BitAllocationModifier`` gets their bytes, to spend as it likes.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import typer
import yaml
from torch import nn

from casp_plugin.maths.average_bits import average_bits
from casp_plugin.model.components import LANGUAGE, component_of
from casp_plugin.model.load import bare_model, read_model_config
from casp_plugin.model.low_rank_linear import named_linears
from casp_plugin.model.schemes import stored_bytes, weight_args

#: width and group size by average bits, scales and zero points counted
ONE_WIDTH = {2.28: (2, 64), 2.56: (2, 32), 3.30: (3, 64)}
_SUFFIX = re.compile(r"_(\d+\.\d+)$")


def main(model: str, recipe: Path, budget: float, out: Path) -> None:
    """Write a recipe at a budget."""
    out.write_text(at_budget(recipe, budget, model))


def at_budgets(
    recipes: Sequence[Path], budgets: Sequence[float], model: str
) -> Iterator[tuple[str, str]]:
    """Yield name and text of every recipe at every budget, budget by budget.

    Without budgets recipes are taken as they are. A recipe like ``mix_2.56.yaml`` is made for one
    budget: it is taken there only, as it is.
    """
    for budget in budgets or [None]:
        for recipe in recipes:
            made_for = _SUFFIX.search(recipe.stem)
            if budget is None or (made_for and float(made_for[1]) == budget):
                yield recipe.stem, recipe.read_text()
            elif not made_for:
                yield f"{recipe.stem}_{budget:.2f}", at_budget(recipe, budget, model)


def at_budget(recipe: Path, budget: float, model: str) -> str:
    """Return the text of a recipe at a budget.

    :raises ValueError: if no width and group size are known to take so many bits
    """
    if budget not in ONE_WIDTH:
        raise ValueError(
            f"--average-bits {budget}: one width takes {', '.join(map(str, ONE_WIDTH))}"
        )
    bits, group_size = ONE_WIDTH[budget]
    stages = yaml.safe_load(recipe.read_text())
    [[modifiers]] = [groups.values() for groups in stages.values()]
    for name, fields in modifiers.items():
        if name == "BitAllocationModifier":
            components = fields.get("components", [LANGUAGE])
            fields["average_bits"] = _equal_bits(components, bits, group_size, model)
        for scheme in fields.get("config_groups", {}).values():
            scheme["weights"] |= {"num_bits": bits, "group_size": group_size}
    return yaml.safe_dump(stages, sort_keys=False)


def linear_weights(
    model: nn.Module, components: Sequence[str] = (LANGUAGE,)
) -> list[tuple[str, nn.Parameter]]:
    """Return component and weight of the linears of some components, without the head."""
    return [
        (component_of(name), linear.weight)
        for name, linear in named_linears(model)
        if not name.endswith("lm_head") and component_of(name) in components
    ]


def _equal_bits(components: Sequence[str], bits: int, group_size: int, model: str) -> float:
    """Return the average bits over components at which they take the bytes of one width.

    One width is that of the language model's linears; those of other components count 16 bits.
    """
    scheme = weight_args(bits, group_size)
    weights = linear_weights(bare_model(read_model_config(model)), components)
    stored = sum(
        stored_bytes(tuple(w.shape), scheme, w.dtype) if component == LANGUAGE else w.nbytes
        for component, w in weights
    )
    exact = average_bits(stored, sum(w.numel() for _, w in weights))
    return int(exact * 1e6) / 1e6  # never more bytes


if __name__ == "__main__":
    typer.run(main)

"""The choice of one candidate for every unit of a plan: importances, budgets, the solver."""

from collections.abc import Mapping, Sequence

import numpy as np
from compressed_tensors.utils import match_name
from torch import nn
from tqdm import tqdm

from casp_plugin.maths.average_bits import average_bits, bits_of, bytes_within
from casp_plugin.maths.coupled_knapsack import Coupled
from casp_plugin.maths.knapsack import choose, closed_form_bits, distance_costs, pareto
from casp_plugin.model.location import find_locations
from casp_plugin.model.units import Unit
from casp_plugin.plan.plan import CompressionPlan, ParetoPoint, UnitPlan
from casp_plugin.plan.sensitivity_file import Sensitivity
from casp_plugin.system.distributed import shared

__all__ = [
    "TOLERANCE",
    "choose_candidates",
    "couple_by_study",
    "influence_importances",
    "named_importances",
]

#: bits of the average that may stay unspent
TOLERANCE = 0.01
#: budgets that a plan tells the cost of
PARETO_POINTS = 9
#: block influence of a layer that changes nothing, so that ratios stay finite
_LEAST_INFLUENCE = 1e-6


def influence_importances(units: Sequence[Unit], influences: Mapping[str, float]) -> list[float]:
    """Return the mean block influence of the decoder layers that hold each unit's modules (CASP,
    arXiv 2503.05936, eq. 9); the mean of all layers for a unit outside them.

    :param influences: by decoder layer
    """
    everywhere = float(np.mean(list(influences.values())))
    importances = []
    for unit in units:
        inside = [
            max(influence, _LEAST_INFLUENCE)
            for module in unit.modules
            for layer, influence in influences.items()
            if module.startswith(f"{layer}.")
        ]
        importances.append(float(np.mean(inside)) if inside else everywhere)
    return importances


def named_importances(
    units: Sequence[Unit], layers: Sequence[str], given: Mapping[str, float]
) -> list[float]:
    """Return the importance that a recipe gives each unit by name; 1 where no entry matches.

    :param layers: decoder layers, which entries may name
    :param given: importance by the name of a unit, a decoder layer or a module, or by a pattern
    :raises ValueError: if an entry matches no unit
    """
    used, importances = set(), []
    for unit in units:
        names = {unit.name, *unit.modules}
        names |= {layer for layer in layers for m in unit.modules if m.startswith(f"{layer}.")}
        key = next((k for k in given if any(match_name(n, k) for n in names)), None)
        used.add(key)
        importances.append(given[key] if key is not None else 1.0)
    unused = [key for key in given if key not in used]
    if unused:
        known = ", ".join(unit.name for unit in units[:4])
        raise ValueError(
            f"BitAllocationModifier.importance: {unused} match no unit; units are {known}, ..."
        )
    return importances


def couple_by_study(
    model: nn.Module,
    units: Sequence[UnitPlan],
    study: Sensitivity,
    method: str,
    patterns: Mapping[str, Sequence[str]],
    path: str,
) -> Coupled:
    """Return how a sensitivity study lets groups of units share the budget.

    :param method: quantization method of the study that the recipe runs
    :param patterns: parts of module paths that begin a component, beside the built-in table
    :param path: file of the study, for errors
    :raises ValueError: if the study does not tell the units apart, or lacks the method
    """
    field = "BitAllocationModifier.importance"
    if study.axis == "component":
        groups = [unit.component for unit in units]
    else:
        names = [next(iter(unit.modules)) for unit in units]
        locations = find_locations(model, names, patterns)
        outside = [name for name in names if locations[name].block is None]
        if outside:
            raise ValueError(
                f"{field}: {path} tells blocks apart, and {outside[0]} lies in none: put it into "
                "ignore"
            )
        groups = [locations[name].block for name in names]
    if len(set(groups)) == 1:
        raise ValueError(
            f"{field}: {path} tells {study.axis}s apart, and all layers are of one, {groups[0]}: "
            "list more in components"
        )
    try:
        shares = study.of_method(method, list(dict.fromkeys(groups)))
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
    return Coupled(groups, shares.parts, shares.pairs)


def choose_candidates(
    plan: CompressionPlan, closed_form: bool, coupled: Coupled | None = None
) -> None:
    """Choose a candidate for every unit of a plan, and note the cost of other budgets.

    Nothing is chosen while an importance or, without ``closed_form``, an error is unknown.

    :param closed_form: bits as near as the budget allows to the paper's closed form, instead of the
        least sum of importance x error
    :param coupled: how a study lets groups of units share the budget
    :raises BudgetError: if even the smallest candidates exceed a budget
    """
    if any(unit.importance is None for unit in plan.units):
        return
    if not closed_form and any(c.error is None for unit in plan.units for c in unit.candidates):
        return
    dry = plan.calibration_tokens is None
    for budget in tqdm(plan.budgets, desc="Choosing", leave=False, disable=dry):
        units = budget.units
        sizes = [[candidate.bytes for candidate in unit.candidates] for unit in units]
        budget_bytes = bytes_within(budget.average_bits, budget.weights)
        if closed_form:
            costs = _closed_form_costs(units, budget_bytes)
        else:
            costs = [[unit.importance * c.error for c in unit.candidates] for unit in units]
        if coupled is not None:
            frontier, chosen = coupled.solve(costs, sizes, budget_bytes, PARETO_POINTS)
        else:
            frontier = [] if closed_form else pareto(costs, sizes, PARETO_POINTS)
            slack = bytes_within(TOLERANCE, budget.weights)
            chosen = choose(costs, sizes, budget_bytes, slack=slack)
        plan.pareto += [
            ParetoPoint(
                component=budget.component,
                average_bits=average_bits(taken, budget.weights),
                error=cost,
            )
            for taken, cost in frontier
        ]
        for unit, index in zip(units, shared(chosen), strict=True):
            unit.chosen = index


def _closed_form_costs(units: Sequence[UnitPlan], budget_bytes: int) -> list[list[float]]:
    """Return the distance of every candidate from the paper's closed form, scales counted."""
    sizes = [sum(rows * columns for rows, columns in u.modules.values()) for u in units]
    overhead = sum(
        bits_of(u.candidates[0].bytes) - u.candidates[0].bits * n
        for u, n in zip(units, sizes, strict=True)
    )
    code_bits = (bits_of(budget_bytes) - overhead) / sum(sizes)
    wishes = closed_form_bits([unit.importance for unit in units], code_bits, sizes)
    return distance_costs(wishes, [[c.bits for c in u.candidates] for u in units], sizes)

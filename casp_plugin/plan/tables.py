"""A plan as tables for people. Unknown values show as ``?``."""

import re
from collections import Counter
from collections.abc import Iterable
from statistics import fmean

from rich import box
from rich.table import Table

from casp_plugin.maths.attention_density import THRESHOLD
from casp_plugin.maths.average_bits import average_bits
from casp_plugin.plan.plan import CompressionPlan, UnitPlan
from casp_plugin.system.messages import size_text

__all__ = ["plan_tables", "total_table", "unit_tables"]


def plan_tables(plan: CompressionPlan) -> list[Table]:
    """Return a plan in brief, as tables: totals, layers by kind, components, budgets."""
    tables = [total_table(plan)]
    if plan.units:
        tables.append(_kind_table(plan))
    if len({unit.component for unit in plan.units}) > 1:
        tables.append(_component_table(plan))
    if plan.pareto:
        tables.append(_pareto_table(plan))
    return tables


def unit_tables(plan: CompressionPlan) -> list[Table]:
    """Return all of a plan, as tables: every attention module, factored layer and unit."""
    tables = []
    if plan.attention:
        tables.append(_attention_table(plan))
    if plan.low_rank:
        tables.append(_low_rank_table(plan))
    if plan.units:
        tables.append(_unit_table(plan))
    return tables


def _new_table(title: str, *columns: str, names: Iterable[str]) -> Table:
    """Return an empty table whose names go on in the next line where space is short.

    :param names: columns of names, to the left; the others are to the right
    """
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in columns:
        table.add_column(column, justify="left" if column in names else "right", overflow="fold")
    return table


def _attention_table(plan: CompressionPlan) -> Table:
    title = f"Attention density: share of a map's entries above {THRESHOLD}"
    columns = ("module", "mean", "least head", "largest head", "images", "text", "entropy")
    table = _new_table(title, *columns, names=["module"])
    for module in plan.attention:
        values = [fmean(module.heads), min(module.heads), max(module.heads)]
        table.add_row(
            module.module,
            *(f"{value:.3f}" for value in values),
            *("" if v is None else f"{fmean(v):.3f}" for v in (module.image, module.text)),
            f"{fmean(module.entropy):.3f}",
        )
    return table


def _low_rank_table(plan: CompressionPlan) -> Table:
    columns = ("module", "shape", "rank", "kept", "error", "note")
    table = _new_table("Low rank", *columns, names=["module", "note"])
    for entry in plan.low_rank:
        table.add_row(
            entry.module,
            "x".join(map(str, entry.shape)),
            str(entry.rank) if entry.rank else "dense",
            f"{entry.keep:.3f}",
            _shown(entry.error, ".4f") if entry.rank else "-",
            entry.note or "",
        )
    return table


def _unit_table(plan: CompressionPlan) -> Table:
    columns = ("unit", "importance", "rank", "bits", "error", "bytes")
    table = _new_table("Bits", *columns, names=["unit"])
    for unit in plan.units:
        options = [unit.choice] if unit.choice else unit.candidates
        sizes = [c.bytes for c in options]
        ranks = dict.fromkeys("dense" if c.rank is None else str(c.rank) for c in options)
        table.add_row(
            unit.name,
            _shown(unit.importance, ".4g"),
            "" if list(ranks) == ["dense"] else "|".join(ranks),
            "|".join(map(str, dict.fromkeys(c.bits for c in options))),
            _shown(options[0].error if unit.choice else None, ".4f"),
            f"{sizes[0]:,}" if unit.choice else f"from {min(sizes):,}",
        )
    return table


def _kind_table(plan: CompressionPlan) -> Table:
    """Return a table of layers by kind; "bits" are the units of each width, "error" is the share of
    importance x error."""
    columns = ("layers", "units", "weights", "ranks", "bits", "average", "size", "error")
    several = len({unit.component for unit in plan.units}) > 1
    columns = ("component", *columns) if several else columns
    table = _new_table("Layers by kind", *columns, names=["component", "layers"])
    kinds: dict[tuple[str, str], list[UnitPlan]] = {}
    for unit in plan.units:
        kinds.setdefault((unit.component, _layers_of(unit.name)), []).append(unit)
    whole = _expected(plan.units, chosen=True)
    for (component, kind), units in kinds.items():
        weights, error = sum(unit.weights for unit in units), _expected(units, chosen=True)
        size = sum(unit.choice.bytes for unit in units) if plan.decided else None
        table.add_row(
            *([component] if several else []),
            kind,
            str(len(units)),
            f"{weights / 1e6:,.1f}M",
            _ranks(units),
            _widths(units),
            _shown(size and average_bits(size, weights), ".4f"),
            "?" if size is None else size_text(size),
            _shown(error / whole if whole else None, ".1%"),
        )
    return table


def _layers_of(unit: str) -> str:
    """Return the layers of a unit without their place: ``q_proj, k_proj`` of
    ``model.layers.3.self_attn.q_proj+k_proj``, ``layer`` of a whole decoder layer.

    :param unit: name of the unit
    """
    leaf = unit.rpartition(".")[2]
    return "layer" if re.fullmatch(r"[\d-]+", leaf) else leaf.replace("+", ", ")


def _ranks(units: list[UnitPlan]) -> str:
    """Return the least and the largest rank of units, and the number of dense units; nothing where
    all are dense. Of units that are not decided: the ranks on offer."""
    if any(unit.choice is None for unit in units):
        offered = dict.fromkeys(c.rank for unit in units for c in unit.candidates)
        return "" if list(offered) == [None] else "|".join(str(r or "dense") for r in offered)
    ranks = [unit.choice.rank for unit in units if unit.choice.rank is not None]
    if not ranks:
        return ""
    dense = f", {len(units) - len(ranks)} dense" if len(ranks) < len(units) else ""
    least, most = min(ranks), max(ranks)
    return (f"{least}" if least == most else f"{least} to {most}") + dense


def _widths(units: list[UnitPlan]) -> str:
    """Return the number of units of each width; of units that are not decided, the widths on
    offer."""
    if any(unit.choice is None for unit in units):
        return "|".join(map(str, sorted({c.bits for unit in units for c in unit.candidates})))
    counts = Counter(unit.choice.bits for unit in units)
    return ", ".join(f"{bits}: {count}" for bits, count in sorted(counts.items()))


def _component_table(plan: CompressionPlan) -> Table:
    """Return the weights, bits and error of components; the error "at fewest bits" tells how
    sensitive they are."""
    columns = ("component", "weights", "average bits", "error", "error at fewest bits")
    table = _new_table("Components", *columns, names=["component"])
    by_component: dict[str, list[UnitPlan]] = {}
    for unit in plan.units:
        by_component.setdefault(unit.component, []).append(unit)
    whole = sum(unit.weights for unit in plan.units)
    decided = [_expected(units, chosen=True) for units in by_component.values()]
    fewest = [_expected(units, chosen=False) for units in by_component.values()]
    for (component, units), now, least in zip(by_component.items(), decided, fewest, strict=True):
        weights = sum(unit.weights for unit in units)
        bytes_ = None if now is None else sum(unit.choice.bytes for unit in units)
        table.add_row(
            component,
            f"{weights / whole:.1%}",
            _shown(bytes_ and average_bits(bytes_, weights), ".4f"),
            _share(now, decided),
            _share(least, fewest),
        )
    return table


def _pareto_table(plan: CompressionPlan) -> Table:
    title = "Budgets: expected error, importance x error over all units"
    table = _new_table(title, "component", "average bits", "error", names=())
    for point in plan.pareto:
        component = point.component or "all"
        table.add_row(component, f"{point.average_bits:.3f}", f"{point.error:.4f}")
    return table


def total_table(plan: CompressionPlan) -> Table:
    """Return the totals of a plan: bits, bytes, warnings."""
    table = Table(title="Totals", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("model", plan.model)
    if plan.low_rank:
        table.add_row("low-rank parameters kept", f"{plan.kept:.3f}")
    if plan.units:
        for budget in plan.budgets:
            name = f"average bits of {budget.component}" if budget.component else "average bits"
            least, most = budget.reachable_bits
            table.add_row(f"{name}, budget", f"{budget.average_bits:.4f}")
            table.add_row(f"{name}, reached", _shown(budget.reached_bits, ".4f"))
            table.add_row(f"{name}, reachable", f"{least:.4f} to {most:.4f}")
        table.add_row("bytes of the units", _shown(plan.unit_bytes, ",d"))
        table.add_row("bytes of all tensors", _shown(plan.total_bytes, ",d"))
    if plan.copied:
        size = sum(tensor.bytes for tensor in plan.copied)
        names = ", ".join(tensor.name for tensor in plan.copied[:3])
        more = ", ..." if len(plan.copied) > 3 else ""
        what = f"{len(plan.copied)} tensors, {size:,} bytes ({names}{more})"
        table.add_row("copied unchanged", f"{what}: {plan.copied[0].why}")
    layers = [part for part in plan.tuned if part.module]
    if layers:
        ratios = sorted(part.after / part.before for part in layers if part.before > 0)
        middle = (
            f", held-out error x {ratios[len(ratios) // 2]:.3f} in the median" if ratios else ""
        )
        table.add_row("tuned", f"{len(layers)} decoder layers{middle}")
    for part in plan.tuned:
        if not part.module:
            change = f"{part.before:.4f} to {part.after:.4f}"
            table.add_row("tuned as a whole", f"held-out KL divergence {change}")
    tokens = plan.calibration_tokens
    table.add_row("calibration tokens", f"{tokens:,}" if tokens else "none: ? is unknown")
    for warning in plan.warnings:
        table.add_row("warning", warning)
    return table


def _expected(units: list[UnitPlan], chosen: bool) -> float | None:
    """Return importance x error of units as chosen, or dense at the fewest bits; None where it is
    unknown."""
    pairs = [(unit.importance, unit.choice if chosen else unit.candidates[0]) for unit in units]
    if any(importance is None or c is None or c.error is None for importance, c in pairs):
        return None
    return sum(importance * candidate.error for importance, candidate in pairs)


def _share(value: float | None, values: list[float | None]) -> str:
    """Return an error, and its share of the error of all components."""
    if value is None or None in values:
        return "?"
    return f"{value:.4f} ({value / sum(values):.0%})" if sum(values) else f"{value:.4f}"


def _shown(value, spec: str) -> str:
    return "?" if value is None else format(value, spec)

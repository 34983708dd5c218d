"""A plan as tables for people."""

from statistics import fmean

from rich import box
from rich.table import Table

from casp_plugin.maths.attention_density import THRESHOLD
from casp_plugin.plan.plan import CompressionPlan, UnitPlan

__all__ = ["plan_tables"]


def plan_tables(plan: CompressionPlan) -> list[Table]:
    """Return a plan as tables: ranks, units, totals. Unknown values show as ``?``."""
    tables = []
    if plan.attention:
        tables.append(_attention_table(plan))
    if plan.low_rank:
        tables.append(_low_rank_table(plan))
    if plan.units:
        tables.append(_unit_table(plan))
    if len({unit.component for unit in plan.units}) > 1:
        tables.append(_component_table(plan))
    if plan.pareto:
        tables.append(_pareto_table(plan))
    tables.append(_total_table(plan))
    return tables


def _attention_table(plan: CompressionPlan) -> Table:
    title = f"Attention density: share of a map's entries above {THRESHOLD}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("module", "mean", "least head", "largest head", "images", "text", "entropy"):
        table.add_column(column, justify="left" if column == "module" else "right")
    for one in plan.attention:
        values = [fmean(one.heads), min(one.heads), max(one.heads)]
        kinds = (one.image, one.text)
        table.add_row(
            one.module,
            *(f"{value:.3f}" for value in values),
            *("" if shares is None else f"{fmean(shares):.3f}" for shares in kinds),
            f"{fmean(one.entropy):.3f}",
        )
    return table


def _low_rank_table(plan: CompressionPlan) -> Table:
    table = Table(title="Low rank", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("module", "shape", "rank", "kept", "error", "note"):
        table.add_column(column, justify="left" if column in ("module", "note") else "right")
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
    table = Table(title="Bits", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("unit", overflow="fold", min_width=38)
    for column in ("importance", "rank", "bits", "error", "bytes"):
        table.add_column(column, justify="right")
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


def _component_table(plan: CompressionPlan) -> Table:
    """What components weigh, got and cost; "at fewest bits" tells how sensitive they are."""
    columns = ("component", "weights", "average bits", "error", "error at fewest bits")
    table = Table(title="Components", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column == "component" else "right")
    parts: dict[str, list[UnitPlan]] = {}
    for unit in plan.units:
        parts.setdefault(unit.component, []).append(unit)
    whole = sum(unit.weights for unit in plan.units)
    decided = [_expected(units, chosen=True) for units in parts.values()]
    fewest = [_expected(units, chosen=False) for units in parts.values()]
    for (component, units), now, least in zip(parts.items(), decided, fewest, strict=True):
        weights = sum(unit.weights for unit in units)
        bytes_ = None if now is None else sum(unit.choice.bytes for unit in units)
        table.add_row(
            component,
            f"{weights / whole:.1%}",
            _shown(bytes_ and bytes_ * 8 / weights, ".4f"),
            _share(now, decided),
            _share(least, fewest),
        )
    return table


def _pareto_table(plan: CompressionPlan) -> Table:
    title = "Budgets: expected error, importance x error over all units"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("component", "average bits", "error"):
        table.add_column(column, justify="right")
    for point in plan.pareto:
        component = point.component or "all"
        table.add_row(component, f"{point.average_bits:.3f}", f"{point.error:.4f}")
    return table


def _total_table(plan: CompressionPlan) -> Table:
    table = Table(title="Totals", title_justify="left", show_header=False)
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
        size = sum(each.bytes for each in plan.copied)
        names = ", ".join(each.name for each in plan.copied[:3])
        more = ", ..." if len(plan.copied) > 3 else ""
        what = f"{len(plan.copied)} tensors, {size:,} bytes ({names}{more})"
        table.add_row("copied unchanged", f"{what}: {plan.copied[0].why}")
    tokens = plan.calibration_tokens
    table.add_row("calibration tokens", f"{tokens:,}" if tokens else "none: ? is unknown")
    for warning in plan.warnings:
        table.add_row("warning", warning)
    return table


def _expected(units: list[UnitPlan], chosen: bool) -> float | None:
    """Importance x error of units as chosen, or dense at the fewest bits; None if unknown."""
    found = [(unit.importance, unit.choice if chosen else unit.candidates[0]) for unit in units]
    if any(importance is None or c is None or c.error is None for importance, c in found):
        return None
    return sum(importance * candidate.error for importance, candidate in found)


def _share(value: float | None, values: list[float | None]) -> str:
    """An error, and its share of all components'."""
    if value is None or None in values:
        return "?"
    return f"{value:.4f} ({value / sum(values):.0%})" if sum(values) else f"{value:.4f}"


def _shown(value, spec: str) -> str:
    return "?" if value is None else format(value, spec)

"""The report of a checkpoint: one HTML page that loads nothing from elsewhere."""

import io

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from casp_plugin.bench.runs import QUANTITIES, Speed, ratios_to
from casp_plugin.checkpoint.sizes import TENSOR_KINDS
from casp_plugin.evaluation.results import bracketed
from casp_plugin.report.facts import Facts
from casp_plugin.report.figures import plans, results
from casp_plugin.report.templates import render
from casp_plugin.system.messages import size_text

__all__ = ["conditions", "page", "quality_rows", "speed_rows"]

Rows = list[list[str]]
#: share of its size to which a figure may shrink and still be readable
_MIN_SCALE = 0.55


def page(facts: Facts) -> str:
    """Return the page as HTML.

    :param facts: everything known of a checkpoint
    """
    return render(
        "page.html.j2",
        facts=facts,
        plan=facts.plan,
        headline=_headline(facts),
        kinds=_kind_rows(facts),
        quality=quality_rows(facts),
        conditions=conditions(facts),
        speed=speed_rows(facts),
        units=_unit_rows(facts),
        figures={name: _svg(figure, name) for name, figure in _figures(facts) if figure},
    )


def quality_rows(facts: Facts) -> list[tuple[str | None, Rows]]:
    """Return tables of quality as (baseline, rows): a table for every baseline, with columns task,
    metric, baseline, value, change, verdict; then one of the metrics without a baseline, with
    columns task, metric, value, interval."""
    tables = []
    compared = set()
    for name, comparisons in facts.comparisons:
        rows = []
        for comparison in comparisons:
            rows.append(
                [
                    comparison.task,
                    comparison.metric,
                    f"{comparison.baseline:.4g}",
                    f"{comparison.value:.4g}",
                    f"{comparison.change_text} {comparison.interval_text}",
                    comparison.verdict,
                ]
            )
            compared.add((comparison.task, comparison.metric))
        tables.append((short(name), rows))
    rows = [
        [
            measured.task,
            measured.metric,
            f"{measured.value:.4g}",
            bracketed(measured.low, measured.high, ".4g"),
        ]
        for measured in facts.measurements
        if (measured.task, measured.metric) not in compared
    ]
    return [*tables, (None, rows)] if rows else tables


def conditions(facts: Facts) -> list[str]:
    """Return the settings of the evaluations in words, equal ones once."""
    settings = [
        ", ".join(f"{name} {value}" for name, value in evaluation.settings.items() if _says(value))
        for evaluation, _ in facts.evaluations
    ]
    return list(dict.fromkeys(filter(None, settings)))


def speed_rows(facts: Facts) -> list[tuple[str, str | None, Rows]]:
    """Return tables of speed as (workload in words, baseline, rows), a table for every benchmark,
    with columns quantity, baseline, value, ratio."""
    tables = []
    for speed, base in facts.speeds:
        work = speed.workload
        shown = f"{speed.rounds[0].prompt_tokens} prompt tokens, {work.new_tokens} new ones"
        about = f"{_engine(speed)}, {speed.device}, {shown}, batches of {work.batch_size}"
        ratios = ratios_to(speed, base) if base else {}
        rows = []
        for quantity in QUANTITIES:
            cells = [quantity.text(base) if base else "", quantity.text(speed)]
            middle, *ends = ratios.get(quantity.attribute, (None,))
            interval = bracketed(*ends, ".3f") if ends else ""
            ratio = "" if middle is None else f"x{middle:.3f} {interval}".rstrip()
            rows.append([quantity.label, *cells, ratio])
        tables.append((about, base and short(base.model), rows))
    return tables


def _engine(speed: Speed) -> str:
    return {"hf": "transformers", "vllm": "vLLM"}[speed.engine]


def _headline(facts: Facts) -> list[tuple[str, str, str]]:
    """Return the main numbers as (quantity, value, note)."""
    note = ""
    if facts.original_bytes:
        share = facts.total_bytes / facts.original_bytes
        note = f"{share:.1%} of {size_text(facts.original_bytes)}"
    numbers = [("size", size_text(facts.total_bytes), note)]
    plan = facts.plan
    if plan and plan.decided:
        bits = f"{plan.reached_bits:.3f}"
        numbers.append(("average bits", bits, "scales, zero points and factors counted"))
    if plan and plan.low_rank and plan.kept is not None:
        numbers.append(("q/k parameters kept", f"{plan.kept:.0%}", "by low rank"))
    for name, comparisons in facts.comparisons[:1]:
        first = comparisons[0]
        against = f"{first.change_text} against {short(name)}"
        numbers.append((first.metric, f"{first.value:.4g}", against))
    for speed, base in facts.speeds[:1]:
        ratio = ratios_to(speed, base)["decode"][0] if base else None
        against = f"x{ratio:.2f} against {short(base.model)}" if base else ""
        numbers.append((f"tokens/s, {_engine(speed)}", f"{speed.decode:.1f}", against))
    return numbers


def _kind_rows(facts: Facts) -> tuple[list[str], Rows]:
    """Return the components, and rows of bytes by component, one for every kind of tensor."""
    components = list(facts.breakdown)
    rows = []
    for kind in TENSOR_KINDS:
        sizes = [facts.breakdown[component].get(kind, 0) for component in components]
        if any(sizes):
            share = f"{sum(sizes) / facts.total_bytes:.1%}"
            rows.append([kind, *(f"{size:,}" for size in sizes), share])
    return components, rows


def _unit_rows(facts: Facts) -> Rows:
    """Return a row for every unit: name, importance, rank, bits, group size, bytes, error."""
    rows = []
    for unit in facts.plan.units if facts.plan and facts.plan.decided else ():
        choice = unit.choice
        error = "" if choice.error is None else f"{choice.error:.4f}"
        importance = "" if unit.importance is None else f"{unit.importance:.4g}"
        rank = "dense" if choice.rank is None else str(choice.rank)
        cells = [str(choice.bits), str(choice.group_size), f"{choice.bytes:,}"]
        rows.append([unit.name, importance, rank, *cells, error])
    return rows


def _figures(facts: Facts):
    """Yield figures as (name, figure); None for figures without data."""
    yield "sizes", results.draw_sizes(facts.breakdown, facts.original_bytes)
    for index, (name, comparisons) in enumerate(facts.comparisons):
        yield f"changes{index}", results.draw_changes(comparisons, short(name))
    for index, (speed, base) in enumerate(facts.speeds):
        if base is not None:
            names = {
                quantity.attribute: quantity.label.partition(",")[0] for quantity in QUANTITIES
            }
            ratios = {names[name]: ratio for name, (ratio, *_) in ratios_to(speed, base).items()}
            yield f"speed{index}", results.draw_ratios(ratios, {"decode"}, short(base.model))
    plan = facts.plan
    if plan is None:
        return
    if plan.decided:
        for name, grids in (("bits", plans.bit_grids(plan)), ("costs", plans.cost_grids(plan))):
            yield name, plans.draw_grids(grids) if grids else None
        yield "budgets", plans.draw_budgets(plan)
    ranks = plans.rank_grids(plan)
    yield "ranks", plans.draw_grids(ranks) if ranks else None
    yield "spectra", plans.draw_spectra(plan)
    densities = plans.density_grids(plan)
    yield "densities", plans.draw_grids(densities) if densities else None


def _svg(figure: Figure, name: str) -> Markup:
    """Return a figure as SVG for a page, in the same bytes every time. It shrinks with the page as
    long as it is readable."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    width = figure.get_figwidth() * 96
    return Markup(
        f'<div style="min-width: {_MIN_SCALE * width:.0f}px; max-width: {width:.0f}px">{svg}</div>'
    )


def _says(value) -> bool:
    """Tell whether a setting is worth a mention: 0 is, False and empty ones are not."""
    return value is not False and value not in (None, "")


def short(name: str) -> str:
    """Return the last part of a folder or Hugging Face id."""
    return name.rstrip("/").rpartition("/")[2]

"""The report: one HTML page that loads nothing from elsewhere."""

import io

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from casp_plugin.bench.runs import Speed
from casp_plugin.checkpoint.sizes import KINDS
from casp_plugin.report.facts import Facts
from casp_plugin.report.figures import plans, results
from casp_plugin.report.templates import render

__all__ = ["conditions", "page", "quality_rows", "speed_rows"]

Rows = list[list[str]]
#: share of its size to which a picture can shrink and still be read
_READABLE = 0.55


def page(facts: Facts) -> str:
    """The page as text."""
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
    """Baseline's name and rows of each evaluation: task, metric, baseline, value, change, verdict.
    Then what no baseline was measured by: task, metric, value, interval."""
    found = []
    for name, comparisons in facts.comparisons:
        rows = []
        for each in comparisons:
            spec = ".3f" if each.ratio else "+.3g"
            change = f"{'x' if each.ratio else ''}{each.change:{spec}}"
            change += f" {_interval(each.low, each.high, spec)}"
            values = f"{each.baseline:.4g}", f"{each.value:.4g}"
            rows.append([each.task, each.metric, *values, change, each.verdict])
        found.append((short(name), rows))
    compared = {(each.task, each.metric) for _, many in facts.comparisons for each in many}
    rows = [
        [one.task, one.metric, f"{one.value:.4g}", _interval(one.low, one.high, ".4g")]
        for one in facts.measurements
        if (one.task, one.metric) not in compared
    ]
    return [*found, (None, rows)] if rows else found


def conditions(facts: Facts) -> list[str]:
    """What evaluations were made by, in words."""
    found = [
        ", ".join(f"{name} {value}" for name, value in one.settings.items() if _says(value))
        for one, _ in facts.evaluations
    ]
    return list(dict.fromkeys(filter(None, found)))


def speed_rows(facts: Facts) -> list[tuple[str, str | None, Rows]]:
    """Of each benchmark what it ran on, the baseline's name, and rows: what, baseline, value,
    ratio."""
    found = []
    for one, base in facts.speeds:
        work = one.workload
        shown = f"{one.rounds[0].prompt_tokens} prompt tokens, {work.new_tokens} new ones"
        about = f"{_engine(one)}, {one.device}, {shown}, batches of {work.batch_size}"
        ratios = _ratios(one, base) if base else {}
        rows = []
        for name, value, spec, scale in _SPEEDS:
            values = [None if each is None else getattr(each, value) for each in (base, one)]
            cells = ["" if v is None else f"{v * scale:{spec}}" for v in values]
            middle, *ends = ratios.get(value, (None,))
            ratio = (
                "" if middle is None else f"x{middle:.3f} {_interval(*ends or [None] * 2, '.3f')}"
            )
            rows.append([name, *cells, ratio.strip()])
        found.append((about, base and short(base.model), rows))
    return found


_SPEEDS = (
    ("files, GB", "bytes_on_disk", ".3f", 1e-9),
    ("prefill, s", "prefill", ".3f", 1),
    ("decode, tokens/s", "decode", ".1f", 1),
    ("peak memory at prefill, GB", "prefill_memory", ".2f", 1e-9),
    ("peak memory, GB", "memory", ".2f", 1e-9),
)


def _ratios(one: Speed, base: Speed) -> dict[str, tuple[float, ...]]:
    """Ratios to a baseline by what was measured; with the lowest and highest of the rounds where
    rounds were compared."""
    found = {}
    for _, value, *_ in _SPEEDS:
        pair = getattr(one, value), getattr(base, value)
        if all(pair):
            found[value] = (pair[0] / pair[1],)
    return found | one.against(base)


def _engine(speed: Speed) -> str:
    return {"hf": "transformers", "vllm": "vLLM"}[speed.engine]


def _headline(facts: Facts) -> list[tuple[str, str, str]]:
    """What a reader looks for first: what it is, the number, and what it compares with."""
    found = [("size", f"{facts.total_bytes / 1e6:,.0f} MB", "")]
    if facts.original_bytes:
        share = facts.total_bytes / facts.original_bytes
        found[0] = (*found[0][:2], f"{share:.1%} of {facts.original_bytes / 1e6:,.0f} MB")
    plan = facts.plan
    if plan and plan.decided:
        bits = f"{plan.reached_bits:.3f}"
        found.append(("average bits", bits, "scales, zero points and factors counted"))
    if plan and plan.low_rank and plan.kept is not None:
        found.append(("q/k parameters kept", f"{plan.kept:.0%}", "by low rank"))
    for name, comparisons in facts.comparisons[:1]:
        first = comparisons[0]
        change = f"x{first.change:.3f}" if first.ratio else f"{first.change:+.3g}"
        found.append((first.metric, f"{first.value:.4g}", f"{change} against {short(name)}"))
    for one, base in facts.speeds[:1]:
        ratio = _ratios(one, base)["decode"][0] if base else None
        against = f"x{ratio:.2f} against {short(base.model)}" if base else ""
        found.append((f"tokens/s, {_engine(one)}", f"{one.decode:.1f}", against))
    return found


def _kind_rows(facts: Facts) -> tuple[list[str], Rows]:
    """Components, and a row of bytes for each kind of tensor."""
    components = list(facts.breakdown)
    rows = []
    for kind in KINDS:
        sizes = [facts.breakdown[component].get(kind, 0) for component in components]
        if any(sizes):
            share = f"{sum(sizes) / facts.total_bytes:.1%}"
            rows.append([kind, *(f"{size:,}" for size in sizes), share])
    return components, rows


def _unit_rows(facts: Facts) -> Rows:
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
    """Pictures by name, None where there is nothing to draw."""
    yield "sizes", results.draw_sizes(facts.breakdown, facts.original_bytes)
    for index, (name, comparisons) in enumerate(facts.comparisons):
        yield f"changes{index}", results.draw_changes(comparisons, short(name))
    for index, (one, base) in enumerate(facts.speeds):
        if base is not None:
            names = {value: name.partition(",")[0] for name, value, *_ in _SPEEDS}
            ratios = {names[value]: each[0] for value, each in _ratios(one, base).items()}
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
    """A figure to put into a page, the same bytes each time. It shrinks with the page as long as it
    can be read."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    width = figure.get_figwidth() * 96
    return Markup(
        f'<div style="min-width: {_READABLE * width:.0f}px; max-width: {width:.0f}px">{svg}</div>'
    )


def _says(value) -> bool:
    """Whether a setting says anything: 0 does."""
    return value is not False and value not in (None, "")


def _interval(low: float | None, high: float | None, spec: str) -> str:
    return "" if low is None else f"[{low:{spec}}, {high:{spec}}]"


def short(name: str) -> str:
    """The last part of a folder or id."""
    return name.rstrip("/").rpartition("/")[2]

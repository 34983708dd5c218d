"""Pictures show the numbers they were given."""

import math

import pytest
from matplotlib.colors import to_hex

from casp_plugin.evaluation.results import Comparison, Evaluation, Measurement
from casp_plugin.evaluation.sweep_points import Point
from casp_plugin.plan.plan import Candidate, CompressionPlan, UnitPlan
from casp_plugin.report.figures.plans import (
    cost_grids,
    draw_budgets,
    draw_grids,
    draw_spectra,
    rank_grids,
)
from casp_plugin.report.figures.results import draw_changes, draw_frontier, draw_ratios, draw_sizes

LAYERS = range(3)
RANKS = {0: 16, 1: None, 2: 32}


@pytest.fixture
def plan():
    units = [
        UnitPlan(
            name=f"model.layers.{i}.mlp",
            modules={f"model.layers.{i}.mlp": (8, 8)},
            weights=64,
            importance=2.0,
            candidates=[
                Candidate(bits=2, group_size=8, bytes=24, error=0.5 + i),
                Candidate(bits=4, group_size=8, bytes=40, error=0.1),
            ],
            chosen=i % 2,
        )
        for i in LAYERS
    ]
    low_rank = [
        {
            "module": f"model.layers.{i}.q",
            "shape": (64, 64),
            "rank": rank,
            "keep": 0.5,
            "error": 0.2,
        }
        for i, rank in RANKS.items()
    ]
    spectra = [
        {"modules": [f"model.layers.{i}.q"], "ranks": [0, 16, 64], "lost": [1.0, 0.2, 0.0]}
        for i in LAYERS
    ]
    return CompressionPlan(
        model="m",
        average_bits=4,
        units=units,
        low_rank=low_rank,
        spectra=spectra,
        pareto=[{"average_bits": 3, "error": 2.0}, {"average_bits": 5, "error": 1.0}],
    )


def test_costs_of_the_fewest_bits(plan):
    [grid] = cost_grids(plan)
    assert grid.values == [[1.0, 3.0, 5.0]]
    assert grid.columns == ["0", "1", "2"]
    figure = draw_grids([grid])
    assert figure.axes[0].images[0].norm(1.0) == 0
    assert figure.axes[0].images[0].norm(5.0) == 1
    for unit in plan.units:
        unit.candidates[0].error = None
    assert cost_grids(plan) == []


def test_ranks_are_written_into_their_cells(plan):
    [grid] = rank_grids(plan)
    assert grid.values[0][0] == 16
    assert math.isnan(grid.values[0][1])
    assert [text.get_text() for text in draw_grids([grid]).axes[0].texts] == ["16", "32"]
    for entry in plan.low_rank:
        entry.rank = None
    assert rank_grids(plan) == []


def test_spectra_with_dots_at_the_chosen_ranks(plan):
    lines = draw_spectra(plan).axes[0].lines
    curves = [line for line in lines if len(line.get_xdata()) == 3]
    dots = [line for line in lines if len(line.get_xdata()) == 1]
    assert [list(line.get_ydata()) for line in curves] == [[1.0, 0.2, 0.0]] * 3
    assert [(*line.get_xdata(), *line.get_ydata()) for line in dots] == [(16, 0.2), (32, 0.2)]
    plan.spectra = []
    assert draw_spectra(plan) is None


def test_other_budgets(plan):
    curve, here = draw_budgets(plan).axes[0].lines
    assert list(curve.get_ydata()) == [2.0, 1.0]
    assert here.get_xdata()[0] == pytest.approx(plan.reached_bits)
    plan.pareto = []
    assert draw_budgets(plan) is None


def test_sizes_end_where_the_checkpoint_does():
    breakdown = {"language": {"codes": 3_000_000, "scales": 500_000}, "vision": {"codes": 10**6}}
    axes = draw_sizes(breakdown, 16_000_000).axes[0]
    ends = [(bar.get_x(), bar.get_x() + bar.get_width(), bar.get_y() > 0.5) for bar in axes.patches]
    assert ends == [(0, 4.0, False), (4.0, 4.5, False), (0, 16.0, True)]
    assert len(draw_sizes(breakdown, None).axes[0].patches) == 2


def change(metric, change, ratio, better, baseline=2.0, spread=0.1):
    ends = {"low": change - spread, "high": change + spread}
    fields = {"task": "t", "metric": metric, "value": 0, "baseline": baseline, "change": change}
    return Comparison(**fields, **ends, ratio=ratio, higher_is_better=better)


def test_changes_in_percent_of_the_baseline():
    comparisons = [
        change("perplexity", 0.5, True, False),
        change("acc", -0.5, False, True),
        change("same", 0.01, False, True),
        change("kl", 0.3, False, False, baseline=0.0),  # nothing to be a share of
    ]
    axes = draw_changes(comparisons, "b").axes[0]
    dots = [line for line in axes.lines if len(line.get_xdata()) == 1]
    assert [line.get_xdata()[0] for line in dots] == pytest.approx([0.5, -25, -50])  # from below
    colours = [to_hex(line.get_color()) for line in dots]
    assert colours == [to_hex("gray"), to_hex("tab:red"), to_hex("tab:blue")]
    spans = [tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2]
    assert spans[2] == pytest.approx((-60, -40))
    assert draw_changes(comparisons[3:], "b") is None


def test_ratios_know_what_is_better():
    axes = draw_ratios({"files": 0.5, "decode": 0.5, "memory": 2.0}, {"decode"}, "b").axes[0]
    colours = [to_hex(bar.get_facecolor()) for bar in axes.patches]
    red, blue = to_hex("tab:red"), to_hex("tab:blue")
    assert colours == [red, red, blue]  # from below: memory, decode, files
    assert [text.get_text() for text in axes.texts] == ["x2.00", "x0.50", "x0.50"]


def test_frontier_has_a_line_for_each_recipe():
    def point(name, series, size, value):
        found = Measurement(
            task="t", metric="perplexity", value=value, low=value - 1, high=value + 2
        )
        evaluation = Evaluation(model=name, settings={}, versions={}, measurements=[found])
        return Point(name=name, series=series, bytes=size * 10**6, evaluation=evaluation)

    points = [point("m", None, 100, 10.0), point("b", "x", 30, 20.0), point("a", "x", 20, 50.0)]
    axes = draw_frontier([*points, point("c", "y", 25, 90.0)]).axes[0]
    first, second = (container.lines[0] for container in axes.containers)
    assert list(first.get_xdata()) == [20, 30]  # by size
    assert list(first.get_ydata()) == [50, 20]
    assert list(second.get_ydata()) == [90]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["x", "y"]
    assert axes.get_yscale() == "log"
    assert axes.lines[0].get_ydata()[0] == 10.0  # the original, a level

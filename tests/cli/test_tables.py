"""Tables of the command: the summary of a plan, and names that are never cut."""

import re

import pytest
from rich.console import Console
from support.command_line import casp

from casp_plugin.checkpoint.check import Finding
from casp_plugin.cli import compress, output
from casp_plugin.evaluation.results import Evaluation, Measurement, comparison_table
from casp_plugin.plan.plan import (
    AttentionPlan,
    Candidate,
    CompressionPlan,
    CopiedTensor,
    LowRankPlan,
    ParetoPoint,
    UnitPlan,
)
from casp_plugin.plan.tables import plan_tables, total_table, unit_tables

LANGUAGE = "model.language_model.layers.{}.self_attn.q_proj+k_proj"
EXPERTS = "model.language_model.layers.{}.mlp.experts"
VISION = "model.vision_tower.vision_model.encoder.layers.{}.mlp.fc1"
HEAD = "model.multi_modal_projector.linear_of_an_uncommonly_long_name"


def unit(name, component, bits=3, rank=None, error=0.5):
    candidates = [
        Candidate(bits=b, rank=rank, group_size=64, bytes=125 * b, error=error) for b in (2, 3, 4)
    ]
    return UnitPlan(
        name=name,
        modules={name: (10, 100)},
        weights=1000,
        component=component,
        importance=1.0,
        candidates=candidates,
        chosen=None if bits is None else bits - 2,
    )


def plan(decided=True):
    units = [
        unit(LANGUAGE.format(0), "language", 3, 64),
        unit(LANGUAGE.format(1), "language", 4, 128),
        unit(LANGUAGE.format(2), "language", 4),
        unit(EXPERTS.format(0), "language", 2, error=4.5),
        unit(VISION.format(11), "vision", 2),
        unit(HEAD, "connector", 2),
    ]
    if not decided:
        units = [unit(each.name, each.component, None, error=None) for each in units]
    heads = {"heads": [0.5], "entropy": [0.5]}
    return CompressionPlan(
        model="an/uncommonly-long-name-of-a-model-that-is-on-the-hub-in-some-large-organisation",
        average_bits=3,
        units=units,
        attention=[AttentionPlan(module=VISION.format(1), **heads)],
        low_rank=[LowRankPlan(module=HEAD, shape=(10, 100), rank=None, keep=1.0, note="a note")],
        pareto=[ParetoPoint(average_bits=2.5, error=1.0)],
        copied=[CopiedTensor(name=VISION.format(2), bytes=4, why="the class does not build it")],
        other_bytes=100,
    )


@pytest.fixture
def screen(monkeypatch):
    """A console of 60 columns; a function that returns its columns of text, joined."""
    console = Console(width=60, record=True)
    monkeypatch.setattr(output, "console", console)

    def shown():
        lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= 60
        return lines

    return shown


def first_column(lines):
    """The first column of tables, joined: its text begins at the edge of a row."""
    texts = [line.strip("│┃ ") if line[:1] in "│┃" else line for line in lines]
    cells = [re.split(r"\s{2,}|[│┃]", text)[0].strip() for text in texts]
    return "".join(cells)


def test_long_names_in_tables_of_units(screen):
    output.show(*unit_tables(plan()))
    text = first_column(screen())
    for name in (LANGUAGE.format(0), EXPERTS.format(0), VISION.format(11), VISION.format(1), HEAD):
        assert name in text


def test_long_names_in_totals(screen):
    made = plan()
    output.show(total_table(made))
    text = "".join(line.split("│")[2].strip() for line in screen() if line.count("│") == 3)
    assert made.model in text
    assert VISION.format(2) in text.replace(" ", "")


def test_long_names_in_check(screen, monkeypatch):
    finding = Finding("tensor names and shapes", False, f"1 missing, first {VISION.format(3)}")
    monkeypatch.setattr("casp_plugin.checkpoint.check.check", lambda *args: [finding])
    with pytest.raises(compress.typer.Exit):
        compress._check("a/folder/of/an/uncommonly/long/name", True, False)
    text = "".join(line.split("│")[3].strip() for line in screen() if line.count("│") == 4)
    assert VISION.format(3) in text


def test_long_names_in_eval(screen):
    fields = {"value": 0.5, "low": 0.4, "high": 0.6, "totals": (1.0, 0.0), "weights": (1.0, 1.0)}
    task = "a_task_of_an_uncommonly_long_name_in_a_group_of_tasks"
    metric = "exact_match_after_a_filter_of_a_long_name"
    one = Measurement(task=task, metric=metric, higher_is_better=True, **fields)
    made = Evaluation(model="m", settings={}, versions={}, measurements=[one])
    output.show(made.table(), comparison_table("a against b", []))
    lines = [line.split("│") for line in screen() if line.count("│") == 5]
    assert task in "".join(line[1].strip() for line in lines)
    assert metric in "".join(line[2].strip() for line in lines)


def test_layers_by_kind():
    totals, kinds, components, budgets = plan_tables(plan())
    assert totals.title == "Totals"
    assert components.title == "Components"
    assert budgets.title.startswith("Budgets")
    rows = list(zip(*(column.cells for column in kinds.columns), strict=True))
    assert rows[0] == (
        *("language", "q_proj, k_proj", "3", "0.0M"),
        *("64 to 128, 1 dense", "3: 1, 4: 2", "3.6667", "0.0 MB", "21.4%"),
    )
    assert [row[:2] for row in rows[1:]] == [
        ("language", "experts"),
        ("vision", "fc1"),
        ("connector", "linear_of_an_uncommonly_long_name"),
    ]
    assert [row[-1] for row in rows] == ["21.4%", "64.3%", "7.1%", "7.1%"]


def test_layers_by_kind_of_a_plan_without_statistics():
    kinds = plan_tables(plan(decided=False))[1]
    first = [next(iter(column.cells)) for column in kinds.columns]
    assert first[4:] == ["", "2|3|4", "?", "?", "?"]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        (LANGUAGE.format(3), "q_proj, k_proj"),
        ("model.layers.0-1.mlp.down_proj", "down_proj"),
        ("model.layers.0", "layer"),
        ("model.layers.0-3", "layer"),
        ("lm_head", "lm_head"),
    ],
)
def test_layers_of_a_unit(name, layers):
    units = [unit(name, "language")]
    kinds = plan_tables(CompressionPlan(model="a", average_bits=3, units=units))[1]
    assert list(kinds.columns[0].cells) == [layers]


def test_units_are_shown_when_asked_for(tiny_llama, files):
    command = ["plan", tiny_llama, "--recipe", files / "recipe.yaml"]
    brief, whole = casp(*command).output, casp(*command, "--units").output
    assert brief.index("Totals") < brief.index("Layers by kind")
    assert "gate_proj, up_proj" in " ".join(brief.split())
    assert "layers.1.mlp.down_proj" not in brief
    assert "layers.1.mlp.down_proj" in whole
    brief, whole = (text[text.index("Totals") :] for text in (brief, whole))
    assert whole.startswith(brief.rstrip())

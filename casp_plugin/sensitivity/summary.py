"""What a study found, in files: analyses, tables, pictures, shares for bit allocation."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd
from loguru import logger
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from casp_plugin.evaluation.records import save_records
from casp_plugin.model.location import AXES
from casp_plugin.plan.sensitivity_file import Sensitivity, Shares, shares_of
from casp_plugin.sensitivity.analysis import Analysis, analyse, best_models, losses_together
from casp_plugin.sensitivity.figures import draw_importances, draw_quality
from casp_plugin.sensitivity.grid import Layer, weights_of
from casp_plugin.system.files import write_whole

__all__ = ["analyse_all", "summarise"]

ANALYSES_NAME, SHARES_NAME, TABLES_NAME = "analysis.json", "sensitivity.json", "sensitivity.md"


def analyse_all(points: pd.DataFrame, layers: Mapping[str, Layer], metric: str) -> list[Analysis]:
    """Every axis that tells parts apart, for every method and task. What cannot be told is left
    out, with a warning.

    :param points: rows of a study
    :param layers: of the model, by name
    """
    wanted = []
    for axis, field in AXES.items():
        found = weights_of(layers, axis)
        for method, rows in points[points.method != "original"].groupby("method", sort=False):
            if len(found) > 1 and rows[field].nunique() > 1:
                wanted += [(method, task, axis, found) for task in _tasks_of(points, metric)]
    made = []
    for method, task, axis, found in tqdm(wanted, desc="Forests", leave=False):
        try:
            made.append(analyse(points, method, task, metric, axis, found))
        except ValueError as error:
            logger.warning(f"{axis}s: {error}; left out")
    return made


def _tasks_of(points: pd.DataFrame, metric: str) -> list[str]:
    """Tasks that were scored by a metric."""
    return [c.removesuffix(f"/{metric}") for c in points.columns if c.endswith(f"/{metric}")]


def summarise(
    folder: Path,
    model: str,
    points: pd.DataFrame,
    analyses: Sequence[Analysis],
    metric: str,
    note: str,
) -> dict[str, Table]:
    """Write what was found beside the points.

    :param note: model, data and versions, below the tables
    :return: the tables, by title
    """
    tables = {}
    for axis in AXES:
        if chosen := [one for one in analyses if one.axis == axis]:
            tables[f"Importance of {axis}s, %"] = _importance_table(chosen)
    tasks = _tasks_of(points, metric)
    tables[f"Models that no other beats in bits a weight and in {metric}"] = _front_table(
        points, tasks, metric
    )
    for method in dict.fromkeys(one.method for one in analyses):
        for task in tasks:
            found = losses_together(points, method, task, metric)
            if len(found):
                tables[f"Losses of two components, {method}, {task}"] = _together_table(found)
    if analyses:
        save_records(analyses, folder / ANALYSES_NAME)
    text = Console(file=io.StringIO(), width=1000)
    for title, table in tables.items():
        text.print(f"{title}:\n", table)
    write_whole(folder / TABLES_NAME, f"{text.file.getvalue().strip()}\n\n{note}\n")
    _picture(folder / "quality.png", lambda: draw_quality(points, tasks, metric))
    for axis in dict.fromkeys(one.axis for one in analyses):
        chosen = [one for one in analyses if one.axis == axis]
        name = f"importance_{axis.replace(' ', '_')}.png"
        _picture(folder / name, lambda chosen=chosen: draw_importances(chosen))
    if shares := _shares(analyses):
        axis, methods = shares
        found = Sensitivity(model=model, axis=axis, methods=methods)
        write_whole(folder / SHARES_NAME, found.model_dump_json(indent=1) + "\n")
    return tables


def _shares(analyses: Sequence[Analysis]) -> tuple[str, dict[str, Shares]] | None:
    """Shares of components, of thirds of the blocks where there is one component."""
    for axis in ("component", "block group"):
        chosen = [one for one in analyses if one.axis == axis]
        methods = {}
        for method in dict.fromkeys(one.method for one in chosen):
            found = [one for one in chosen if one.method == method]
            parts = [{p: each.consensus for p, each in one.parts.items()} for one in found]
            methods[method] = shares_of(parts, [one.pairs for one in found])
        if methods:
            return axis, methods
    return None


def _importance_table(analyses: Sequence[Analysis]) -> Table:
    table = Table(box=box.MARKDOWN)
    columns = ("weights", "forest [95 %]", "permutation", "SHAP", "consensus", "models", "R2")
    for column in ("method", "task", "part", *columns):
        table.add_column(column, justify="right" if column in columns else "left")
    for one in analyses:
        for part, each in one.parts.items():
            table.add_row(
                one.method,
                one.task,
                part,
                f"{100 * each.weights:.1f}",
                f"{100 * each.forest:.1f} \\[{100 * each.low:.1f}, {100 * each.high:.1f}]",
                *(f"{100 * v:.1f}" for v in (each.permutation, each.shap, each.consensus)),
                str(one.points),
                f"{one.fit:.2f}",
            )
        for pair, share in one.pairs.items():
            shapley = f"{100 * share:.1f}"
            table.add_row(one.method, one.task, pair, "", "", "", shapley, "", "", "")
    return table


def _front_table(points: pd.DataFrame, tasks: Sequence[str], metric: str) -> Table:
    table = Table(box=box.MARKDOWN)
    for column in ("method", "task", "bits a weight", metric, "bits", "of"):
        table.add_column(column, justify="left" if column in ("method", "task", "of") else "right")
    for method in dict.fromkeys(points.method):
        for task in tasks:
            for _, row in best_models(points, method, task, metric).iterrows():
                if row.method == method:
                    parts = ", ".join(filter(None, (row[field] for field in AXES.values())))
                    numbers = (f"{row.bits_per_weight:.2f}", f"{row[f'{task}/{metric}']:.4g}")
                    table.add_row(method, task, *numbers, str(row.bits), parts)
    return table


def _together_table(losses: pd.DataFrame) -> Table:
    table = Table(box=box.MARKDOWN)
    for column in losses.columns:
        table.add_column(column, justify="left" if column == "pair" else "right")
    for row in losses.itertuples():
        ratio = "" if math.isnan(row.ratio) else f"{row.ratio:.2f}"
        table.add_row(str(row.bits), row.pair, f"{row.alone:.3f}", f"{row.together:.3f}", ratio)
    return table


def _picture(path: Path, draw: Callable) -> None:
    picture = io.BytesIO()
    draw().savefig(picture, dpi=120)
    write_whole(path, picture.getvalue())

"""Files of a finished study: analyses, tables, figures, and shares for bit allocation."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from loguru import logger
from rich import box
from rich.table import Table
from tqdm import tqdm

from casp_plugin.evaluation.records import save_records
from casp_plugin.evaluation.study_folder import write_figure, write_tables
from casp_plugin.model.location import AXES
from casp_plugin.plan.sensitivity_file import Sensitivity, Shares, shares_of
from casp_plugin.sensitivity.analysis import Analysis, analyse, best_models, losses_together
from casp_plugin.sensitivity.figures import draw_importances, draw_quality
from casp_plugin.sensitivity.grid import COLUMNS, Layer, weights_of
from casp_plugin.system.files import write_whole

__all__ = ["analyse_all", "summarise"]

ANALYSES_NAME, SHARES_NAME, TABLES_NAME = "analysis.json", "sensitivity.json", "sensitivity.md"


def analyse_all(points: pd.DataFrame, layers: Mapping[str, Layer], metric: str) -> list[Analysis]:
    """Analyse every axis with several levels, for every method and task; a warning tells of
    analyses that the points do not allow.

    :param points: rows of a study
    :param layers: layers of the model, by name
    :param metric: metric of the quality
    """
    wanted = []
    for axis, column in COLUMNS.items():
        weights = weights_of(layers, axis)
        for method, rows in points[points.method != "original"].groupby("method", sort=False):
            if len(weights) > 1 and rows[column].nunique() > 1:
                wanted += [(method, task, axis, weights) for task in _tasks_of(points, metric)]
    analyses = []
    for method, task, axis, weights in tqdm(wanted, desc="Forests", leave=False):
        try:
            analyses.append(analyse(points, method, task, metric, axis, weights))
        except ValueError as error:
            logger.warning(f"{axis}s: {error}; left out")
    return analyses


def _tasks_of(points: pd.DataFrame, metric: str) -> list[str]:
    """Return the tasks that were scored by a metric."""
    suffix = f"/{metric}"
    return [name.removesuffix(suffix) for name in points.columns if name.endswith(suffix)]


def summarise(
    folder: Path,
    model: str,
    points: pd.DataFrame,
    analyses: Sequence[Analysis],
    metric: str,
    note: str,
) -> dict[str, Table]:
    """Write the analyses, tables and figures of a study, and shares for bit allocation.

    :param folder: folder of the study
    :param model: folder or Hugging Face id of the original model
    :param points: rows of the study
    :param analyses: as ``analyse_all`` returns them
    :param metric: metric of the quality
    :param note: model, data and versions, in words; written below the tables
    :return: the tables, by title
    """
    tables = {}
    for axis in AXES:
        if chosen := [analysis for analysis in analyses if analysis.axis == axis]:
            tables[f"Importance of {axis}s, %"] = _importance_table(chosen)
    tasks = _tasks_of(points, metric)
    tables[f"Models that no other beats in bits a weight and in {metric}"] = _front_table(
        points, tasks, metric
    )
    for method in dict.fromkeys(analysis.method for analysis in analyses):
        for task in tasks:
            losses = losses_together(points, method, task, metric)
            if len(losses):
                tables[f"Losses of two components, {method}, {task}"] = _together_table(losses)
    if analyses:
        save_records(analyses, folder / ANALYSES_NAME)
    write_tables(folder / TABLES_NAME, tables, note)
    write_figure(folder / "quality.png", draw_quality(points, tasks, metric))
    for axis in dict.fromkeys(analysis.axis for analysis in analyses):
        chosen = [analysis for analysis in analyses if analysis.axis == axis]
        name = f"importance_{axis.replace(' ', '_')}.png"
        write_figure(folder / name, draw_importances(chosen))
    if shares := _shares_by_method(analyses):
        axis, methods = shares
        sensitivity = Sensitivity(model=model, axis=axis, methods=methods)
        write_whole(folder / SHARES_NAME, sensitivity.model_dump_json(indent=1) + "\n")
    return tables


def _shares_by_method(analyses: Sequence[Analysis]) -> tuple[str, dict[str, Shares]] | None:
    """Return an axis and the shares of its parts by method: components, or thirds of the blocks
    where there is a single component; None without analyses of either."""
    for axis in ("component", "block group"):
        chosen = [analysis for analysis in analyses if analysis.axis == axis]
        methods = {}
        for method in dict.fromkeys(analysis.method for analysis in chosen):
            of_method = [analysis for analysis in chosen if analysis.method == method]
            parts = [
                {part: importance.consensus for part, importance in analysis.parts.items()}
                for analysis in of_method
            ]
            methods[method] = shares_of(parts, [analysis.pairs for analysis in of_method])
        if methods:
            return axis, methods
    return None


def _importance_table(analyses: Sequence[Analysis]) -> Table:
    table = Table(box=box.MARKDOWN)
    columns = ("weights", "forest [95 %]", "permutation", "SHAP", "consensus", "models", "R2")
    for column in ("method", "task", "part", *columns):
        table.add_column(column, justify="right" if column in columns else "left")
    for analysis in analyses:
        labels = (analysis.method, analysis.task)
        for part, importance in analysis.parts.items():
            low, high = 100 * importance.low, 100 * importance.high
            table.add_row(
                *labels,
                part,
                f"{100 * importance.weights:.1f}",
                f"{100 * importance.forest:.1f} \\[{low:.1f}, {high:.1f}]",
                f"{100 * importance.permutation:.1f}",
                f"{100 * importance.shap:.1f}",
                f"{100 * importance.consensus:.1f}",
                str(analysis.points),
                f"{analysis.fit:.2f}",
            )
        for pair, share in analysis.pairs.items():
            table.add_row(*labels, pair, "", "", "", f"{100 * share:.1f}", "", "", "")
    return table


def _front_table(points: pd.DataFrame, tasks: Sequence[str], metric: str) -> Table:
    table = Table(box=box.MARKDOWN)
    for column in ("method", "task", "bits a weight", metric, "bits", "of"):
        table.add_column(column, justify="left" if column in ("method", "task", "of") else "right")
    for method in dict.fromkeys(points.method):
        for task in tasks:
            for _, row in best_models(points, method, task, metric).iterrows():
                if row.method == method:
                    levels = ", ".join(filter(None, (row[column] for column in COLUMNS.values())))
                    numbers = (f"{row.bits_per_weight:.2f}", f"{row[f'{task}/{metric}']:.4g}")
                    table.add_row(method, task, *numbers, str(row.bits), levels)
    return table


def _together_table(losses: pd.DataFrame) -> Table:
    table = Table(box=box.MARKDOWN)
    for column in losses.columns:
        table.add_column(column, justify="left" if column == "pair" else "right")
    for row in losses.itertuples():
        ratio = "" if math.isnan(row.ratio) else f"{row.ratio:.2f}"
        table.add_row(str(row.bits), row.pair, f"{row.alone:.3f}", f"{row.together:.3f}", ratio)
    return table

"""Figures of a study: quality against average bits, importance of parts."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from casp_plugin.sensitivity.analysis import Analysis, best_models

__all__ = ["draw_importances", "draw_quality"]


def draw_quality(points: pd.DataFrame, tasks: Sequence[str], metric: str) -> Figure:
    """Draw the quality of all models against average bits, with the Pareto front: a column for
    every task, a row for every method, colours for the quantized components, or for thirds of the
    blocks where there is a single component.

    :param points: rows of a study, with the original
    :param tasks: tasks that were scored
    :param metric: metric of the quality
    """
    quantized = points[points.method != "original"]
    methods = list(dict.fromkeys(quantized.method))
    figure = Figure(figsize=(5 * len(tasks), 3.6 * len(methods)), layout="constrained")
    grid = figure.subplots(len(methods), len(tasks), squeeze=False, sharex=True)
    axis = "component" if quantized.component.nunique() > 1 else "block"
    shown = sorted(set(quantized[axis]), key=lambda name: (name.count("+"), name))
    for task, column in zip(tasks, grid.T, strict=True):
        values = points[f"{task}/{metric}"]
        for method, axes in zip(methods, column, strict=True):
            inside = points.method == method
            for index, name in enumerate(shown):
                chosen = inside & (points[axis] == name)
                bits = points.bits_per_weight[chosen]
                axes.scatter(bits, values[chosen], s=12, color=f"C{index}", label=name)
            before = values[points.method == "original"].item()
            axes.axhline(before, linestyle="--", color="gray", linewidth=0.8, label="original")
            front = best_models(points, method, task, metric)
            axes.step(
                front.bits_per_weight,
                front[f"{task}/{metric}"],
                where="post",
                color="black",
                linewidth=0.8,
                label="Pareto front",
            )
            if metric == "perplexity" and values.max() > 10 * values.min():
                axes.set_yscale("log")
            axes.set_title(f"{task}, {method}", fontsize=10)
            axes.set_ylabel(metric)
            axes.set_xlabel("bits a weight, everything counted")
            axes.label_outer()
            axes.yaxis.set_tick_params(labelleft=True)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def draw_importances(analyses: Sequence[Analysis]) -> Figure:
    """Draw the consensus importance of parts as bars, a group for every method and task, with the
    forest's 95 % intervals as lines.

    :param analyses: analyses of one axis
    """
    names = [f"{analysis.method}, {analysis.task}" for analysis in analyses]
    parts = list(analyses[0].parts)
    figure = Figure(figsize=(1.8 + 1.3 * len(names), 3.6), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(names))
    width = 0.8 / len(parts)
    for index, part in enumerate(parts):
        importances = [analysis.parts[part] for analysis in analyses]
        at = places + (index - (len(parts) - 1) / 2) * width
        heights = [100 * importance.consensus for importance in importances]
        axes.bar(at, heights, width, label=part)
        spans = [(100 * importance.low, 100 * importance.high) for importance in importances]
        axes.vlines(at, *zip(*spans, strict=True), color="black", linewidth=0.8)
    axes.set_xticks(places, names, rotation=20, ha="right")
    axes.set_ylabel(f"consensus importance of\n{analyses[0].axis}s, %")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure

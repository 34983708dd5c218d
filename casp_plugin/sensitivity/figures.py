"""A study as pictures: quality against bits a weight, importance of parts."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from casp_plugin.sensitivity.analysis import Analysis, best_models

__all__ = ["draw_importances", "draw_quality"]


def draw_quality(points: pd.DataFrame, tasks: Sequence[str], metric: str) -> Figure:
    """Every model of a study, quality against bits a weight: tasks side by side, a row for each
    method; coloured by the components that are quantized, or by the thirds of the blocks where
    there is one component, with the Pareto front.

    :param points: rows of a study, the original among them
    """
    made = points[points.method != "original"]
    methods = list(dict.fromkeys(made.method))
    figure = Figure(figsize=(5 * len(tasks), 3.6 * len(methods)), layout="constrained")
    grid = figure.subplots(len(methods), len(tasks), squeeze=False, sharex=True)
    axis = "component" if made.component.nunique() > 1 else "block"
    shown = sorted(set(made[axis]), key=lambda name: (name.count("+"), name))
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
    """Consensus importance of parts as bars, one for each method and task; lines are the forest's
    95 % intervals.

    :param analyses: all of one axis
    """
    names = [f"{one.method}, {one.task}" for one in analyses]
    parts = list(analyses[0].parts)
    figure = Figure(figsize=(1.8 + 1.3 * len(names), 3.6), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(names))
    width = 0.8 / len(parts)
    for index, part in enumerate(parts):
        found = [one.parts[part] for one in analyses]
        at = places + (index - (len(parts) - 1) / 2) * width
        axes.bar(at, [100 * each.consensus for each in found], width, label=part)
        spans = [(100 * each.low, 100 * each.high) for each in found]
        axes.vlines(at, *zip(*spans, strict=True), color="black", linewidth=0.8)
    axes.set_xticks(places, names, rotation=20, ha="right")
    axes.set_ylabel(f"consensus importance of\n{analyses[0].axis}s, %")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure

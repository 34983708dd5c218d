"""Figures of results: quality against bytes, bytes by kind of tensor, changes, speed."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from casp_plugin.checkpoint.sizes import TENSOR_KINDS
from casp_plugin.evaluation.results import Comparison
from casp_plugin.evaluation.sweep_points import Point
from casp_plugin.system.messages import size_text

__all__ = ["draw_changes", "draw_frontier", "draw_ratios", "draw_sizes"]


def draw_frontier(points: Sequence[Point]) -> Figure:
    """Draw quality against bytes, a line for every recipe, with 95 % intervals.

    :param points: points of a sweep; the first is the original model, drawn as a level
    """
    original, *others = points
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(original.quality.value, linestyle="--", color="gray")
    axes.annotate(
        f"original, {size_text(original.bytes)}",
        (0, original.quality.value),
        xycoords=("axes fraction", "data"),
        xytext=(4, 4),
        textcoords="offset points",
    )
    for series in dict.fromkeys(point.series for point in others):
        line = [point for point in others if point.series == series]
        line.sort(key=lambda point: point.bytes)
        sizes = [point.bytes / 1e6 for point in line]
        values = [point.quality.value for point in line]
        spread = [
            (0, 0)
            if quality.low is None
            else (quality.value - quality.low, quality.high - quality.value)
            for quality in (point.quality for point in line)
        ]
        axes.errorbar(
            sizes, values, list(zip(*spread, strict=True)), marker="o", capsize=3, label=series
        )
        for point, size, value in zip(line, sizes, values, strict=True):
            if point.average_bits is not None:
                where = {"xytext": (5, 5), "textcoords": "offset points"}
                axes.annotate(f"{point.average_bits:.3g}", (size, value), **where)
    values = [point.quality.value for point in points]
    if min(values) > 0 and max(values) > 4 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("safetensors, MB (beside points: average bits)")
    axes.set_ylabel(original.quality.metric)
    axes.legend()
    return figure


def draw_sizes(breakdown: dict[str, dict[str, int]], original: int | None) -> Figure:
    """Draw the bytes of a checkpoint as one bar of kinds, above a bar of the original model.

    :param breakdown: bytes by component, then by kind
    :param original: bytes of the original model's tensors; None if unknown
    """
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    start = 0.0
    for kind in TENSOR_KINDS:
        size = sum(sizes.get(kind, 0) for sizes in breakdown.values()) / 1e6
        if size:
            axes.barh(0, size, left=start, label=kind, edgecolor="white", linewidth=0.5)
            start += size
    rows = ["this checkpoint"]
    if original is not None:
        axes.barh(1, original / 1e6, color="lightgray")
        rows.append("original")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("MB")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def draw_changes(comparisons: Sequence[Comparison], against: str) -> Figure | None:
    """Draw the change of every metric against a baseline in percent of the baseline's value, with
    95 % intervals: blue is better, red is worse, gray is within chance. Return None where no change
    can be expressed so.

    :param comparisons: comparisons with the baseline
    :param against: name of the baseline
    """
    shown = [
        comparison for comparison in comparisons if comparison.ratio or comparison.baseline > 0
    ]
    if not shown:
        return None
    figure = Figure(figsize=(6, 1.3 + 0.32 * len(shown)), layout="constrained")
    axes = figure.subplots()
    colours = {"better": "tab:blue", "worse": "tab:red"}
    for row, comparison in enumerate(reversed(shown)):
        ratio, baseline = comparison.ratio, comparison.baseline
        middle, low, high = (
            None if value is None else 100 * (value - 1 if ratio else value / baseline)
            for value in (comparison.change, comparison.low, comparison.high)
        )
        colour = colours.get(comparison.verdict, "gray")
        axes.plot(middle, row, "o", color=colour)
        if low is not None:
            axes.plot([low, high], [row, row], color=colour)
    axes.axvline(0, color="black", linewidth=0.8)
    names = [f"{comparison.task}, {comparison.metric}" for comparison in reversed(shown)]
    axes.set_yticks(range(len(shown)), names)
    axes.set_xlabel(f"change against {against}, %")
    return figure


def draw_ratios(ratios: dict[str, float], more_is_better: set[str], against: str) -> Figure:
    """Draw ratios to a baseline as bars that begin at 1: blue is better, red is worse.

    :param ratios: ratios by quantity
    :param more_is_better: quantities of which more is better
    :param against: name of the baseline
    """
    figure = Figure(figsize=(6, 1.3 + 0.32 * len(ratios)), layout="constrained")
    axes = figure.subplots()
    names = list(reversed(ratios))
    better = [(ratios[name] > 1) == (name in more_is_better) for name in names]
    colours = ["tab:blue" if is_better else "tab:red" for is_better in better]
    bars = axes.barh(names, [ratios[name] - 1 for name in names], left=1, color=colours)
    axes.bar_label(bars, [f"x{ratios[name]:.2f}" for name in names], padding=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.15)
    axes.set_xlabel(f"against {against}")
    return figure

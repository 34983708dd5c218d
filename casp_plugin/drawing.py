"""Pictures: bits over the layers, how sparse each head's attention is, quality against bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from casp_plugin.plan import CompressionPlan
from casp_plugin.sweep import Point

__all__ = ["draw", "draw_frontier"]


@dataclass(frozen=True)
class _Grid:
    """Values by row and layer."""

    title: str
    rows: list[str]
    columns: list[str]
    values: list[list[float]]
    label: str
    ticks: list[int] | None = None


def draw(plan: CompressionPlan) -> Figure:
    """
    :param plan: a decided one
    :return: a panel of bits for each component of the model, and one of attention densities for
        each whose attention was looked at
    """
    grids = _bits(plan) + _densities(plan)
    widths = [len(grid.columns) for grid in grids]
    heights = [1.6 + 0.3 * len(grid.rows) for grid in grids]
    figure = Figure(figsize=(4.5 + 0.28 * max(widths), sum(heights)), layout="constrained")
    panels = figure.subplots(len(grids), squeeze=False, height_ratios=heights)[:, 0]
    for axes, grid in zip(panels, grids, strict=True):
        low, high = (min(grid.ticks), max(grid.ticks)) if grid.ticks else (0, None)
        image = axes.imshow(grid.values, vmin=low, vmax=high, cmap="viridis", aspect="auto")
        axes.set_yticks(range(len(grid.rows)), grid.rows)
        axes.set_xticks(range(len(grid.columns)), grid.columns, rotation=90)
        axes.set_xlabel("layer")
        axes.set_title(grid.title)
        figure.colorbar(image, ticks=grid.ticks, label=grid.label)
    return figure


def draw_frontier(points: Sequence[Point]) -> Figure:
    """Quality against bytes, a line for each recipe, with 95 % intervals.

    :param points: the first is the original model, drawn as a level
    """
    original, *others = points
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(original.quality.value, linestyle="--", color="gray")
    axes.annotate(
        f"original, {original.bytes / 1e6:,.0f} MB",
        (1, original.quality.value),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
    )
    for series in dict.fromkeys(point.series for point in others):
        line = sorted((p for p in others if p.series == series), key=lambda point: point.bytes)
        sizes = [point.bytes / 1e6 for point in line]
        values = [point.quality.value for point in line]
        spread = [
            (0, 0) if q.low is None else (q.value - q.low, q.high - q.value)
            for q in (point.quality for point in line)
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
    axes.set_xlabel("safetensors, MB (beside points: average bits)")
    axes.set_ylabel(original.quality.metric)
    axes.legend()
    return figure


def _bits(plan: CompressionPlan) -> list[_Grid]:
    candidates = sorted({c.bits for unit in plan.units for c in unit.candidates})
    grids = []
    for component in dict.fromkeys(unit.component for unit in plan.units):
        units = [unit for unit in plan.units if unit.component == component]
        reached = sum(unit.choice.bytes for unit in units) * 8 / sum(unit.weights for unit in units)
        cells = {_cell(unit.name): unit.choice.bits for unit in units}
        title = f"{component}: bits, {reached:.3f} on average"
        grids.append(_grid(title, cells, "bits", candidates))
    return grids


def _densities(plan: CompressionPlan) -> list[_Grid]:
    panels: dict[str, dict] = {}
    for attention in plan.attention:
        over = {
            "": attention.heads,
            ", over images": attention.image,
            ", over text": attention.text,
        }
        _, layer = _cell(attention.module)
        for kind, heads in over.items():
            if heads is not None:
                cells = panels.setdefault(f"{attention.component}: attention density{kind}", {})
                cells |= {(f"head {i}", layer): share for i, share in enumerate(heads)}
    return [_grid(title, cells, "share of entries", None) for title, cells in panels.items()]


def _grid(title: str, cells: dict[tuple[str, str], float], label: str, ticks) -> _Grid:
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    values = [[cells.get((row, column), float("nan")) for column in columns] for row in rows]
    return _Grid(title, rows, columns, values, label, ticks)


def _cell(name: str) -> tuple[str, str]:
    """Row and column of a module: ``model.layers.3.mlp.up_proj`` -> ``mlp.up_proj``, ``3``."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part[:1].isdigit():
            return ".".join(parts[at + 1 :]) or "layer", part
    return name, "-"

"""Figures of a plan: bits, ranks and costs over the layers, spectra, other budgets, and the
attention density of heads."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from casp_plugin.maths.average_bits import average_bits
from casp_plugin.plan.plan import CompressionPlan

__all__ = [
    "Grid",
    "bit_grids",
    "cost_grids",
    "density_grids",
    "draw",
    "draw_budgets",
    "draw_grids",
    "draw_spectra",
    "rank_grids",
]

#: cells of a row that leave room for numbers in them, at most
_NUMBERED = 48


@dataclass(frozen=True)
class Grid:
    """Values by row and layer.

    :param title: title of the panel
    :param rows: names of the rows
    :param columns: names of the columns: layers
    :param values: values by row, then by column; NaN for empty cells
    :param label: label of the colours
    :param ticks: all values that occur, where they are few
    :param logarithmic: whether colours show orders of magnitude
    :param spec: format of the numbers in the cells; None for no numbers
    """

    title: str
    rows: list[str]
    columns: list[str]
    values: list[list[float]]
    label: str
    ticks: list[int] | None = None
    logarithmic: bool = False
    spec: str | None = None


def draw(plan: CompressionPlan) -> Figure:
    """Draw a panel of bits for every component of a model, and panels of attention densities where
    the plan has them.

    :param plan: a decided plan
    """
    return draw_grids([*bit_grids(plan), *density_grids(plan)])


def draw_grids(grids: list[Grid]) -> Figure:
    """Draw a panel for every grid, one below the other."""
    widths = [len(grid.columns) for grid in grids]
    heights = [1.6 + 0.3 * len(grid.rows) for grid in grids]
    figure = Figure(figsize=(4.5 + 0.28 * max(widths), sum(heights)), layout="constrained")
    panels = figure.subplots(len(grids), squeeze=False, height_ratios=heights)[:, 0]
    for axes, grid in zip(panels, grids, strict=True):
        norm = _norm(grid)
        image = axes.imshow(grid.values, norm=norm, cmap="viridis", aspect="auto")
        axes.set_yticks(range(len(grid.rows)), grid.rows)
        axes.set_xticks(range(len(grid.columns)), grid.columns, rotation=90)
        axes.set_xlabel("layer")
        axes.set_title(grid.title, loc="left")
        figure.colorbar(image, ticks=grid.ticks, label=grid.label)
        if grid.spec is not None and len(grid.columns) <= _NUMBERED:
            for y, row in enumerate(grid.values):
                for x, value in enumerate(row):
                    if not math.isnan(value):
                        dark = norm(value) < 0.6
                        style = {"color": "white" if dark else "black", "fontsize": 7}
                        axes.text(x, y, format(value, grid.spec), ha="center", va="center", **style)
    return figure


def bit_grids(plan: CompressionPlan) -> list[Grid]:
    """Return the chosen bits of all units, a grid for every component."""
    candidates = sorted({option.bits for unit in plan.units for option in unit.candidates})
    grids = []
    for component, units in _by_component(plan):
        reached = average_bits(
            sum(unit.choice.bytes for unit in units), sum(unit.weights for unit in units)
        )
        cells = {_row_and_column(unit.name): unit.choice.bits for unit in units}
        title = f"{component}: bits, {reached:.3f} on average"
        grids.append(_grid(title, cells, "bits", candidates, spec="g"))
    return grids


def cost_grids(plan: CompressionPlan) -> list[Grid]:
    """Return the costs (importance x error) of all units at their fewest bits, a grid for every
    component whose errors were measured."""
    grids = []
    for component, units in _by_component(plan):
        cells = {
            _row_and_column(unit.name): unit.importance * unit.candidates[0].error
            for unit in units
            if unit.importance is not None and unit.candidates[0].error is not None
        }
        if cells:
            title = f"{component}: cost of {units[0].candidates[0].bits} bits"
            grids.append(_grid(title, cells, "importance x error", None, logarithmic=True))
    return grids


def rank_grids(plan: CompressionPlan) -> list[Grid]:
    """Return the ranks of all factored layers, a grid for every component that has any."""
    grids = []
    for component in dict.fromkeys(entry.component for entry in plan.low_rank):
        entries = [entry for entry in plan.low_rank if entry.component == component]
        cells = {
            _row_and_column(entry.module): math.nan if entry.rank is None else entry.rank
            for entry in entries
        }
        if not all(map(math.isnan, cells.values())):
            title = f"{component}: rank of the factors (white: dense)"
            grids.append(_grid(title, cells, "rank", None, spec="g"))
    return grids


def density_grids(plan: CompressionPlan) -> list[Grid]:
    """Return the attention density of every head (share of the map's entries that are not nearly
    zero), a grid for every component, and grids for images and for text where there were images."""
    panels: dict[str, dict] = {}
    for attention in plan.attention:
        over = {
            "": attention.heads,
            ", over images": attention.image,
            ", over text": attention.text,
        }
        _, layer = _row_and_column(attention.module)
        for kind, heads in over.items():
            if heads is not None:
                cells = panels.setdefault(f"{attention.component}: attention density{kind}", {})
                cells |= {(f"head {i}", layer): share for i, share in enumerate(heads)}
    return [_grid(title, cells, "share of entries", None) for title, cells in panels.items()]


def draw_spectra(plan: CompressionPlan) -> Figure | None:
    """Draw the share of the output energy that factors lose, by rank: a line for every latent, with
    a dot at the chosen rank; None without spectra."""
    if not plan.spectra:
        return None
    ranks = {entry.module: (entry.rank, entry.error) for entry in plan.low_rank}
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    colours = Normalize(0, max(1, len(plan.spectra) - 1))
    mapped = axes.scatter([], [], c=[], cmap="viridis", norm=colours)
    for index, spectrum in enumerate(plan.spectra):
        colour = mapped.to_rgba(index)
        axes.plot(spectrum.ranks, spectrum.lost, color=colour, linewidth=0.8)
        rank, error = ranks.get(spectrum.modules[0], (None, None))
        if rank is not None and error is not None:
            axes.plot(rank, error, "o", color=colour, markersize=5)
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(1e-5, min(min(spectrum.lost[:-1]) for spectrum in plan.spectra)))
    axes.set_xlabel("rank (dots: chosen)")
    axes.set_ylabel("share of the output energy lost")
    figure.colorbar(mapped, label="attention module, in order")
    return figure


def draw_budgets(plan: CompressionPlan) -> Figure | None:
    """Draw the least expected error by budget; None where errors are unknown."""
    if not plan.pareto:
        return None
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for budget in plan.budgets:
        points = [point for point in plan.pareto if point.component == budget.component]
        bits = [point.average_bits for point in points]
        errors = [point.error for point in points]
        [line] = axes.plot(bits, errors, "o-", label=budget.component)
        axes.axvline(budget.reached_bits, linestyle="--", color=line.get_color())
    axes.set_yscale("log")
    axes.set_xlabel("average bits (dashed: this checkpoint)")
    axes.set_ylabel("importance x error")
    if len(plan.budgets) > 1:
        axes.legend()
    return figure


def _by_component(plan: CompressionPlan) -> Iterator[tuple[str, list]]:
    for component in dict.fromkeys(unit.component for unit in plan.units):
        yield component, [unit for unit in plan.units if unit.component == component]


def _norm(grid: Grid) -> Normalize:
    values = [value for row in grid.values for value in row if not math.isnan(value)]
    if grid.logarithmic:
        positive = [value for value in values if value > 0]
        if positive:
            return LogNorm(min(positive), max(positive))
    low, high = (min(grid.ticks), max(grid.ticks)) if grid.ticks else (0, max(values))
    return Normalize(low, high)


def _grid(title: str, cells: dict[tuple[str, str], float], label: str, ticks, **more) -> Grid:
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    values = [[cells.get((row, column), math.nan) for column in columns] for row in rows]
    return Grid(title, rows, columns, values, label, ticks, **more)


def _row_and_column(name: str) -> tuple[str, str]:
    """Return row and column of a module: ``mlp.up_proj``, ``3`` for ``layers.3.mlp.up_proj``."""
    path = name.split(".")
    for at, level in enumerate(path):
        if level[:1].isdigit():
            return ".".join(path[at + 1 :]) or "layer", level
    return name, "-"

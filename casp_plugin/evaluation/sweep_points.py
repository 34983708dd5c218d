"""The points of a sweep: quality against bytes, kept in its folder and as a table."""

from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from rich import box
from rich.table import Table

from casp_plugin.evaluation.records import load_records, save_records
from casp_plugin.evaluation.results import Evaluation, Measurement, bracketed

__all__ = ["Point", "finished", "frontier_table"]

POINTS_NAME = "sweep.json"


class Point(BaseModel):
    """One model of a sweep.

    :param name: folder inside the sweep's, or the original model
    :param series: recipe that made it; None of the original
    :param average_bits: as reached, over the layers that bits were chosen for; None where none were
    :param bytes: of its safetensors files
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    series: str | None = None
    average_bits: float | None = None
    bytes: int
    evaluation: Evaluation

    @property
    def quality(self) -> Measurement:
        """Return the measurement that sizes are compared by: the first one."""
        return self.evaluation.measurements[0]


def finished(folder: Path, make: dict[str, Callable[[], Point]]) -> list[Point]:
    """Make the points that a folder does not have yet, and keep each as soon as it is there.

    :param make: makes a point, by its name
    :return: all of the folder, the first one first, then recipe by recipe by rising size
    """
    path = folder / POINTS_NAME
    kept = load_records(Point, path, "casp sweep") if path.exists() else []
    points = {point.name: point for point in kept}
    for name, make_point in make.items():
        if name not in points:
            points[name] = make_point()
            save_records(list(points.values()), path)
    first, *others = points.values()
    series = list(dict.fromkeys(point.series for point in others))
    return [first, *sorted(others, key=lambda point: (series.index(point.series), point.bytes))]


def frontier_table(points: Sequence[Point]) -> Table:
    """Return a table in Markdown's form with a row for every point: its size, its average bits, and
    its measurements with their 95 % intervals."""
    metrics = [measured.metric for measured in points[-1].evaluation.measurements]
    table = Table(box=box.MARKDOWN)
    for column in ("", "bytes", "average bits", *metrics):
        table.add_column(column, justify="right" if column else "left")
    for point in points:
        texts = {
            measured.metric: f"{measured.value:.4g} "
            f"{bracketed(measured.low, measured.high, '.4g')}".rstrip()
            for measured in point.evaluation.measurements
        }
        bits = "" if point.average_bits is None else f"{point.average_bits:.4f}"
        cells = [texts.get(metric, "") for metric in metrics]
        table.add_row(point.name, f"{point.bytes:,}", bits, *cells)
    return table

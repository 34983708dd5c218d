"""One model at many sizes: quality against bytes."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from rich import box
from rich.table import Table

from casp_plugin.evaluation.records import load_records, save_records
from casp_plugin.evaluation.results import Evaluation, Measurement
from casp_plugin.system.files import write_whole

__all__ = ["Point", "begin", "finished", "frontier_table"]

FACTS_NAME, RECIPES_NAME = "facts.json", "recipes"
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
        """What the sweep is about: the first thing that was measured."""
        return self.evaluation.measurements[0]


def begin(folder: Path, facts: dict, recipes: Sequence[Path] = (), kind: str = "sweep") -> None:
    """Note how the points of a folder are made, so that a stopped sweep goes on with it.

    :param facts: all that they depend on but recipes and budgets, as JSON values
    :param recipes: files; copied into the folder
    :param kind: what errors call it
    :raises ValueError: if the folder holds something else, or points made otherwise
    """
    path, copies = folder / FACTS_NAME, folder / RECIPES_NAME
    if not path.exists() and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--output {folder} is neither empty nor the folder of a {kind}")
    before = json.loads(path.read_text()) if path.exists() else facts
    changed = [f"{name} was {before[name]!r}" for name in facts if before[name] != facts[name]]
    for recipe in recipes:
        copy = copies / recipe.name
        if copy.exists() and copy.read_text() != recipe.read_text():
            changed.append(f"{recipe.name} was another recipe")
    if changed:
        raise ValueError(
            f"--output {folder} holds a {kind} made otherwise ({'; '.join(changed)}): give it "
            "another folder, or the same settings"
        )
    write_whole(path, json.dumps(facts, indent=1) + "\n")
    for recipe in recipes:
        write_whole(copies / recipe.name, recipe.read_text())


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
    """A row a point, with what was measured and its 95 % interval; in Markdown's form."""
    metrics = [one.metric for one in points[-1].evaluation.measurements]
    table = Table(box=box.MARKDOWN)
    for column in ("", "bytes", "average bits", *metrics):
        table.add_column(column, justify="right" if column else "left")
    for point in points:
        found = {one.metric: _cell(one) for one in point.evaluation.measurements}
        bits = "" if point.average_bits is None else f"{point.average_bits:.4f}"
        values = [found.get(metric, "") for metric in metrics]
        table.add_row(point.name, f"{point.bytes:,}", bits, *values)
    return table


def _cell(one: Measurement) -> str:
    interval = "" if one.low is None else f" [{one.low:.4g}, {one.high:.4g}]"
    return f"{one.value:.4g}{interval}"

"""The folder of a study (a sweep, a sensitivity study): how its points are made is noted in it
once, so that a stopped study goes on and no folder mixes points made in two ways; its tables and
figures are written at the end."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from casp_plugin.system.files import write_whole

if TYPE_CHECKING:  # an extra
    from matplotlib.figure import Figure

__all__ = ["begin", "write_figure", "write_tables"]

FACTS_NAME, RECIPES_NAME = "facts.json", "recipes"


def begin(folder: Path, facts: dict, recipes: Sequence[Path] = (), kind: str = "sweep") -> None:
    """Note how the points of a folder are made; check it where the folder notes it already.

    :param facts: all that the points depend on except recipes and budgets, as JSON values
    :param recipes: recipe files, which are copied into the folder
    :param kind: kind of study, as errors call it
    :raises ValueError: if the folder holds something else, or points made in another way
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


def write_tables(path: Path, tables: Mapping[str, Table], note: str) -> None:
    """Write tables in Markdown, whole or not at all.

    :param tables: tables in Markdown's form, by title; an empty title is left out
    :param note: model, data and versions in words; written below the tables
    """
    text = Console(file=io.StringIO(), width=1000)
    for title, table in tables.items():
        text.print(*([f"{title}:\n"] if title else []), table)
    write_whole(path, f"{text.file.getvalue().strip()}\n\n{note}\n")


def write_figure(path: Path, figure: "Figure") -> None:
    """Write a figure as PNG, whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    write_whole(path, picture.getvalue())

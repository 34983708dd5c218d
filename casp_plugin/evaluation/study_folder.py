"""The folder of a study (a sweep, a sensitivity study): how its points are made is noted in it
once, so that a stopped study goes on and no folder mixes points made in two ways."""

import json
from collections.abc import Sequence
from pathlib import Path

from casp_plugin.system.files import write_whole

__all__ = ["begin"]

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

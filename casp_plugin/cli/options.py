"""Options that several commands take, and where they print."""

import inspect
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

console = Console()

Model = Annotated[str, typer.Argument(help="Model folder or Hugging Face id.", metavar="MODEL")]
Checkpoint = Annotated[
    Path, typer.Argument(help="Checkpoint folder.", metavar="OUT", exists=True, file_okay=False)
]
RecipeFile = Annotated[
    Path, typer.Option("--recipe", help="Recipe in YAML.", exists=True, dir_okay=False)
]
AverageBits = Annotated[
    str | None,
    typer.Option(
        help="Budget of the recipe's BitAllocationModifier, instead of the one written there: a "
        "number, or language=2.25,vision=4.25 where the recipe has one for each component."
    ),
]
Pipeline = Annotated[
    Literal["independent", "sequential", "basic"] | None,
    typer.Option(
        "--pipeline",
        help="How llm-compressor calibrates: layer by layer, or the model as a whole (basic).",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of all that is random.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the model."),
]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "casp"


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """The folder that keeps what is measured."""

    cache: Annotated[
        Path,
        typer.Option(
            envvar="CASP_CACHE",
            help="Keep what is measured here, for runs after one that died and for other budgets.",
        ),
    ] = CACHE
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Keep nothing of what is measured.")
    ] = False
    cache_limit: Annotated[
        float,
        typer.Option(
            help="GB that --cache may hold after a run; what was used longest ago goes first.",
            min=0.1,
        ),
    ] = 50.0

    @property
    def folder(self) -> Path | None:
        return None if self.no_cache else self.cache


def with_groups(function: Callable) -> Callable:
    """Let a function that takes groups of options, which are dataclasses, be a command of typer.

    Typer reads options from a function's signature. That of the function returned has the fields
    of each group in the place of the group.
    """
    parameters = inspect.signature(function).parameters.values()
    groups = {each.name: each.annotation for each in parameters if is_dataclass(each.annotation)}
    flat = []
    for parameter in parameters:
        if parameter.name in groups:
            flat += inspect.signature(groups[parameter.name]).parameters.values()
        else:
            flat.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(function)
    def command(**values):
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        return function(**values)

    command.__signature__ = inspect.Signature(flat)
    return command


def parse_budget(text: str) -> float | dict[str, float]:
    """Return the budget of ``--average-bits``: 2.25, or language=2.25,vision=4.25.

    :raises ValueError: if it is neither
    """
    if "=" not in text:
        return parse_bits(text)
    pairs = [pair.partition("=") for pair in text.split(",")]
    return {component.strip(): parse_bits(bits) for component, _, bits in pairs}


def parse_bits(text: str) -> float:
    """Return average bits.

    :raises ValueError: if they are no positive number
    """
    try:
        bits = float(text)
    except ValueError:
        bits = math.nan
    if not 0 < bits < math.inf:
        raise ValueError(f"--average-bits {text}: numbers are needed")
    return bits


def show(*tables: Table) -> None:
    """Print tables; on a narrow terminal names go on in the next line, none is cut."""
    for table in tables:
        for column in table.columns:
            column.overflow = "fold"
        console.print(table)

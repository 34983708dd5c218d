"""Options that several commands take."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

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
        """Return the folder; None where nothing is kept."""
        return None if self.no_cache else self.cache


def parse_budget(text: str) -> float | dict[str, float]:
    """Return the budget of ``--average-bits``: 2.25, or language=2.25,vision=4.25.

    :raises ValueError: if it is neither, or names a component twice
    """
    if "=" not in text:
        return parse_bits(text)
    budgets: dict[str, float] = {}
    for pair in text.split(","):
        component, _, bits = pair.partition("=")
        if component.strip() in budgets:
            raise ValueError(f"--average-bits {text}: {component.strip()} comes twice")
        budgets[component.strip()] = parse_bits(bits)
    return budgets


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

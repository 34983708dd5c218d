"""Options that several commands take, and where they print."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

console = Console()

Model = Annotated[str, typer.Argument(help="Model folder or Hugging Face id.", metavar="MODEL")]
Checkpoint = Annotated[
    Path, typer.Argument(help="Checkpoint folder.", metavar="OUT", exists=True, file_okay=False)
]
RecipeFile = Annotated[
    Path, typer.Option("--recipe", help="Recipe in YAML.", exists=True, dir_okay=False)
]
DATASET = typer.Option(
    "--dataset",
    help="Calibration text: .jsonl, .parquet, .csv or .txt file, a datasets folder, a hub id, or "
    "'bundled' for the text that ships with casp-plugin.",
)
Column = Annotated[str, typer.Option("--text-column", help="Column that holds the text.")]
ImageColumn = Annotated[
    str, typer.Option("--image-column", help="Column that holds images, for models that see.")
]
VideoColumn = Annotated[
    str | None,
    typer.Option("--video-column", help="Column that holds a video's frames, instead of images."),
]
QuestionColumn = Annotated[
    str, typer.Option("--question-column", help="Column that holds the questions about them.")
]
AnswerColumn = Annotated[
    str, typer.Option("--answer-column", help="Column that holds the answers.")
]
Split = Annotated[str, typer.Option("--split", help="Split of the dataset.")]
ConfigName = Annotated[
    str | None, typer.Option("--dataset-config", help="Configuration of a hub dataset.")
]
TaskColumn = Annotated[
    str | None,
    typer.Option("--task-column", help="Column that tells kinds of questions apart."),
]
Heldout = Annotated[str, typer.Option("--heldout", help="What to score on, in the same columns.")]
HeldoutSplit = Annotated[str, typer.Option("--heldout-split", help="Split of it.")]
HeldoutSamples = Annotated[
    int, typer.Option("--heldout-samples", help="Texts or questions at most.", min=1)
]
Samples = Annotated[int, typer.Option("--samples", help="Calibration samples.", min=1)]
Length = Annotated[int, typer.Option("--max-length", help="Tokens a sample at most.", min=2)]
Seed = Annotated[int, typer.Option("--seed", help="Seed of all that is random.")]
Pipeline = Annotated[
    Literal["independent", "sequential", "basic"] | None,
    typer.Option(
        "--pipeline",
        help="How llm-compressor calibrates: layer by layer, or the model as a whole (basic).",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the model."),
]
Cache = Annotated[
    Path,
    typer.Option(
        "--cache",
        envvar="CASP_CACHE",
        help="Keep what is measured here, for runs after one that died and for other budgets.",
    ),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Keep nothing of what is measured.")]
CacheLimit = Annotated[
    float,
    typer.Option(
        help="GB that --cache may hold after a run; what was used longest ago goes first.",
        min=0.1,
    ),
]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "casp"
CACHE_LIMIT = 50.0

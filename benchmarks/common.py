"""What the benchmarks share: held-out text, tables on the screen and in Markdown."""

from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

import casp_plugin

VERSIONS = ("casp-plugin", "llmcompressor", "compressed-tensors", "transformers", "torch")


def heldout_source(source: str) -> str:
    """A file or dataset to score on; ``bundled`` is the text that ships with the package."""
    if source != "bundled":
        return source
    return str(Path(casp_plugin.__file__).parent / "text" / "heldout.jsonl")


def show(columns: tuple[str, ...], rows: list[list[str]]) -> None:
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    Console(width=150).print(table)


def write_markdown(path: Path, columns: tuple[str, ...], rows: list[list[str]], note: str) -> None:
    """
    :param note: how the table was made; versions are added
    """
    lines = ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows)]
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, "", f"{note} {versions}."]) + "\n")

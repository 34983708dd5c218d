"""What the benchmarks share: tables on the screen and in Markdown."""

from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

VERSIONS = ("casp-plugin", "llmcompressor", "compressed-tensors", "transformers", "torch")


def show(columns: tuple[str, ...], rows: list[list[str]]) -> None:
    columns, rows = _without_empty(columns, rows)
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    Console(width=170).print(table)


def write_markdown(
    path: Path, tables: list[tuple[tuple[str, ...], list[list[str]]]], note: str
) -> None:
    """
    :param tables: columns and rows of each
    :param note: how the tables were made; versions are added
    """
    lines = []
    for columns, rows in tables:
        columns, rows = _without_empty(columns, rows)
        table = (columns, ["---"] * len(columns), *rows)
        lines += ["| " + " | ".join(row) + " |" for row in table] + [""]
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, f"{note} {versions}."]) + "\n")


def _without_empty(columns: tuple[str, ...], rows: list[list[str]]) -> tuple[tuple, list[list]]:
    """Without columns that hold nothing."""
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    return tuple(columns[i] for i in kept), [[row[i] for i in kept] for row in rows]

"""The screen that commands print on."""

from rich.console import Console
from rich.table import Table

__all__ = ["console", "show"]

console = Console()


def show(*tables: Table) -> None:
    """Print tables; on a narrow terminal names go on in the next line, none is cut."""
    for table in tables:
        for column in table.columns:
            column.overflow = "fold"
        console.print(table)

"""The ``casp`` command as a whole."""

import sys
from typing import NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    name="casp",
    help="Compress language models to 2 to 4 bits a weight with CASP and llm-compressor.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point: what a user got wrong is one line, not a traceback."""
    try:
        app()
    except ModuleNotFoundError as error:  # where the package only serves
        _fail(f"{error}: pip install it, or 'casp-plugin[compress,eval,report]' for all of ours")
    except (ValueError, ValidationError, OSError, ImportError) as error:
        _fail(error)


def _fail(error: Exception | str) -> NoReturn:
    Console(stderr=True).print(f"[bold red]error[/]: {escape(str(error))}", highlight=False)
    sys.exit(1)

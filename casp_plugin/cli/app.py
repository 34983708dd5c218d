"""The ``casp`` command as a whole."""

import inspect
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

import casp_plugin
from casp_plugin.cli.groups import with_groups
from casp_plugin.cli.options import CACHE
from casp_plugin.cli.progress import quiet
from casp_plugin.system.messages import one_line

app = typer.Typer(
    name="casp",
    help="Compress language models to 2 to 4 bits a weight with CASP and llm-compressor.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_VERBOSE = inspect.Parameter(
    "verbose",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool,
        typer.Option(
            "--verbose",
            help="Show progress bars and INFO lines, those of dependencies too.",
        ),
    ],
)


def command(name: str | None = None, **settings) -> Callable:
    """Make a function a command of ``casp``, with ``--verbose`` beside its own options.

    :param name: the function's own unless told
    :param settings: as typer's ``command`` takes them
    """

    def decorate(function: Callable) -> Callable:
        grouped = with_groups(function)
        signature = inspect.signature(grouped)

        @wraps(grouped)
        def run(*, verbose: bool, **values) -> None:
            with nullcontext() if verbose else quiet():
                casp_plugin.register()  # not before: --help does without all that it imports
                grouped(**values)

        run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), _VERBOSE])
        app.command(name, **settings)(run)
        return function

    return decorate


def main() -> None:
    """Run the command; print an error on one line, and where nobody foresaw it, keep its traceback
    in a file."""
    try:
        app()
    except ModuleNotFoundError as error:  # where the package only serves
        _fail(f"{error}: pip install it, or 'casp-plugin[compress,eval,report]' for all of ours")
    except (ValueError, OSError, ImportError) as error:  # pydantic's is a ValueError
        _fail(one_line(error))
    except Exception as error:
        _fail(f"{type(error).__name__}: {one_line(error)} (traceback: {_keep_traceback()})")


def _fail(message: str) -> NoReturn:
    console = Console(stderr=True)
    console.print(f"[bold red]error[/]: {escape(message)}", highlight=False, soft_wrap=True)
    sys.exit(1)


def _keep_traceback() -> str:
    """Write the traceback of the exception being handled to a file.

    :return: the file, in the folder of measurements or that of temporary files
    """
    name = f"traceback-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.txt"
    for folder in (Path(os.environ.get("CASP_CACHE", CACHE)), Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(traceback.format_exc(), encoding="utf-8")
        except OSError:
            continue
        return str(folder / name)
    return "could not be written"

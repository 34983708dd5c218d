"""The ``casp`` command as a whole."""

import os
import sys
import tempfile
import traceback
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from casp_plugin.system.messages import one_line

app = typer.Typer(
    name="casp",
    help="Compress language models to 2 to 4 bits a weight with CASP and llm-compressor.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point: what a user got wrong is one line, and so is what nobody foresaw, with the
    traceback in a file."""
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
    """Write that of the exception being handled to a file.

    :return: the file, in the folder of measurements or that of temporary files
    """
    from casp_plugin.cli.options import CACHE

    name = f"traceback-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.txt"
    for folder in (Path(os.environ.get("CASP_CACHE", CACHE)), Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(traceback.format_exc(), encoding="utf-8")
        except OSError:
            continue
        return str(folder / name)
    return "could not be written"

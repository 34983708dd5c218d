"""The command that tells people what a checkpoint is."""

from pathlib import Path
from typing import Annotated

import typer

from casp_plugin.cli.app import command
from casp_plugin.cli.options import Checkpoint, TrustRemoteCode
from casp_plugin.cli.output import console

CARD_NAME, PAGE_NAME = "README.md", "report.html"


@command()
def report(
    checkpoint: Checkpoint,
    evals: Annotated[
        list[Path] | None,
        typer.Option("--eval", help="What casp eval --output wrote.", exists=True, dir_okay=False),
    ] = None,
    benches: Annotated[
        list[Path] | None,
        typer.Option(
            "--bench", help="What casp bench --output wrote.", exists=True, dir_okay=False
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The page; report.html in OUT unless told.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Licence of the base model, for the card: apache-2.0, ...")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a README.md that casp did not write.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write one HTML page about a checkpoint, and its model card, OUT/README.md."""
    from casp_plugin.report.card import MARK, card
    from casp_plugin.report.facts import read_facts
    from casp_plugin.report.page import page
    from casp_plugin.system.files import write_whole
    from casp_plugin.system.messages import size_text

    path = checkpoint / CARD_NAME
    facts = read_facts(checkpoint, evals or [], benches or [], trust_remote_code)
    mine = overwrite or not path.exists() or MARK in path.read_text() or _of_base(path, facts)
    made = page(facts)
    target = output or checkpoint / PAGE_NAME
    write_whole(target, made)
    console.print(f"Wrote {target}, {size_text(len(made.encode()))}")
    if mine:
        write_whole(path, str(card(facts, license)))
        console.print(f"Wrote {path}")
    else:
        console.print(f"{path} is not of casp and stays: --overwrite replaces it")


def _of_base(path: Path, facts) -> bool:
    """Tell whether a card is that of the base model, copied with its other files."""
    from casp_plugin.checkpoint.source import source_folder

    base = source_folder(facts.base_model or "")
    card = None if base is None else base / CARD_NAME
    return card is not None and card.exists() and card.read_bytes() == path.read_bytes()

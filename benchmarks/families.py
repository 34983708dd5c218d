"""Compress a small random model of every family that transformers builds, and load it again.

    python benchmarks/families.py --table benchmarks/results/families.md

A family is compressed by bits alone (recipe B) and, where it has `q_proj` and `k_proj`, with ranks
before them (recipe R), in a process of its own that may crash or hang. The model is either
compressed, checked and loaded again with the same logits and buffers, or refused in one line before
the data runs. Anything else is a third outcome, and makes the command fail. The sizes are in
`tests/support/families.py`.
"""

import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Annotated, TextIO

import torch
import typer
from common import show, write_markdown

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.families import (
    RECIPES,
    Outcome,
    class_name,
    families,
    has_query_and_key,
    kind,
    outcome,
)

COLUMNS = ("family", "class", "parts", "recipe", "outcome", "detail", "seconds")
KINDS = ("compressed", "refused", "cannot be built", "third outcome")


@dataclass(frozen=True)
class Row:
    """A family under a recipe."""

    family: str
    recipe: str
    outcome: Outcome
    seconds: float


def main(
    only: Annotated[str, typer.Option(help="Families, with commas between.")] = "",
    table: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
    raw: Annotated[Path | None, typer.Option(help="JSON file to write, with tracebacks.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes at once.", min=1)] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds a family and recipe may take.")] = 180,
    verbose: Annotated[bool, typer.Option(help="Print tracebacks of third outcomes.")] = False,
) -> None:
    """Walk over the families."""
    names = only.split(",") if only else families()
    work = [(family, recipe) for family in names for recipe in RECIPES]
    rows = []
    for row in _each(work, jobs, timeout):
        rows.append(row)
        print(f"{row.family} {row.recipe}: {row.outcome.kind}: {row.outcome.detail}", flush=True)
        if verbose and row.outcome.kind == "third outcome":
            print(row.outcome.trace, flush=True)
        if raw is not None:
            raw.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    rows.sort(key=lambda row: (row.family, row.recipe))
    totals = _totals(rows)
    show(*totals)
    if table is not None:
        write_markdown(table, [totals, (COLUMNS, list(map(_cells, rows)))], _NOTE)
    raise typer.Exit(any(row.outcome.kind == "third outcome" for row in rows))


_NOTE = (
    "Two layers or as many as there are kinds of them, hidden size 64, vocabulary 96, random "
    "weights in float32, four calibration batches. Recipe B: bits from 2, 3, 4, 8 in groups of 16, "
    "5 on average, then GPTQ. Recipe R: low-rank q/k before that, where a model has q_proj and "
    "k_proj. Made by `python benchmarks/families.py`."
)


def _each(work: list[tuple[str, str]], jobs: int, timeout: float) -> Iterator[Row]:
    """Yield rows in the order in which they end."""
    waiting = list(reversed(work))
    running: dict[Connection, _Running] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            begun = _Running(*waiting.pop())
            running[begun.connection] = begun
        for connection in wait(list(running), timeout=1):
            ended = running.pop(connection)
            if (found := ended.outcome()) is not None:
                yield ended.row(found)
        for late in [process for process in running.values() if process.seconds > timeout]:
            del running[late.connection]
            where = late.kill()
            yield late.row(Outcome("third outcome", f"no end after {timeout:.0f} s", where))


class _Running:
    """A process that compresses one family by one recipe."""

    def __init__(self, family: str, recipe: str):
        self.family, self.recipe = family, recipe
        self.start = time.perf_counter()
        self.stacks = tempfile.TemporaryFile("w+")  # noqa: SIM115
        fork = multiprocessing.get_context("fork")  # imports, which take seconds, are done
        self.connection, there = fork.Pipe(duplex=False)
        self.process = fork.Process(target=_run, args=(family, recipe, there, self.stacks))
        self.process.start()
        there.close()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def outcome(self) -> Outcome | None:
        """Return the outcome; None where the recipe does not concern the family."""
        try:
            found = self.connection.recv()
        except EOFError:
            self.process.join()
            found = Outcome("third outcome", f"the process died: {self.process.exitcode}")
        self.process.join()
        return found

    def kill(self) -> str:
        """End the process and return its stacks."""
        os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(1)
        self.process.kill()
        self.process.join()
        self.stacks.seek(0)
        return self.stacks.read()

    def row(self, outcome: Outcome) -> Row:
        return Row(self.family, self.recipe, outcome, self.seconds)


def _run(family: str, recipe: str, there: Connection, stacks: TextIO) -> None:
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # llm-compressor's logs
        os.dup2(nowhere, stream)
    if recipe == "R" and not has_query_and_key(family):
        there.send(None)
        return
    with tempfile.TemporaryDirectory() as folder:
        there.send(outcome(family, RECIPES[recipe], Path(folder)))


def _totals(rows: list[Row]) -> tuple[tuple[str, ...], list[list[str]]]:
    found = Counter((row.recipe, row.outcome.kind) for row in rows)
    columns = ("recipe", "families", *KINDS)
    return columns, [
        [
            recipe,
            str(sum(row.recipe == recipe for row in rows)),
            *(str(found[recipe, kind]) for kind in KINDS),
        ]
        for recipe in RECIPES
    ]


def _cells(row: Row) -> list[str]:
    detail = row.outcome.detail.replace("|", "\\|")
    parts = "text" if kind(row.family) == "text" else "image and text"
    return [
        row.family,
        class_name(row.family),
        parts,
        row.recipe,
        row.outcome.kind,
        detail,
        f"{row.seconds:.0f}",
    ]


if __name__ == "__main__":
    typer.run(main)

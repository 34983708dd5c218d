"""Share what the benchmarks need: a log of finished runs, tables on the screen and in Markdown, the
cost of a command."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from casp_plugin.evaluation.results import Comparison, compare
from casp_plugin.evaluation.text import Scores
from casp_plugin.system.machine import versions_text


class Log:
    """Finished runs, a line of JSON for each, so that a benchmark that was stopped goes on.

    :param path: None to keep nothing on disk
    """

    def __init__(self, path: Path | None):
        self.path, self.runs = path, {}
        if path is not None and path.exists():
            runs = map(json.loads, path.read_text().splitlines())
            self.runs = {run["key"]: run for run in runs}

    def run(self, key: str, make: Callable[[], dict]) -> dict:
        """Return the run with a key, made if it is not there.

        :param key: all that the run depends on
        """
        if key not in self.runs:
            self.runs[key] = {"key": key, **make()}
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    file.write(json.dumps(self.runs[key]) + "\n")
        return self.runs[key]


@dataclass(frozen=True)
class Spent:
    """Cost of a command: seconds on the clock, CPU seconds, peak resident memory in GB."""

    seconds: float
    cpu_seconds: float
    memory: float

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(
            self.seconds + other.seconds,
            self.cpu_seconds + other.cpu_seconds,
            max(self.memory, other.memory),
        )


def timed(command: list[str], folder: Path | None = None) -> Spent:
    """Run a command, with all processes that it starts, and return its cost.

    :param folder: to run it in: GPTQModel writes logs where it is
    :raises subprocess.CalledProcessError: if it fails
    """
    site = Path(__file__).parent.parent / "tests" / "vllm_site"
    environment = os.environ | {
        # torchvision without CUDA
        "PYTHONPATH": os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH")))),
        "GPTQMODEL_CPU_WORKERS": "2",  # with fewer it does not start
    }
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, cwd=folder)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
    seconds = time.perf_counter() - start
    return Spent(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9)


def perplexity_ratio(scores: Scores, baseline: Scores) -> Comparison:
    """Return the ratio of perplexities with its interval, text by text."""
    return compare(scores.measurements("")[0], baseline.measurements("")[0])


def ratio_cell(ratio: Comparison) -> str:
    """Return a ratio with its interval, as tables show it."""
    return f"{ratio.change:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def show(columns: tuple[str, ...], rows: list[list[str]]) -> None:
    """Print a table."""
    columns, rows = _without_empty(columns, rows)
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    Console(width=170).print(table)


def command() -> str:
    """Return the command that runs, for the note under a table."""
    return f"python benchmarks/{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}"


def write_markdown(
    path: Path, tables: list[tuple[tuple[str, ...], list[list[str]]]], note: str
) -> None:
    """Write tables in Markdown.

    :param tables: columns and rows of each table
    :param note: how the tables were made; versions are added
    """
    lines = []
    for columns, rows in tables:
        columns, rows = _without_empty(columns, rows)
        table = (columns, ["---"] * len(columns), *rows)
        lines += ["| " + " | ".join(row) + " |" for row in table] + [""]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, f"{note} {versions_text()}."]) + "\n")


def _without_empty(columns: tuple[str, ...], rows: list[list[str]]) -> tuple[tuple, list[list]]:
    """Return columns and rows without the columns that hold nothing."""
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    return tuple(columns[i] for i in kept), [[row[i] for i in kept] for row in rows]

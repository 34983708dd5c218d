"""What the benchmarks share: what a command takes, scores of a checkpoint, tables on the screen and
in Markdown."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from casp_plugin.evaluation.answers import AnswerScore, AnswerScores
from casp_plugin.evaluation.text import Scores, TextScore

VERSIONS = ("casp-plugin", "llmcompressor", "compressed-tensors", "transformers", "torch")


@dataclass(frozen=True)
class Spent:
    """What a command took: seconds on the clock, of processors, peak resident memory in GB."""

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
    """Run a command, with all that it starts.

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


def measured(folder: str, reference: str, evaluation: list[str]) -> dict:
    """Scores of a checkpoint, loaded from disk by a new process."""
    script = str(Path(__file__).with_name("measure.py"))
    command = [sys.executable, script, folder, reference, *evaluation]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return json.loads(output.splitlines()[-1])  # llm-compressor logs to stdout as well


def scores_of(run: dict) -> Scores:
    """Those of texts, or of answers to questions."""
    if "answer" in run["texts"][0]:
        return AnswerScores(tuple(AnswerScore(**row) for row in run["texts"]))
    return Scores(tuple(TextScore(**row) for row in run["texts"]))


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

"""One line of progress instead of bars and INFO lines, unless asked for."""

import ast
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from support.command_line import casp, run_arguments
from tqdm.auto import tqdm

import casp_plugin
from casp_plugin.cli import progress
from casp_plugin.cli.progress import quiet, tell

#: descriptions of short bars that show no stage
SILENT = {"Factoring W_q, W_k", "Measuring rounding errors"}


def work():
    """Bars as those of a run."""
    for layer in (1, 2):
        for _ in tqdm(range(2), desc=f"({layer}/2): Measuring"):
            for _ in tqdm(range(2), desc="Evaluating", disable=False):  # inside another one
                pass
        for _ in tqdm(range(2), desc="Loading weights"):
            pass
    abandoned = tqdm(range(2), desc="Collecting gradients")
    next(iter(abandoned))
    abandoned.close()
    with tqdm(total=2, desc="Answering", leave=False) as bar:
        bar.update(2)
    list(tqdm(range(2), desc="Choosing", disable=True))


def test_a_line_for_every_stage(capsys):
    with quiet():
        tell("loading")
        work()
        tell("checking")
        tell("checking")
    stages = ["loading", "measuring layers", "measuring gradients", "scoring answers", "checking"]
    assert capsys.readouterr().err.splitlines() == stages


def descriptions(tree: ast.AST) -> Iterator[str]:
    """Yield the descriptions of bars in code: arguments of tqdm and ``map``, of ``first_batches``,
    and of ``collect``, defaults of ``desc``, and actions on one layer after the other."""
    for node in ast.walk(tree):
        texts = []
        if isinstance(node, ast.keyword) and node.arg == "desc":
            texts = [node.value]
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            texts = node.args if name in ("collect", "first_batches") else []
        elif isinstance(node, ast.arguments):
            named = node.args[len(node.args) - len(node.defaults) :]
            pairs = zip(named, node.defaults, strict=True)
            texts = [default for argument, default in pairs if argument.arg == "desc"]
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "action":
            texts = [node.value]
        for text in texts:
            options = [text.body, text.orelse] if isinstance(text, ast.IfExp) else [text]
            for option in options:
                if isinstance(option, ast.Constant):
                    yield option.value


def test_every_bar_has_a_stage():
    files = Path(casp_plugin.__file__).parent.rglob("*.py")
    told = {text for path in files for text in descriptions(ast.parse(path.read_text()))}
    assert {"Reading texts", "Running", "Probing the attention", "Rounds"} <= told
    assert told - progress._STAGES.keys() == SILENT


def test_bars_come_back(capsys):
    with pytest.raises(KeyError), quiet():
        raise KeyError
    tell("nothing")
    list(tqdm(range(2), desc="After"))
    told = capsys.readouterr().err
    assert "After: 100%" in told
    assert "nothing" not in told


def test_one_line_on_a_terminal(monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, force_interactive=True, width=60)
    monkeypatch.setattr(progress, "console", console)
    with quiet():
        for _ in tqdm(range(1), desc="(2/31): Calibrating"):
            pass
        progress._line._status._live.refresh()
        with tqdm(total=4e9, unit="B", desc="model.safetensors") as bar:
            bar.update(1e9)
            bar.refresh()
            progress._line._status._live.refresh()
    assert "quantizing layers 2/31" in screen.getvalue()
    assert "downloading 25%" in screen.getvalue()
    assert screen.getvalue().endswith("\x1b[1A\x1b[2K")  # the line is gone


def test_packages_are_told_by_their_environment(monkeypatch):
    """Child processes too; what a user has set stays."""
    monkeypatch.setenv("LLM_COMPRESSOR_LOG_LEVEL", "DEBUG")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    with quiet():
        assert os.environ["TQDM_DISABLE"] == "1"
        assert os.environ["LLM_COMPRESSOR_LOG_LEVEL"] == "DEBUG"
    assert "TQDM_DISABLE" not in os.environ
    assert os.environ["LLM_COMPRESSOR_LOG_LEVEL"] == "DEBUG"


def test_verbose_shows_bars(compressed_llama):
    assert "Loading weights" not in casp("check", compressed_llama).output
    shown = casp("check", compressed_llama, "--verbose")
    assert shown.exit_code == 0, shown.output
    assert "Loading weights" in shown.output


def test_a_process_shows_neither_bars_nor_info(tiny_llama, files):
    """Of a whole run; warnings stay."""
    command = [Path(sys.executable).parent / "casp", *run_arguments(tiny_llama, files)]
    command += ["--no-cache", "--samples", 2]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for noise in ("INFO", "METRIC", "it/s"):
        assert noise not in ran.stdout + ran.stderr
    assert "WARNING" in ran.stdout
    lines = ran.stderr.splitlines()
    stages = [
        *("loading", "measuring gradients", "measuring layers"),
        *("choosing", "quantizing layers", "saving", "checking"),
    ]
    assert [line for line in lines if line in stages] == stages


def test_long_bars_tell_the_time_left(monkeypatch):
    bar = tqdm(total=100, desc="Encoding weights", file=io.StringIO())
    bar.update(25)
    monkeypatch.setattr(bar, "_time", lambda: bar.start_t + 60)
    assert progress._left(bar) == ", 03:00 left"
    monkeypatch.setattr(bar, "_time", lambda: bar.start_t + 5)
    assert progress._left(bar) == ""
    bar.close()

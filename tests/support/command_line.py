"""The command `casp` in this process."""

import pytest
from typer.testing import CliRunner

from casp_plugin import cli

RECIPE = """
casp_stage:
  casp_modifiers:
    LowRankQKModifier: {keep: 0.4}
    BitAllocationModifier: {average_bits: 5, candidates: [2, 3, 4, 8], group_size: 16}
    GPTQModifier: {}
"""


def casp(*arguments):
    """Run a command; return its exit code, output and exception."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def error_of(capsys, monkeypatch, *arguments) -> str:
    """Return what ``casp`` prints to stderr when it fails."""
    monkeypatch.setattr("sys.argv", ["casp", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    return " ".join(capsys.readouterr().err.split())


def run_arguments(model, files, *more) -> list:
    """Arguments of ``casp run`` on the recipe and the texts of the fixture ``files``."""
    return [
        "run", model, "--recipe", files / "recipe.yaml", "--dataset", files / "data.jsonl",
        "--output", files / "out", "--max-length", 32, *more,
    ]  # fmt: skip

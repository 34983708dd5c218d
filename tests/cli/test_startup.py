"""The command helps at once."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

CASP = Path(sys.executable).parent / "casp"
HEAVY = ("torch", "transformers", "llmcompressor")
ALL_HELP = f"""
import sys
from typer.testing import CliRunner
from casp_plugin import cli
names = [info.name or info.callback.__name__ for info in cli.app.registered_commands]
for name in names:
    result = CliRunner().invoke(cli.app, [name, "--help"])
    assert result.exit_code == 0 and "--verbose" in result.output, result.output
print(*names, *({{*{HEAVY}}} & {{*sys.modules}}))
"""
WHERE_VLLM_IS = """
import sys
sys.modules["llmcompressor"] = None
import casp_plugin.runtime.vllm
import casp_plugin.bench.runs
import casp_plugin.checkpoint.check
import casp_plugin.evaluation.checkpoints
import casp_plugin.kv_cache
import casp_plugin.report.page
"""


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    begin = time.monotonic()
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", CASP, *arguments], capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert "Usage: casp" in shown.stdout
    imported = set(re.findall(r"\| +(\w+)$", shown.stderr, re.MULTILINE))
    assert "typer" in imported
    assert not imported & {*HEAVY}
    assert "WARNING" not in shown.stdout + shown.stderr
    assert time.monotonic() - begin < 10  # 0.3 s where nothing else runs


def test_help_of_every_command_imports_nothing_heavy(tmp_path):
    script = tmp_path / "casp"
    script.write_text(ALL_HELP)
    shown = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    commands = "plan run check fold eval bench report sensitivity sweep"
    assert sorted(shown.stdout.split()) == sorted(commands.split())


def test_the_module_is_the_command():
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "casp_plugin", "check", "--help"],
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    assert "Verify a checkpoint" in shown.stdout
    assert not re.search(r"\| +torch$", shown.stderr, re.MULTILINE)


def test_measuring_needs_no_llm_compressor():
    """`casp eval`, `bench`, `check` and `report` run in vLLM's environment too."""
    ran = subprocess.run([sys.executable, "-c", WHERE_VLLM_IS], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr

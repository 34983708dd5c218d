"""The command helps at once; importing the package registers it."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import casp_plugin

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
USE = """
import sys
import casp_plugin
from transformers import AutoModelForCausalLM
from llmcompressor.recipe import Recipe
from casp_plugin import BitAllocationModifier, LowRankLinear
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert any(isinstance(module, LowRankLinear) for module in model.modules())
text = "a_stage: {a_modifiers: {BitAllocationModifier: {average_bits: 3}}}"
assert isinstance(Recipe.create_instance(text).modifiers[0], BitAllocationModifier)
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


def test_importing_the_package_registers_it(compressed_llama):
    """Before what it registers with; the processes of all other tests import it last."""
    ran = subprocess.run(
        [sys.executable, "-c", USE, compressed_llama], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    ("argv", "launched", "command"),
    [
        (["/bin/casp", "run"], ["python", "/bin/casp", "run"], True),
        (["C:/casp.exe"], ["python", "C:/casp.exe"], True),
        (["-m", "run"], ["python", "-u", "-m", "casp_plugin", "run"], True),
        (["-m"], ["python", "-m", "pytest", "casp_plugin"], False),
        (["/bin/casp", "bench"], ["python", "-c", "from multiprocessing import spawn"], False),
        (["-c"], ["python", "-c", "import casp_plugin"], False),
        ([], ["python"], False),
    ],
)
def test_processes_that_are_the_command(monkeypatch, argv, launched, command):
    """Not a child process of it, which has its arguments but runs no command."""
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setattr("sys.orig_argv", launched)
    assert casp_plugin._is_command() is command


def test_names_without_llm_compressor(monkeypatch):
    monkeypatch.setattr(casp_plugin, "__all__", ["CompressionPlan", "LowRankLinear", "register"])
    assert casp_plugin.LowRankLinear.__name__ == "LowRankLinear"
    with pytest.raises(ImportError, match=r"BitAllocationModifier needs llm-compressor: pip inst"):
        from casp_plugin import BitAllocationModifier  # noqa: F401
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = casp_plugin.nothing


def test_names_are_listed():
    assert {"BitAllocationModifier", "CompressionPlan", "plan_recipe"} <= {*dir(casp_plugin)}
    assert all(hasattr(casp_plugin, name) for name in casp_plugin.__all__)

"""Importing the package is quick, and registers it whatever is imported first."""

import subprocess
import sys

import pytest

import casp_plugin

IMPORT = """
import sys
import casp_plugin
print(*{"torch", "transformers", "compressed_tensors", "llmcompressor"} & {*sys.modules})
"""
REGISTER = """
from llmcompressor.modifiers import ModifierFactory
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
import casp_plugin
casp_plugin.register()
casp_plugin.register()
from casp_plugin.checkpoint.load import CaspHfQuantizer, CompressedTensorsConfig
assert ModifierFactory._registered_registry.keys() >= {"BitAllocationModifier", "LowRankQKModifier"}
assert AUTO_QUANTIZER_MAPPING["compressed-tensors"] is CaspHfQuantizer
assert AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] is CompressedTensorsConfig
"""
STARTS = {
    "package first": """
import casp_plugin
from transformers import AutoModelForCausalLM
from llmcompressor import oneshot
""",
    # llm-compressor is imported while the room is half imported
    "room first": """
import casp_plugin.statistics.forward
from llmcompressor.modifiers import ModifierFactory
ModifierFactory.create("BitAllocationModifier", True, True, average_bits=3)
""",
    "two threads": """
import sys, threading, time
from importlib import import_module
thread = threading.Thread(target=import_module, args=["llmcompressor"])
thread.start()
while "transformers.quantizers.auto" not in sys.modules:
    time.sleep(0.001)
import casp_plugin
thread.join()
""",
}
USE = """
import sys
from llmcompressor.recipe import Recipe
from transformers import AutoModelForCausalLM
text = "a_stage: {a_modifiers: {BitAllocationModifier: {average_bits: 3}}}"
modifier = Recipe.create_instance(text).modifiers[0]
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
from casp_plugin import BitAllocationModifier, LowRankLinear
assert isinstance(modifier, BitAllocationModifier)
assert any(isinstance(module, LowRankLinear) for module in model.modules())
"""
OTHER_RECIPE = """
from llmcompressor.modifiers.gptq import GPTQModifier
import casp_plugin
from llmcompressor.recipe import Recipe
Recipe.create_instance([GPTQModifier()])
from casp_plugin.system import patches
assert patches.PIN_MEMORY.original is not None
"""
WITHOUT_LLM_COMPRESSOR = """
import sys
sys.modules["llmcompressor"] = None
import casp_plugin
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert any(isinstance(module, casp_plugin.LowRankLinear) for module in model.modules())
"""


def run(code, *arguments):
    """The words that a process of its own prints: this one has imported everything already."""
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split()


def test_importing_imports_nothing_heavy():
    assert run(IMPORT) == []


def test_registering_at_once():
    run(REGISTER)


@pytest.mark.parametrize("start", STARTS)
def test_recipes_and_checkpoints(start, compressed_llama):
    run(STARTS[start] + USE, compressed_llama)


def test_recipes_of_other_modifiers_are_patched():
    run(OTHER_RECIPE)


def test_loading_without_llm_compressor(compressed_llama):
    run(WITHOUT_LLM_COMPRESSOR, compressed_llama)


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

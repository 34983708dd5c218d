"""Models that come with Python code of their own run it only where the user says so."""

import json
import shutil

import pytest
import torch
from support.command_line import casp, run_arguments
from support.tiny_models import save_tiny_model

from casp_plugin.checkpoint.check import check
from casp_plugin.model.load import load_model

CONFIG = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""
MODEL = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
TRUST = "--trust-remote-code"


@pytest.fixture
def files(files):
    """A model with code of its own, a recipe and texts."""
    source = files / "own"
    save_tiny_model(source)
    (source / "configuration_own.py").write_text(CONFIG)
    (source / "modeling_own.py").write_text(MODEL)
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    (source / "config.json").write_text(json.dumps(config))
    return files


def run(files, *more):
    return casp(*run_arguments(files / "own", files, *more))


def test_not_unless_the_user_says_so(files):
    result = run(files)
    assert "own comes with Python code of its own" in str(result.exception)
    assert TRUST in str(result.exception)
    assert not (files / "out").exists()


def test_every_command(files, bench_in_threads):
    result = run(files, TRUST)
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    out = files / "out"
    assert (out / "modeling_own.py").read_text() == MODEL
    assert not [each for each in check(out, trust_remote_code=True) if each.passed is False]
    assert type(load_model(str(out), trust_remote_code=True)).__name__ == "OwnForCausalLM"
    shutil.rmtree(files / "own")
    commands = {
        "check": [out],
        "fold": [out, files / "folded"],
        "eval": [out, "--dataset", files / "data.jsonl", "--max-length", 16],
        "bench": [out, "--prompt-tokens", 4, "--new-tokens", 58, "--rounds", 1, "--warmup", 0],
        "report": [out],
    }
    for command, arguments in commands.items():
        refused = casp(command, *arguments)
        assert refused.exit_code == 1, command
        said = f"{refused.exception} {refused.output}"
        assert TRUST in said or "trust_remote_code" in said, command
        result = casp(command, *arguments, TRUST)
        assert result.exit_code == 0, f"{command}: {result.output} {result.exception!r}"
    assert casp("check", files / "folded", TRUST).exit_code == 0


def test_plan_and_sweep(files):
    planned = casp("plan", files / "own", "--recipe", files / "recipe.yaml", TRUST)
    assert planned.exit_code == 0, planned.exception
    result = casp(
        "sweep", files / "own", "--recipe", files / "recipe.yaml", "--average-bits", "4,5",
        "--dataset", files / "data.jsonl", "--heldout", files / "data.jsonl", "--max-length", 32,
        "--heldout-split", "train", "--output", files / "sweep", TRUST,
    )  # fmt: skip
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"


def test_a_resaved_checkpoint_keeps_its_code(files):
    assert run(files, TRUST).exit_code == 0
    load_model(str(files / "out"), trust_remote_code=True).save_pretrained(files / "again")
    again = load_model(str(files / "again"), trust_remote_code=True)
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        expected = load_model(str(files / "out"), trust_remote_code=True)(ids).logits
        torch.testing.assert_close(again(ids).logits, expected)

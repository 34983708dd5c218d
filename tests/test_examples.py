"""Every script in examples/ runs, on tiny random models."""

import io
import json
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from support.samples import png, save_texts
from support.tiny_models import save_tiny_model
from support.tiny_vlms import save_tiny_vlm
from support.vllm_environment import ENVIRONMENT, SPACE
from transformers import AutoProcessor

from casp_plugin.checkpoint.check import check
from casp_plugin.data.conversation_batches import processed
from casp_plugin.data.conversations import load_conversations
from casp_plugin.plan.plan import CompressionPlan

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(name, *arguments) -> str:
    """Run an example and return what it prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(printed):
        patched.setattr(sys, "argv", [name, *map(str, arguments)])
        patched.chdir(ROOT)
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return printed.getvalue()


def sound(checkpoint) -> bool:
    return all(finding.passed is not False for finding in check(checkpoint))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Path of a random llama that takes groups of 64, of texts, and of a compressed llama."""
    folder = tmp_path_factory.mktemp("examples")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    save_tiny_model(folder / "llama", **sizes)
    save_texts(folder / "texts.jsonl")
    run("compress_text", folder / "llama", folder / "texts.jsonl", folder / "out")
    return folder


def test_compress_text(folder):
    assert sound(folder / "out")


def test_evaluate(folder):
    told = run("evaluate", folder / "out", folder / "llama", folder / "texts.jsonl")
    assert "perplexity x" in told
    assert "kl: " in told


def test_compress_vision_language(tmp_path):
    """The processor saved beside the model makes the inputs of the original."""
    model, out = save_tiny_vlm(tmp_path / "llava", "llava"), tmp_path / "out"
    (tmp_path / "image.png").write_bytes(png())
    rows = [{"image": "image.png", "question": f"w{i} w9", "answer": f"w{i}"} for i in range(4, 12)]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, rows)))
    run("compress_vision_language", model, questions, out)
    assert sound(out)
    asked = load_conversations(str(questions), 2)
    before, after = (processed(asked, AutoProcessor.from_pretrained(path)) for path in (model, out))
    for name, values in before.items():
        torch.testing.assert_close(after[name], values)


def test_plan_only(folder, tmp_path):
    told = run("plan_only", folder / "llama", "recipes/smollm2/casp.yaml", tmp_path / "plan.json")
    assert "can be reached" in told
    assert not CompressionPlan.load(tmp_path / "plan.json").decided


@pytest.mark.vllm
def test_serve(folder):
    python = os.environ.get("CASP_VLLM_PYTHON")
    if python is None:
        pytest.skip("CASP_VLLM_PYTHON is not set")
    done = subprocess.run(
        [python, str(EXAMPLES / "serve.py"), str(folder / "out")],
        env=os.environ | ENVIRONMENT | SPACE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Hamlet was written by ..." in done.stdout

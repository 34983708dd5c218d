"""Reloading gives the model of the run back: weights, and buffers that no file holds."""

import shutil
from pathlib import Path

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file, save_file
from support.tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM

from casp_plugin import BitAllocationModifier
from casp_plugin.checkpoint.check import check
from casp_plugin.checkpoint.probe import PROBES_NAME, Probe, Record, difference
from casp_plugin.model.load import load_model

FAMILIES = {
    "llama": {},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8, "num_layers": 2},
    "codegen": {"rotary_dim": 8},
}


def recipe():
    allocation = {"average_bits": 5, "candidates": [2, 3, 4, 8], "group_size": 16}
    return [BitAllocationModifier(**allocation), GPTQModifier()]


@pytest.fixture(scope="module", params=FAMILIES)
def compressed(request, batches, tmp_path_factory):
    """(source, checkpoint, model of the run)"""
    folder = tmp_path_factory.mktemp(request.param)
    source = save_tiny_model(folder / "in", request.param, **FAMILIES[request.param])
    out = str(folder / "out")
    return source, out, oneshot(model=source, recipe=recipe(), dataset=batches, output_dir=out)


def test_buffers_are_those_of_a_stock_load(compressed):
    source, out, _ = compressed
    torch.full((10_000_000,), float("nan"))  # what empty memory holds next
    stock = dict(AutoModelForCausalLM.from_pretrained(source).named_buffers())
    for _ in range(2):
        found = dict(AutoModelForCausalLM.from_pretrained(out).named_buffers())
        for name, buffer in stock.items():
            assert torch.equal(found[name], buffer), name


def test_logits_are_those_of_the_run(compressed, batches):
    _, out, model = compressed
    ids = next(iter(batches))["input_ids"]
    with torch.no_grad():
        expected, found = model(ids).logits, load_model(out, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_nothing_stands_in_for_weights_afterwards(compressed):
    model = load_model(compressed[1])
    assert not [name for name, module in model.named_modules() if "weight" in vars(module)]


def test_check_holds_a_reload_against_the_run(compressed, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(compressed[1], out)
    found = {each.what: each for each in check(out)}
    assert found["logits of the run"].passed
    state = load_file(out / "model.safetensors")
    for name in state:
        if name.endswith("weight_scale"):
            state[name] *= 1.5
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    failed = [each for each in check(out) if each.passed is False]
    assert [each.what for each in failed] == ["contents", "logits of the run"]
    # without the file there is nothing to compare with
    (out / PROBES_NAME).unlink()
    assert not [each for each in check(out) if each.passed is False]


def test_check_compares_the_data_of_all_tensors(compressed, tmp_path):
    """Of a row of the embedding too, which no probe asks for."""
    out = tmp_path / "out"
    shutil.copytree(compressed[1], out)
    state = load_file(out / "model.safetensors")
    name = next(name for name in state if "wte" in name or "embed_tokens" in name)
    state[name][50] = 0
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    [failed] = [each for each in check(out) if each.passed is False]
    assert (failed.what, name in failed.detail) == ("contents", True)


def test_saving_where_another_checkpoint_is(compressed, tmp_path):
    """Of one file before, of several now: the old file would be read."""
    shutil.copytree(compressed[1], tmp_path / "out")
    model = load_model(compressed[1])
    model.save_pretrained(tmp_path / "out", max_shard_size="40KB")
    assert not (tmp_path / "out/model.safetensors").exists()
    assert not [each for each in check(tmp_path / "out") if each.passed is False]
    model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out/model.safetensors.index.json").exists()
    assert not [each for each in check(tmp_path / "out") if each.passed is False]


def test_a_saved_reload_is_still_held_against_the_run(compressed, tmp_path):
    load_model(compressed[1]).save_pretrained(tmp_path)
    assert Record.load(tmp_path).probes == Record.load(Path(compressed[1])).probes


def test_difference_of_probes():
    one = Probe(sample="text", dtype="float32", logits=[[1.0, 2.0], [3.0, 4.0]])
    other = Probe(sample="text", dtype="float32", logits=[[1.0, 2.1], [3.0, 4.0]])
    assert difference(one, one) == 0
    # root mean square .05 over a spread of .5
    assert difference(other, one) == pytest.approx(0.1)
    nan = Probe(sample="text", dtype="float32", logits=[[1.0, float("nan")], [3.0, 4.0]])
    assert difference(nan, one) == float("inf")
    assert difference(Probe(sample="text", dtype="float32", logits=[[1.0]]), one) == float("inf")

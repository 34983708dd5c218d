"""Two processes of torchrun on the CPU against one."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import VOCABULARY, save_tiny_model

from casp_plugin import CompressionPlan

BITS = """
    BitAllocationModifier: {average_bits: 4.6, candidates: [2, 3, 8], group_size: 32}
    GPTQModifier: {}
"""


def run(command, *arguments):
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def compressed(tmp_path):
    """Compresses a tiny model by a recipe, by one process and by two: the folders."""

    def compressed(family, factors, bits):
        sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
        sizes |= {} if family == "llama" else {"num_experts": 4, "num_experts_per_tok": 2}
        model = save_tiny_model(tmp_path / "in", family, num_hidden_layers=3, **sizes)
        recipe = tmp_path / "recipe.yaml"
        stage = "casp_stage:\n  casp_modifiers:\n    LowRankQKModifier: "
        recipe.write_text(stage + factors + bits)
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(3, VOCABULARY, (8, 24), generator=generator)
        texts = tmp_path / "texts.jsonl"
        words = [" ".join(f"w{word}" for word in row) for row in rows.tolist()]
        texts.write_text("\n".join(json.dumps({"text": text}) for text in words))
        arguments = [model, "--recipe", recipe, "--dataset", texts, "--samples", 8]
        arguments += ["--max-length", 24, "--output"]
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
        run([sys.executable, "-m", "casp_plugin", "run"], *arguments, tmp_path / "one")
        run([sys.executable, "-m", *torchrun, "casp_plugin", "run"], *arguments, tmp_path / "two")
        return tmp_path / "one", tmp_path / "two"

    return compressed


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_two_processes_plan_as_one(compressed, family):
    """Weights are GPTQ's own affair, which observes and sums up in another order then."""
    folders = compressed(family, "{rank_multiple: 32}", BITS)
    one, two = map(CompressionPlan.load, folders)
    assert two.calibration_tokens == one.calibration_tokens == 8 * 24
    assert [unit.name for unit in two.units] == [unit.name for unit in one.units]
    assert [unit.chosen for unit in two.units] == [unit.chosen for unit in one.units]
    assert [each.rank for each in two.low_rank] == [each.rank for each in one.low_rank]
    for ours, theirs in zip(two.units, one.units, strict=True):
        errors = [[c.error for c in unit.candidates] for unit in (ours, theirs)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-2)
    for ours, theirs in zip(two.spectra, one.spectra, strict=True):
        assert ours.lost == pytest.approx(theirs.lost, rel=1e-5, abs=1e-7)
    for ours, theirs in zip(two.attention, one.attention, strict=True):
        assert len(ours.heads) == len(theirs.heads)
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    assert weights[0].keys() == weights[1].keys()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["whitened", "attention", "fisher"])
def test_two_processes_make_the_same_factors(compressed, method):
    factors = f"{{keep: 0.5, rank_multiple: 8, method: {method}}}"
    folders = compressed("llama", factors, "")
    ranks = [[each.rank for each in CompressionPlan.load(each).low_rank] for each in folders]
    assert ranks[0] == ranks[1]
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    assert weights[0].keys() == weights[1].keys()
    assert any(name.endswith("q_proj.down.weight") for name in weights[0])
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4)  # float32


@pytest.mark.slow
def test_two_processes_tune_together(compressed):
    """Each on its own texts; gradients are those of all."""
    tuned = "    TuningModifier: {block_epochs: 1, whole_epochs: 1, learning_rate: 5.0e-3}\n"
    folders = compressed("llama", "{rank_multiple: 32}", BITS + tuned)
    for folder in folders:
        parts = CompressionPlan.load(folder).tuned
        assert [part.module for part in parts] == [f"model.layers.{i}" for i in range(3)] + [""]
        assert all(0 < part.after <= part.before for part in parts)

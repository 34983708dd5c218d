"""Models and data with something wrong: one clear error, or a defined way on."""

import pytest
import torch
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file, save_file
from support.tiny_models import VOCABULARY, save_tiny_model
from transformers import AutoModelForCausalLM

from casp_plugin import BitAllocationModifier, LowRankQKModifier, plan_recipe
from casp_plugin.checkpoint.format import read_config
from casp_plugin.model.load import load_model


def recipe(method="fisher", importance="fisher", **fields):
    return [
        LowRankQKModifier(rank_multiple=16, method=method, **fields),
        BitAllocationModifier(
            average_bits=5, candidates=[2, 3, 8], group_size=16, importance=importance
        ),
        GPTQModifier(),
    ]


def planned(model, data, **fields):
    plan = plan_recipe(model, recipe(**fields), data)
    assert plan.decided
    errors = [c.error for unit in plan.units for c in unit.candidates]
    assert all(0 <= error < float("inf") for error in errors)
    return plan


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("importance", ["fisher", "uniform"])
def test_activations_that_are_not_finite(load_tiny, batches, value, importance):
    """The weights are fine; a layer puts out what is not."""
    model = load_tiny()
    broken = model.model.layers[0].mlp.up_proj
    broken.register_forward_hook(lambda module, args, output: output * value)
    method = "fisher" if importance == "fisher" else "whitened"
    where = "LlamaForCausalLM puts out" if importance == "fisher" else "of model.layers.0.mlp"
    with pytest.raises(ValueError, match=f"{where}.*NaN or infinite values"):
        plan_recipe(model, recipe(method, importance), batches)


@pytest.mark.parametrize("method", ["fisher", "whitened", "attention", "svd"])
def test_channels_that_are_zero(load_tiny, batches, method):
    """Of the hidden state: half of them, and all that a layer of the model reads."""
    model = load_tiny()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[::2] = 0
        model.model.layers[1].post_attention_layernorm.weight.zero_()
    planned(model, batches, method=method)


@pytest.mark.parametrize("method", ["fisher", "whitened", "attention", "svd"])
def test_weights_that_are_zero(load_tiny, batches, method):
    model = load_tiny()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    planned(model, batches, method=method)


@pytest.mark.parametrize("method", ["fisher", "whitened", "attention", "svd"])
def test_sequences_of_one_token(load_tiny, method):
    data = [{"input_ids": torch.tensor([[token]])} for token in range(3, 40)]
    planned(load_tiny(), data, method=method)


def test_a_layer_that_never_runs(load_tiny, batches):
    """As an expert that nothing is routed to: free of error, and said."""
    model = load_tiny()
    dead = "model.layers.1.mlp.spare_proj"
    model.model.layers[1].mlp.spare_proj = torch.nn.Linear(64, 64)
    plan = planned(model, batches)
    [unit] = [unit for unit in plan.units if dead in unit.modules]
    assert {candidate.error for candidate in unit.candidates} == {0}
    assert any("no calibration token reached 1 layers" in each for each in plan.warnings)
    assert any(dead in each for each in plan.warnings)


@pytest.mark.parametrize("token", [VOCABULARY, -1])
@pytest.mark.parametrize("importance", ["fisher", "uniform"])
def test_tokens_of_another_vocabulary(load_tiny, token, importance):
    method = "fisher" if importance == "fisher" else "svd"
    data = [{"input_ids": torch.tensor([[3, token, 5]])}]
    with pytest.raises(ValueError, match=f"token {token}, but the vocabulary of Llama.* has 96"):
        plan_recipe(load_tiny(), recipe(method, importance), data)


def test_ranks_beyond_all_bounds(load_tiny, batches):
    plan = planned(load_tiny(), batches, ranks=2**62)
    assert {entry.note for entry in plan.low_rank} == {
        f"factors of rank {2**62} would not be smaller"
    }


def test_files_cut_off(tmp_path):
    path = save_tiny_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="safetensors file is broken or cut off"):
        load_model(path)


def test_pickle_is_never_read(tmp_path):
    path = save_tiny_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "pytorch_model.bin")
    weights.unlink()
    AutoModelForCausalLM.from_pretrained(path)  # transformers itself would
    with pytest.raises(OSError, match="safetensors"):
        load_model(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights, name: weights.pop(name), r"lacks model.layers.0.mlp.up_proj.weight"),
        (
            lambda weights, name: weights.update({name: torch.zeros(3, 5)}),
            r"up_proj.weight of .* is \(3, 5\), but its config says \(128, 64\)",
        ),
    ],
    ids=["missing", "another shape"],
)
def test_weights_that_do_not_fit(tmp_path, change, message):
    """transformers makes them up, after a warning."""
    path = save_tiny_model(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    change(weights, "model.layers.0.mlp.up_proj.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_model(path)


@pytest.mark.parametrize(
    "content", ['{"quantization_config": [1]}', '{"quantization_config": "x"}']
)
def test_a_quantization_config_that_is_no_table(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"quantization_config in config\.json is no table"):
        read_config(tmp_path)

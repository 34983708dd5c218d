"""Models that do not fit: weights on the CPU or on disk until a layer runs."""

import torch
from compressed_tensors.offload import get_device_map, load_offloaded_model, set_onload_device
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
from support.tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM, set_seed

from casp_plugin import BitAllocationModifier, LowRankQKModifier, plan_recipe


def compressed(model, batches, folder):
    recipe = [
        LowRankQKModifier(rank_multiple=16),
        BitAllocationModifier(average_bits=4, candidates=[2, 3, 8], group_size=16),
        GPTQModifier(),
    ]
    set_seed(0)
    model = oneshot(model=model, recipe=recipe, dataset=batches, output_dir=str(folder))
    return model.casp_plan, load_file(folder / "model.safetensors")


def test_offloaded_models_come_out_the_same(tmp_path, batches):
    path = save_tiny_model(tmp_path / "in", "llama", torch.bfloat16)
    plan, weights = compressed(path, batches, tmp_path / "plain")
    assert any(unit.choice.rank for unit in plan.units)

    on_cpu = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    set_onload_device(on_cpu, "cpu")
    with load_offloaded_model():
        on_disk = AutoModelForCausalLM.from_pretrained(
            path,
            dtype="auto",
            device_map="auto_offload",
            offload_folder=str(tmp_path / "offloaded"),
            max_memory={"cpu": 20_000},
        )
    assert "disk" in {offload for _, offload in get_device_map(on_disk).values()}
    for kind, model in (("cpu", on_cpu), ("disk", on_disk)):
        found, tensors = compressed(model, batches, tmp_path / kind)
        assert found == plan
        assert tensors.keys() == weights.keys()
        assert all(torch.equal(tensors[name], weights[name]) for name in weights)


def test_factors_are_offloaded_as_the_layer_was(load_tiny, batches):
    model = set_onload_device(load_tiny(), "cpu")
    recipe = [LowRankQKModifier(keep=0.5, rank_multiple=8), GPTQModifier()]
    plan_recipe(model, recipe, batches)
    attention = model.model.layers[0].self_attn
    kinds = {type(each._parameters) for each in (*attention.q_proj.children(), attention.v_proj)}
    assert len(kinds) == 1
    assert kinds != {dict}

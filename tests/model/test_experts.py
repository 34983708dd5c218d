"""Mixtures of experts: units, what is measured of experts, `casp plan` and `casp run` alike."""

import shutil

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modeling.moe.context import moe_calibration_context
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file, save_file
from support.command_line import casp
from support.samples import save_texts
from support.tiers import tiered
from support.tiny_models import save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from casp_plugin import BitAllocationModifier, LowRankQKModifier
from casp_plugin.checkpoint.check import check
from casp_plugin.model.load import bare_model, load_model
from casp_plugin.modifiers import plan_recipe
from casp_plugin.plan.plan import CompressionPlan
from casp_plugin.statistics.forward import collect
from casp_plugin.statistics.statistics import Request

EXPERTS, CHOSEN = 4, 2
SIZES = {"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": 64}
FAMILIES = {
    "qwen3_moe": SIZES,
    "qwen2_moe": {**SIZES, "shared_expert_intermediate_size": 64},
    "mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN},
}


def recipe(importance="fisher"):
    allocation = {"average_bits": 3.6, "candidates": [2, 3, 4], "group_size": 32}
    return [
        LowRankQKModifier(rank_multiple=32),
        BitAllocationModifier(importance=importance, **allocation),
        GPTQModifier(),
    ]


def expert_units(plan):
    return [unit for unit in plan.units if unit.name.endswith("experts")]


@pytest.mark.parametrize("family", tiered(FAMILIES, "qwen2_moe"))
def test_plan_is_what_is_run(batches, tmp_path, family):
    source = save_tiny_model(tmp_path / "in", family, **FAMILIES[family])
    bare = plan_recipe(bare_model(AutoConfig.from_pretrained(source)), recipe())
    plan = plan_recipe(load_model(source), recipe(), batches)
    oneshot(model=source, recipe=recipe(), dataset=batches, output_dir=str(tmp_path / "out"))
    assert CompressionPlan.load(tmp_path / "out") == plan
    assert [unit.name for unit in bare.units] == [unit.name for unit in plan.units]
    assert [len(unit.modules) for unit in expert_units(plan)] == [3 * EXPERTS] * 2


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("family", tiered(FAMILIES, "mixtral"))
def test_quantized_experts_reload(batches, tmp_path, family, symmetric):
    """At widths of their own, with zero points or without."""
    model = load_model(save_tiny_model(tmp_path / "in", family, **FAMILIES[family]))
    allocation = BitAllocationModifier(
        average_bits=3.6, candidates=[2, 3, 4], group_size=32, symmetric=symmetric
    )
    modifiers = [LowRankQKModifier(rank_multiple=32), allocation, GPTQModifier()]
    oneshot(model=model, recipe=modifiers, dataset=batches, output_dir=str(tmp_path / "out"))
    plan = CompressionPlan.load(tmp_path / "out")
    assert len({unit.choice.bits for unit in plan.units}) > 1
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = next(iter(batches))["input_ids"]
    with torch.no_grad():
        expected, found = model(ids).logits, back(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


class Router:
    """What the routers of a model chose."""

    def __init__(self, model):
        self.chosen = {}
        for name, module in model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(self.hook(name.removesuffix(".gate")))

    def hook(self, name):
        def note(module, args, output):
            self.chosen.setdefault(name, []).append(output[-1])  # logits, weights, experts

        return note

    def share(self, name):
        """Of the tokens that go to each expert."""
        chosen = torch.cat([each.flatten(0, -2) for each in self.chosen[name]])
        return [(chosen == expert).any(1).double().mean().item() for expert in range(EXPERTS)]


@pytest.fixture
def model(tmp_path):
    """With its experts as linear layers."""
    loaded = load_model(save_tiny_model(tmp_path / "in", "qwen3_moe", **SIZES))
    plan_recipe(loaded, [BitAllocationModifier(average_bits=3.6, group_size=32), GPTQModifier()])
    return loaded


def test_share_of_tokens_that_are_routed(model, batches):
    names = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(2) for e in range(EXPERTS)]
    linears = frozenset([*names, "model.layers.0.self_attn.q_proj"])
    router = Router(model)
    found = collect(model, batches, Request(second_moments=linears, routed=linears))
    shares = [share for i in range(2) for share in router.share(f"model.layers.{i}.mlp")]
    assert [found.routed[name] for name in names] == pytest.approx(shares)
    assert sum(shares) == pytest.approx(2 * CHOSEN)
    assert "model.layers.0.self_attn.q_proj" not in found.routed


def test_experts_share_the_moment_of_their_input(model, batches):
    """All of them read what the layer reads, as in GPTQ's calibration."""
    names = [f"model.layers.0.mlp.experts.{e}.{w}_proj" for e in range(2) for w in ("gate", "up")]
    with moe_calibration_context():
        found = collect(model, batches, Request(second_moments=frozenset(names)))
    assert len({id(found.second_moments[name]) for name in names}) == 1


@pytest.mark.parametrize("importance", ["fisher", "uniform"])
def test_dead_experts_cost_nothing_and_are_named(batches, tmp_path, importance):
    """A router that cannot tell experts apart sends all tokens to the same ones."""
    source = save_tiny_model(tmp_path / "in", "qwen3_moe", **SIZES)
    loaded = load_model(source)
    for name, weight in loaded.named_parameters():
        if name.endswith("mlp.gate.weight"):
            weight.data.zero_()
    alive = plan_recipe(load_model(source), recipe(importance), batches)
    half = plan_recipe(loaded, recipe(importance), batches)
    [warning] = [each for each in half.warnings if "no calibration token" in each]
    assert f"{(EXPERTS - CHOSEN) * 3 * 2} layers" in warning
    assert not any("no calibration token" in each for each in alive.warnings)
    if importance == "uniform":  # relative errors, weighed by the share of the tokens
        for ours, theirs in zip(expert_units(half), expert_units(alive), strict=True):
            errors = [unit.candidates[0].error for unit in (ours, theirs)]
            assert errors[0] == pytest.approx(errors[1], rel=0.2)


BITS = "BitAllocationModifier: {average_bits: 5, candidates: [2, 3, 4, 8], group_size: 16}"
MORE = {
    **FAMILIES,
    "olmoe": {"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN},
    "phimoe": {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN},
    "jamba": {
        **{"num_experts": EXPERTS, "expert_layer_period": 2, "attn_layer_period": 2},
        **{"attn_layer_offset": 1, "mamba_d_state": 16, "mamba_dt_rank": 16},
    },
}


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("family", tiered(MORE, "qwen3_moe", "phimoe"))
def test_run_check_fold_and_save_again(tmp_path, family, factored):
    """A router that puts out a tuple (Phi-MoE), names of its own on disk (Mixtral), experts in some
    layers (Jamba): all of it is checked, and nothing is quantized that chooses experts."""
    source = save_tiny_model(tmp_path / "in", family, tie_word_embeddings=False, **MORE[family])
    ranks = "LowRankQKModifier: {keep: 0.4}\n    " if factored else ""
    recipe = f"casp_stage:\n  casp_modifiers:\n    {ranks}{BITS}\n    GPTQModifier: {{}}\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    save_texts(tmp_path / "data.jsonl")
    result = casp(
        "run", source, "--recipe", tmp_path / "recipe.yaml", "--dataset", tmp_path / "data.jsonl",
        "--output", tmp_path / "out", "--max-length", 32,
    )  # fmt: skip
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    assert "Could not match" not in result.output
    plan = CompressionPlan.load(tmp_path / "out")
    names = {name for unit in plan.units for name in unit.modules}
    assert any(".experts." in name for name in names)
    assert not [name for name in names if name.rpartition(".")[2] in ("gate", "router")]
    assert not [name for name in names if name.endswith("shared_expert_gate")]
    # a file without one of the experts' tensors
    state = load_file(tmp_path / "out/model.safetensors")
    gone = next(name for name in state if ".experts.2." in name and name.endswith("_packed"))
    shutil.copytree(tmp_path / "out", tmp_path / "broken")
    del state[gone]
    save_file(state, tmp_path / "broken/model.safetensors", metadata={"format": "pt"})
    failed = [each.detail for each in check(tmp_path / "broken") if each.passed is False]
    assert any(gone in each for each in failed), failed
    # saved again from memory, where experts are dense
    load_model(str(tmp_path / "out")).save_pretrained(tmp_path / "again")
    assert casp("check", tmp_path / "again").exit_code == 0
    if factored:
        result = casp("fold", tmp_path / "out", tmp_path / "folded")
        assert result.exit_code == 0, result.exception
        assert casp("check", tmp_path / "folded").exit_code == 0
        ids = torch.arange(3, 20)[None]
        with torch.no_grad():
            folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", dtype=torch.float32)
            expected = load_model(str(tmp_path / "out"), dtype=torch.float32)(ids).logits
            torch.testing.assert_close(folded(ids).logits, expected, rtol=1e-3, atol=1e-3)

"""Which layers share a bit width."""

import pytest
import torch
from support.tiny_models import save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from casp_plugin.model.load import copy_without_weights
from casp_plugin.model.low_rank_linear import LowRankLinear, named_linears
from casp_plugin.model.units import decoder_layers, find_units, matched_linears, reading_together


def units_of(model, granularity="unit", share_layers=1):
    linears = matched_linears(model, ["Linear"], ["lm_head"], "targets")
    return find_units(linears, decoder_layers(model), granularity, share_layers)


def factor(model, *names):
    for name in names:
        model.set_submodule(name, LowRankLinear.like(model.get_submodule(name), 8))


def test_fused_layers_share(load_tiny):
    assert [unit.name for unit in units_of(load_tiny())][:4] == [
        "model.layers.0.self_attn.q_proj+k_proj+v_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj+up_proj",
        "model.layers.0.mlp.down_proj",
    ]


def test_low_rank_frees_v(load_tiny):
    model = load_tiny()
    factor(model, "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")
    factor(model, "model.layers.1.self_attn.q_proj")
    attention = [
        unit.name for unit in units_of(model) if "q_proj" in unit.name or "v_proj" in unit.name
    ]
    assert attention == [
        "model.layers.0.self_attn.q_proj+k_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj+v_proj",
    ]


@pytest.mark.parametrize("granularity", ["unit", "matrix"])
def test_what_is_chosen_together_is_a_unit(load_tiny, granularity):
    model = load_tiny()
    linears = matched_linears(model, ["re:.*[.]0[.]self_attn.*"], [], "targets")
    together = [[f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qk"]]
    units = find_units(linears, decoder_layers(model), granularity, 1, together)
    assert [unit.name.rpartition(".")[2] for unit in units] == ["q_proj+k_proj", "v_proj", "o_proj"]


def test_one_latent_is_one_unit(load_tiny):
    """Whatever the granularity: its ``down`` has one width."""
    model = load_tiny()
    q, k = (f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qk")
    factor(model, q, "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj")
    owner = model.get_submodule(q)
    model.set_submodule(k, LowRankLinear.like(model.get_submodule(k), 8, owner))
    names = [unit.name for unit in units_of(model, "matrix")]
    assert "model.layers.0.self_attn.q_proj+k_proj" in names
    assert {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"} <= set(names)


def test_reading_together():
    names = [f"l.{i}.attn.{leaf}_proj" for i in range(2) for leaf in "qkvo"]
    experts = [f"l.0.mlp.experts.{i}.{leaf}_proj" for i in range(2) for leaf in ("gate", "up")]
    assert reading_together(experts) == [[name] for name in experts]
    groups = reading_together([*names, "l.0.mlp.up_proj"])
    assert groups[0] == ["l.0.attn.q_proj", "l.0.attn.k_proj", "l.0.attn.v_proj"]
    assert groups[1:3] == [["l.0.attn.o_proj"], names[4:7]]
    assert groups[-1] == ["l.0.mlp.up_proj"]


def test_one_width_a_layer(load_tiny):
    units = units_of(load_tiny(), granularity="layer")
    assert [unit.name for unit in units] == ["model.layers.0", "model.layers.1"]
    assert all(len(unit.modules) == 7 for unit in units)


@pytest.mark.parametrize(("granularity", "count"), [("unit", 4), ("layer", 1)])
def test_adjacent_layers_share(load_tiny, granularity, count):
    units = units_of(load_tiny(), granularity, share_layers=2)
    assert len(units) == count
    assert units[0].name.startswith("model.layers.0-1")
    assert sum(len(unit.modules) for unit in units) == 14


def test_stacks_do_not_share():
    """Three layers of a vision tower, then three of a language model: four pairs, none mixed."""
    layers = [f"{stack}.layers.{i}" for stack in ("vision", "language") for i in range(3)]
    linears = {f"{layer}.mlp.up_proj": torch.nn.Linear(4, 4) for layer in layers}
    units = find_units(linears, layers, "unit", 2)
    assert [unit.name for unit in units] == [
        f"{stack}.layers.{which}.mlp.up_proj"
        for stack in ("vision", "language")
        for which in ("0-1", "2")
    ]


@pytest.mark.parametrize("granularity", ["unit", "matrix"])
def test_experts_of_a_layer_share(granularity):
    experts = torch.nn.ModuleDict(
        {
            str(i): torch.nn.ModuleDict(
                {n: torch.nn.Linear(4, 4) for n in ("gate_proj", "down_proj")}
            )
            for i in range(3)
        }
    )
    model = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"experts": experts})})
    units = find_units(dict(named_linears(model)), [], granularity, 1)
    assert [unit.name for unit in units] == ["mlp.experts"]
    assert len(units[0].modules) == 6


def test_matrix_granularity(load_tiny):
    units = units_of(load_tiny(), granularity="matrix")
    assert len(units) == 14
    assert all(unit.modules == (unit.name,) for unit in units)


def test_unknown_target_names_valid_ones(load_tiny):
    with pytest.raises(
        ValueError, match=r"target 're:\.\*w_q' matches no linear.*layers.0.self_attn.q_proj"
    ):
        matched_linears(load_tiny(), ["re:.*w_q"], [], "targets")


def test_everything_ignored(load_tiny):
    with pytest.raises(ValueError, match="every matching layer is excluded"):
        matched_linears(load_tiny(), ["Linear"], ["re:.*"], "targets")


def test_a_copy_without_weights_has_the_shapes_and_no_memory(load_tiny):
    model = load_tiny()
    bare = copy_without_weights(model)
    assert all(parameter.is_meta for parameter in bare.parameters())
    assert {n: p.shape for n, p in bare.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert bare.lm_head.weight is bare.model.embed_tokens.weight


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma3_text", "mistral"])
def test_decoder_layers_of_families(tmp_path, model_type):
    path = save_tiny_model(tmp_path, model_type)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    assert decoder_layers(model) == ["model.layers.0", "model.layers.1"]

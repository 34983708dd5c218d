"""AutoRound tunes each layer under its own scheme, and its zero points reach the checkpoint."""

import pytest
import torch
import yaml
from compressed_tensors.quantization import fake_quantize, quantize
from llmcompressor import oneshot

from casp_plugin import AutoRoundModifier
from casp_plugin.modifiers.auto_round import signed_zero_point


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_points_move_to_the_signed_range(bits):
    zero_points = torch.arange(2.0**bits).reshape(2, -1)
    moved = signed_zero_point(zero_points, bits)
    assert (moved.min(), moved.max()) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    codes = torch.arange(2.0**bits)
    torch.testing.assert_close(codes - 2 ** (bits - 1) - moved[1, 0], codes - zero_points[1, 0])


@pytest.mark.parametrize("wrong", [-1.0, 4.0, float("nan")])
def test_zero_points_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must lie in 0\.\.3"):
        signed_zero_point(torch.tensor([[0.0, wrong]]), 2)


def weights(bits):
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": 32,
    }


def auto_round(model, batches, groups, **settings):
    """Quantized by a recipe in YAML; its quantized layers, by name."""
    settings = {"ignore": ["lm_head"], "iters": 2, "enable_torch_compile": False, **settings}
    modifier = {**settings, "config_groups": groups}
    recipe = {"test_stage": {"test_modifiers": {"AutoRoundModifier": modifier}}}
    oneshot(model=model, recipe=yaml.safe_dump(recipe), dataset=batches)
    return {n: m for n, m in model.named_modules() if getattr(m, "quantization_scheme", None)}


def stored_codes(layer):
    """Codes, (rows, columns)."""
    args = layer.quantization_scheme.weights
    return quantize(layer.weight, layer.weight_scale, layer.weight_zero_point, args)


def test_stored_codes_are_those_that_were_tuned(load_tiny, batches):
    """AutoRound leaves weights that its scales and zero points reproduce."""
    group = {"targets": ["Linear"], "weights": weights(2)}
    layers = auto_round(load_tiny(), batches, {"group_0": group})
    assert len(layers) == 14
    for layer in layers.values():
        args = layer.quantization_scheme.weights
        rounded = fake_quantize(layer.weight, layer.weight_scale, layer.weight_zero_point, args)
        torch.testing.assert_close(rounded, layer.weight)
    assert any(layer.weight_zero_point.unique().numel() > 1 for layer in layers.values())


def test_every_layer_is_tuned_under_its_own_scheme(load_tiny, batches):
    """Targets by whole names, as plans give them, and layers that none of them names."""
    model = load_tiny()
    before = {
        name: module.weight.clone() for name, module in model.named_modules() if "_proj" in name
    }
    layer = "model.layers.{}.self_attn.{}_proj".format
    groups = {
        "w2": {"targets": [layer(0, "q"), layer(1, "q")], "weights": weights(2)},
        "w4": {"targets": [layer(0, "k")], "weights": weights(4)},
        "w8": {"targets": ["re:.*1.mlp.down_proj"], "weights": weights(8)},
    }
    found = auto_round(model, batches, groups)
    levels = {name: stored_codes(module).unique().numel() for name, module in found.items()}
    assert levels.keys() == {
        layer(0, "q"),
        layer(1, "q"),
        layer(0, "k"),
        "model.layers.1.mlp.down_proj",
    }
    assert levels[layer(0, "q")] == levels[layer(1, "q")] == 4
    assert levels[layer(0, "k")] == 16
    assert levels["model.layers.1.mlp.down_proj"] > 128
    for name, weight in before.items():
        if name not in found:
            assert torch.equal(model.get_submodule(name).weight, weight)


def test_our_modifier_is_the_one_that_recipes_name():
    from llmcompressor.recipe import Recipe

    recipe = Recipe.from_modifiers([AutoRoundModifier(scheme="W4A16")])
    again = Recipe.create_instance(recipe.yaml())
    assert [type(modifier) for modifier in again.modifiers] == [AutoRoundModifier]


def test_layers_of_a_float32_model_stay_so(load_tiny, batches):
    """Norms keep their values, weights are those of their scales."""
    model, before = load_tiny(), load_tiny()
    group = {"targets": ["re:.*(up|down)_proj"], "weights": weights(4)}
    for each in (model, before):
        torch.manual_seed(0)
        for name, parameter in each.named_parameters():
            if "norm" in name:
                parameter.data.uniform_(0.5, 1.5)
    auto_round(model, batches, {"group_0": group})
    changed = []
    for name, parameter in before.named_parameters():
        found = model.get_parameter(name)
        assert found.dtype == parameter.dtype, name
        if not torch.equal(found, parameter):
            changed.append(name)
    assert len(changed) == 4
    assert all("up_proj" in name or "down_proj" in name for name in changed)

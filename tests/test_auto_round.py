"""AutoRound's zero points reach the checkpoint."""

import pytest
import torch
from compressed_tensors.quantization import fake_quantize
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


def test_stored_codes_are_those_that_were_tuned(load_tiny, batches):
    """AutoRound leaves weights that its scales and zero points reproduce."""
    weights = {
        "num_bits": 2,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": 32,
    }
    recipe = f"""
        test_stage:
          test_modifiers:
            AutoRoundModifier:
              ignore: [lm_head]
              iters: 2
              enable_torch_compile: false
              config_groups: {{group_0: {{targets: [Linear], weights: {weights}}}}}
    """.replace("False", "false").replace("'", "")
    model = oneshot(model=load_tiny(), recipe=recipe, dataset=batches)
    layers = [m for m in model.modules() if getattr(m, "quantization_scheme", None)]
    assert len(layers) == 14
    for layer in layers:
        args = layer.quantization_scheme.weights
        rounded = fake_quantize(layer.weight, layer.weight_scale, layer.weight_zero_point, args)
        torch.testing.assert_close(rounded, layer.weight)
    assert any(layer.weight_zero_point.unique().numel() > 1 for layer in layers)


def test_our_modifier_is_the_one_that_recipes_name():
    from llmcompressor.recipe import Recipe

    recipe = Recipe.from_modifiers([AutoRoundModifier(scheme="W4A16")])
    again = Recipe.create_instance(recipe.yaml())
    assert [type(modifier) for modifier in again.modifiers] == [AutoRoundModifier]

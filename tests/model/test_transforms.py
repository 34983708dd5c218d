"""Rotated inputs: what is rotated, how, and that it comes back from disk."""

import pytest
import scipy.linalg
import torch
from compressed_tensors.transform import apply_transform_config
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.transform import QuIPModifier, SpinQuantModifier
from torch import nn
from transformers import AutoModelForCausalLM

from casp_plugin import BitAllocationModifier, LowRankQKModifier, plan_recipe
from casp_plugin.checkpoint.check import check
from casp_plugin.checkpoint.fold import fold
from casp_plugin.maths.hadamard import rotate
from casp_plugin.model.low_rank_linear import LowRankLinear
from casp_plugin.model.transforms import input_block


def quip(**fields):
    fields = {"transform_type": "hadamard", "transform_block_size": 16, **fields}
    return QuIPModifier(**{"ignore": ["lm_head", "re:.*_proj[.]up$"], **fields})


def recipe(*first):
    bits = BitAllocationModifier(average_bits=5.0, candidates=[2, 3, 4, 8], group_size=16)
    return [*first, LowRankQKModifier(), bits, GPTQModifier()]


def config(**fields):
    modifier = quip(**fields)
    modifier.on_initialize(None)
    return modifier.transform_config


@pytest.mark.parametrize("block", [64, 128])
def test_rotation_in_16_bits_has_no_bias(block):
    """The square root of two is rounded once, not in every entry of the matrix."""
    x = torch.randn(2000, 128, dtype=torch.float64)
    exact = rotate(x, block)
    ratio = (rotate(x.bfloat16(), block).double() * exact).sum() / exact.square().sum()
    assert abs(ratio.item() - 1) < 2e-4


@pytest.mark.parametrize("block", [1, 2, 16, 64])
def test_rotation_is_the_block_diagonal_hadamard(block):
    x = torch.randn(3, 5, 64, dtype=torch.float64)
    matrix = torch.tensor(scipy.linalg.hadamard(block)).double() / block**0.5
    expected = x @ torch.block_diag(*[matrix] * (64 // block))
    torch.testing.assert_close(rotate(x, block), expected)
    torch.testing.assert_close(rotate(rotate(x, block), block), x)


@pytest.mark.parametrize("block", [16, None])
def test_rotation_is_that_of_compressed_tensors(block):
    linear = nn.Linear(64, 8, bias=False, dtype=torch.float64)
    weight, x = linear.weight.detach().clone(), torch.randn(5, 64, dtype=torch.float64)
    model = nn.ModuleDict({"a": linear})
    transforms = config(transform_block_size=block)
    size = input_block(transforms, "a", linear, 64)
    assert size == (block or 64)
    apply_transform_config(model, transforms)
    torch.testing.assert_close(linear.weight.detach(), rotate(weight, size))
    torch.testing.assert_close(linear(x), x @ weight.T)


def test_what_is_rotated():
    linear = nn.Linear(64, 8)
    assert input_block(None, "a", linear, 64) == 1
    assert input_block(config(), "model.q_proj", linear, 64) == 16
    assert input_block(config(), "model.q_proj.up", linear, 64) == 1
    assert input_block(config(), "lm_head", linear, 64) == 1
    assert input_block(config(), "norm", nn.LayerNorm(64), 64) == 1


def test_compress_reload_check(tiny_llama, batches, tmp_path):
    model = oneshot(
        model=tiny_llama, recipe=recipe(quip()), dataset=batches, output_dir=str(tmp_path / "out")
    )
    assert isinstance(model.model.layers[0].self_attn.q_proj, LowRankLinear)
    assert all(finding.passed is not False for finding in check(tmp_path / "out"))
    ids = torch.randint(3, 96, (2, 16))
    with torch.no_grad():
        expected = model(ids).logits
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        torch.testing.assert_close(reloaded(ids).logits, expected, atol=1e-5, rtol=0)
        reloaded.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
        torch.testing.assert_close(again(ids).logits, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="rotates the inputs"):
        fold(tmp_path / "out", tmp_path / "folded")


def test_stock_checkpoint(tiny_llama, batches, tmp_path):
    """Without our section: transformers alone would run it without the rotations."""
    scheme = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "channel"}}
    stock = [
        quip(ignore=["lm_head"]),
        GPTQModifier(config_groups={"g": scheme}, ignore=["lm_head"]),
    ]
    model = oneshot(model=tiny_llama, recipe=stock, dataset=batches, output_dir=str(tmp_path))
    ids = torch.randint(3, 96, (2, 16))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(reloaded(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


def test_errors_are_those_of_the_rotated_weights(load_tiny, batches):
    """One huge input channel in a group: rotated, no channel stands out."""
    errors = []
    for first in ([], [quip()]):
        model = load_tiny()
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.data[:, ::16] *= 50
        plan = plan_recipe(model, recipe(*first), batches)
        [unit] = [unit for unit in plan.units if unit.name == "model.layers.0.mlp.down_proj"]
        errors.append(next(c.error for c in unit.candidates if c.bits == 3))
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize(
    ("modifier", "message"),
    [
        (quip(transform_type="random-hadamard"), "QuIPModifier: transform 'v' is of type"),
        (quip(rotations=["v", "u"]), "only rotations of the inputs"),
        (quip(transform_block_size=128), r"64 columns cannot be rotated in blocks of 128"),
        (SpinQuantModifier(rotations=["R1"]), "run it in a call of oneshot of its own first"),
    ],
)
def test_transforms_that_do_not_go_with_a_plan(load_tiny, modifier, message):
    with pytest.raises(ValueError, match=message):
        plan_recipe(load_tiny(), recipe(modifier))

"""What a compressed model stores as real numbers is trained; codes, ranks and bytes stay."""

import pytest
import torch
from compressed_tensors.quantization import quantize
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import casp_plugin  # noqa: F401
from casp_plugin import (
    AutoRoundModifier,
    BitAllocationModifier,
    CompressionPlan,
    LowRankQKModifier,
    TrellisModifier,
    TuningModifier,
)

W2 = {"num_bits": 2, "group_size": 32, "strategy": "group", "symmetric": False}


@pytest.fixture(scope="module")
def calibration():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 96, (40, 48), generator=generator)
    return DataLoader([{"input_ids": row[None]} for row in ids], batch_size=None)


@pytest.fixture(scope="module")
def unseen():
    return torch.randint(3, 96, (16, 48), generator=torch.Generator().manual_seed(1))


def stock(kind, **fields):
    group = {"targets": ["Linear"], "weights": W2}
    return kind(config_groups={"group_0": group}, ignore=["lm_head"], **fields)


def chosen(**fields):
    fields = {"average_bits": 3.2, "candidates": [2, 3, 4], "group_size": 32, **fields}
    return BitAllocationModifier(**fields)


RECIPES = {
    "round to nearest": lambda: [stock(QuantizationModifier)],
    "gptq": lambda: [stock(GPTQModifier)],
    "plan and gptq": lambda: [chosen(), GPTQModifier()],
    "factors in 16 bits": lambda: [
        LowRankQKModifier(keep=0.5),
        chosen(ignore=["re:.*(q|k)_proj.*", "lm_head"]),
        GPTQModifier(),
    ],
    "autoround": lambda: [
        chosen(),
        AutoRoundModifier(iters=2, enable_torch_compile=False),
    ],
    "trellis": lambda: [TrellisModifier(bits=2, state_bits=10)],
}


def compress(model, recipe, calibration, out):
    oneshot(model=model, recipe=recipe, dataset=calibration, output_dir=str(out))


@torch.no_grad()
def divergence(model, dense, ids):
    wanted, found = (m(ids).logits.double().log_softmax(-1) for m in (dense, model))
    return (wanted.exp() * (wanted - found)).sum(-1).mean().item()


def codes_of(model):
    """Integers of all quantized layers, by name."""
    return {
        name: quantize(m.weight, m.weight_scale, m.weight_zero_point, m.quantization_scheme.weights)
        for name, m in model.named_modules()
        if getattr(m, "quantization_scheme", None) is not None
    }


@pytest.mark.parametrize("name", RECIPES)
def test_nearer_to_the_dense_model_at_equal_bytes(name, load_tiny, calibration, unseen, tmp_path):
    dense, found, sizes = load_tiny(), {}, []
    for tuned in (False, True):
        model, out = load_tiny(), tmp_path / str(tuned)
        recipe = RECIPES[name]() + [TuningModifier(learning_rate=5e-3)] * tuned
        compress(model, recipe, calibration, out)
        reloaded = AutoModelForCausalLM.from_pretrained(out)
        torch.testing.assert_close(
            reloaded(unseen).logits, model(unseen).logits, atol=1e-4, rtol=1e-3
        )
        found[tuned] = divergence(reloaded, dense, unseen), codes_of(model)
        sizes.append((out / "model.safetensors").stat().st_size)
    assert found[True][0] < 0.97 * found[False][0]
    assert abs(sizes[1] - sizes[0]) < 1000  # the header
    for layer, codes in found[False][1].items():
        assert torch.equal(codes, found[True][1][layer]), layer
    layers = [part for part in CompressionPlan.load(out).tuned if part.module]
    assert [part.module for part in layers] == ["model.layers.0", "model.layers.1"]
    assert all(part.after <= part.before for part in layers)
    assert any(part.epoch for part in layers)

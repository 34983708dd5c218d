"""GPTQ's targets make up for what quantized layers before them have done to their inputs."""

import pytest
import torch
import yaml
from llmcompressor import oneshot
from llmcompressor.modifiers import gptq as stock
from llmcompressor.modifiers.utils.hooks import HooksMixin
from loguru import logger
from torch.utils.data import DataLoader

from casp_plugin import BitAllocationModifier, GPTQModifier, LowRankQKModifier

W2 = {"num_bits": 2, "group_size": 32, "strategy": "group", "symmetric": False}


def gptq(targets="Linear", kind=GPTQModifier, **fields):
    group = {"targets": [targets], "weights": W2}
    return kind(config_groups={"group_0": group}, ignore=["lm_head"], **fields)


@pytest.fixture(scope="module")
def calibration():
    """Enough tokens for the second moments of the tiny llama's layers."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 96, (64, 64), generator=generator)
    return DataLoader([{"input_ids": row[None]} for row in ids], batch_size=None)


def logits(model, calibration):
    with torch.no_grad():
        return torch.cat([model(**batch).logits.flatten(0, 1) for batch in calibration])


def inputs_of(model, name, calibration):
    """What a module reads, (tokens, channels), float64."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].flatten(0, 1).double())
    )
    logits(model, calibration)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_targets_are_the_least_squares_fit_of_dense_outputs(
    share, load_tiny, calibration, monkeypatch
):
    """The first linear of the second layer, before it is rounded, against lstsq in float64."""
    model, dense, found = load_tiny(), load_tiny(), {}
    name = "model.layers.1.self_attn.q_proj"
    compress = stock.GPTQModifier.compress_modules

    def noting(modifier):
        if model.get_submodule(name) in modifier._num_samples:
            found["target"] = model.get_submodule(name).weight.detach().double()
            with HooksMixin.disable_hooks():
                found["inputs"] = inputs_of(model, name, calibration)
        compress(modifier)

    monkeypatch.setattr(stock.GPTQModifier, "compress_modules", noting)
    recipe = gptq(correction=share, dampening_frac=1e-9)
    oneshot(model=model, recipe=recipe, dataset=calibration)
    weight = dense.get_submodule(name).weight.detach().double()
    wanted = inputs_of(dense, name, calibration) @ weight.T
    fit = torch.linalg.lstsq(found["inputs"], wanted).solution.T
    assert (fit - weight).abs().max() > 0.01
    target = weight + share * (fit - weight)
    torch.testing.assert_close(found["target"], target, atol=1e-4, rtol=1e-3)


def test_nearer_to_the_dense_model(load_tiny, calibration):
    wanted, errors = logits(load_tiny(), calibration), []
    for share in (0.0, 0.5):
        model = load_tiny()
        oneshot(model=model, recipe=gptq(correction=share), dataset=calibration)
        errors.append((logits(model, calibration) - wanted).square().mean().item())
    assert errors[1] < 0.95 * errors[0]


def test_without_correction_it_is_the_stock_one(load_tiny, calibration, tmp_path):
    states = []
    for kind in (GPTQModifier, stock.GPTQModifier):
        model, out = load_tiny(), tmp_path / kind.__module__
        oneshot(model=model, recipe=gptq(kind=kind), dataset=calibration, output_dir=str(out))
        states.append(model.state_dict())
        assert "correction" not in (out / "recipe.yaml").read_text()
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


def test_recipes_in_yaml_and_rotated_inputs(load_tiny, calibration, tmp_path):
    """The corrected weights are those that a transform has rotated."""
    rotation = {"transform_type": "hadamard", "transform_block_size": 32, "ignore": ["lm_head"]}
    wanted, errors = logits(load_tiny(), calibration), []
    for share in (0.0, 0.5):
        modifiers = {
            "QuIPModifier": {**rotation, "rotations": ["v"]},
            "GPTQModifier": gptq(correction=share).model_dump(
                mode="json", include={"config_groups", "ignore", "correction"}
            ),
        }
        model, out = load_tiny(), tmp_path / str(share)
        recipe = yaml.safe_dump({"casp_stage": {"casp_modifiers": modifiers}})
        oneshot(model=model, recipe=recipe, dataset=calibration, output_dir=str(out))
        errors.append((logits(model, calibration) - wanted).square().mean().item())
    assert "correction: 0.5" in (out / "recipe.yaml").read_text()
    assert errors[1] < 0.95 * errors[0]


def test_factors_of_a_plan(load_tiny, calibration):
    """`down` makes up for its inputs, `up` reads what a corrected `down` puts out."""
    model, modifier = load_tiny(), GPTQModifier(correction=0.5)
    recipe = [
        LowRankQKModifier(keep=0.5),
        BitAllocationModifier(average_bits=3.9, candidates=[2, 3, 4], group_size=32),
        modifier,
    ]
    oneshot(model=model, recipe=recipe, dataset=calibration)
    changed = [n for n in modifier._names if n.endswith((".down", ".up"))]
    assert changed
    assert all(name.endswith(".down") for name in changed)
    assert modifier._corrected > 0


def test_a_run_that_corrects_nothing_says_so(load_tiny, calibration):
    said = []
    handle = logger.add(said.append, level="WARNING")
    recipe = gptq("re:.*layers.0.self_attn.q_proj", correction=0.5)
    oneshot(model=load_tiny(), recipe=recipe, dataset=calibration)
    logger.remove(handle)
    assert any("correction changed nothing" in message for message in said)

"""What a compressed model stores as real numbers is trained; codes, ranks and bytes stay."""

from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.quantization import quantize
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from support.tiny_models import save_tiny_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from casp_plugin import (
    AutoRoundModifier,
    BitAllocationModifier,
    CompressionPlan,
    GPTQModifier,
    LowRankQKModifier,
    TrellisModifier,
    TuningModifier,
    plan_recipe,
)
from casp_plugin.maths.descent import descend
from casp_plugin.modifiers import tuning
from casp_plugin.modifiers.layer_inputs import LayerCalls

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
        recipe = RECIPES[name]() + [TuningModifier(block_epochs=4, learning_rate=5e-3)] * tuned
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


def tune(load_tiny, calibration, **fields):
    """A tuned model of 2 bits, not saved yet, and its plan."""
    model, recipe = load_tiny(), [stock(GPTQModifier), TuningModifier(**fields)]
    oneshot(model=model, recipe=recipe, dataset=calibration)
    return model, model.casp_plan


@pytest.mark.parametrize("stage", ["block_epochs", "whole_epochs"])
def test_each_stage_can_be_left_out(stage, load_tiny, calibration):
    fields = {"block_epochs": 1, "whole_epochs": 1, "learning_rate": 5e-3}
    _, plan = tune(load_tiny, calibration, **(fields | {stage: 0}))
    layers = ["model.layers.0", "model.layers.1"]
    assert [part.module for part in plan.tuned] == (layers if stage == "whole_epochs" else [""])


def test_what_gains_nothing_stays_and_the_plan_says_so(load_tiny, calibration):
    """Far too large a step."""
    untuned = load_tiny()
    oneshot(model=untuned, recipe=stock(GPTQModifier), dataset=calibration)
    model, plan = tune(load_tiny, calibration, block_epochs=0, learning_rate=50.0)
    for name, parameter in untuned.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    [part] = plan.tuned
    assert (part.epoch, part.after) == (0, part.before)
    assert "tuning the whole model gained nothing on held-out data" in plan.warnings[-1]


def test_rounding_is_tuned_too(load_tiny, calibration, unseen, tmp_path):
    fields = {"block_epochs": 6, "whole_epochs": 0, "learning_rate": 5e-3}
    found = []
    for rounding in (False, True):
        model, plan = tune(load_tiny, calibration, rounding=rounding, **fields)
        found.append((codes_of(model), plan.tuned[0].after))
        expected = model(unseen).logits
        model.save_pretrained(tmp_path / str(rounding))
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(rounding))
        torch.testing.assert_close(reloaded(unseen).logits, expected, atol=1e-4, rtol=1e-3)
    (kept, without), (moved, within) = found
    assert any(not torch.equal(kept[name], moved[name]) for name in kept)
    assert within < 0.95 * without


def test_a_run_that_died_goes_on(load_tiny, calibration, tmp_path, monkeypatch):
    """Layers that were tuned before are not tuned again, and the result is the same."""
    started = []

    def counting(*args, **kwargs):
        if len(started) == stop:
            raise KeyboardInterrupt
        started.append(1)
        return descend(*args, **kwargs)

    monkeypatch.setattr(tuning, "descend", counting)
    fields = {"block_epochs": 1, "whole_epochs": 1, "learning_rate": 5e-3}
    stop = None
    whole, _ = tune(load_tiny, calibration, **fields)
    fields["cache_dir"] = str(tmp_path / "cache")
    stop = len(started) + 2  # both layers
    with pytest.raises(KeyboardInterrupt):
        tune(load_tiny, calibration, **fields)
    stop = None
    again, plan = tune(load_tiny, calibration, **fields)
    assert len(started) == 6
    assert len(plan.tuned) == 3
    for name, parameter in whole.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


def state_of(model, batches):
    return SimpleNamespace(model=model, data=SimpleNamespace(calib=batches))


def test_tokens_count_by_their_kind(load_tiny):
    model, modifier = load_tiny(), TuningModifier(answer_weight=4.0, image_weight=0.25)
    model.config.image_token_id = 5
    ids = torch.tensor([[5, 5, 7, 8, 9, 0]])
    labels = torch.tensor([[-100, -100, -100, -100, 9, -100]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    batches = [{"input_ids": ids, "labels": labels, "attention_mask": mask}]
    modifier._batches = batches
    weights = modifier._token_weights(state_of(model, batches), 0)
    assert weights.tolist() == [[0.25, 0.25, 1, 4, 1, 0]]
    shuffled = DataLoader(batches, shuffle=True)  # the order is another one in every pass
    assert modifier._token_weights(state_of(model, shuffled), 0) is None


def test_targets_are_those_of_their_batch(load_tiny, monkeypatch):
    """Batches of unequal lengths, of which the last one is not held out."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 96, (1, 20 + n), generator=generator) for n in range(13)]
    calibration = DataLoader([{"input_ids": row} for row in rows], batch_size=None)
    dense, wanted = load_tiny(), {}
    with torch.no_grad():
        for row in rows:
            states = dense(row, output_hidden_states=True).hidden_states
            wanted[row.shape[1]] = states[1:]
    seen = []

    def noting(calls, layer, place, run=LayerCalls.run):
        found, target = run(calls, layer, place)
        seen.append(target)
        return found, target

    monkeypatch.setattr(LayerCalls, "run", noting)
    tune(load_tiny, calibration, block_epochs=2, whole_epochs=0)
    assert len(seen) == 2 * (2 * 13 + 1)
    first = seen[: len(seen) // 2]
    for target in first:
        torch.testing.assert_close(target, wanted[target.shape[1]][0], atol=1e-5, rtol=1e-4)


def test_two_layers_calibrated_together_are_both_tuned(load_tiny, calibration):
    model, recipe = (
        load_tiny(),
        [stock(GPTQModifier), TuningModifier(block_epochs=1, whole_epochs=0)],
    )
    oneshot(model=model, recipe=recipe, dataset=calibration, sequential_targets_per_subgraph=2)
    assert [p.module for p in model.casp_plan.tuned] == ["model.layers.0", "model.layers.1"]


@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
def test_quantizers_have_run_before(pipeline, load_tiny, calibration):
    model, recipe = load_tiny(), [stock(GPTQModifier), TuningModifier()]
    with pytest.raises(ValueError, match="TuningModifier runs after GPTQModifier has ended"):
        oneshot(model=model, recipe=recipe, dataset=calibration, pipeline=pipeline)


def test_other_answers_are_tuned_anew(load_tiny, tmp_path, monkeypatch):
    """What labels say is a part of what a result is remembered by."""
    started = []
    counting = lambda *args: started.append(1) or descend(*args)  # noqa: E731
    monkeypatch.setattr(tuning, "descend", counting)
    ids = torch.randint(3, 96, (1, 24), generator=torch.Generator().manual_seed(0))
    for answers in (4, 4, 9):
        labels = ids.clone()
        labels[:, :-answers] = -100
        calibration = DataLoader([{"input_ids": ids, "labels": labels}] * 2, batch_size=None)
        fields = {"block_epochs": 1, "whole_epochs": 1, "cache_dir": str(tmp_path)}
        tune(load_tiny, calibration, **fields)
    assert len(started) == 6


def test_layers_that_no_token_reached_stay_whole(tmp_path):
    """An expert without tokens has no scales of its own yet while others are tuned."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
    path = save_tiny_model(tmp_path / "in", "qwen3_moe", **sizes)
    found = []
    for tuned in (False, True):
        model = AutoModelForCausalLM.from_pretrained(path)
        calibration = DataLoader([{"input_ids": torch.full((1, 8), 7)}] * 3, batch_size=None)
        recipe = [chosen(average_bits=6.5, candidates=[3, 4, 6], group_size=16), GPTQModifier()]
        recipe += [TuningModifier(block_epochs=1, whole_epochs=1)] * tuned
        oneshot(model=model, recipe=recipe, dataset=calibration, moe_calibrate_all_experts=False)
        found.append(model)
    for name, parameter in found[1].named_parameters():
        assert parameter.isfinite().all(), name


REFUSED = {
    "alone": ([TuningModifier()], "put one before it"),
    "before the quantizer": (
        [TuningModifier(), TrellisModifier(bits=2)],
        "then quantizers, then TuningModifier",
    ),
    "rounding of corrected weights": (
        [chosen(), GPTQModifier(correction=0.5), TuningModifier(rounding=True)],
        "TuningModifier.rounding starts from the model's own weights",
    ),
    "before a stock quantizer": (
        [chosen(), TuningModifier(), GPTQModifier()],
        "must come after the last quantizer",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_runs(name, load_tiny):
    recipe, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        plan_recipe(load_tiny(), recipe)

"""Codebook modifiers from recipe to reloaded checkpoint."""

import os

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import QuIPModifier
from safetensors.torch import load_file
from support import compressed_vlms
from support.tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from casp_plugin import (
    AQLMModifier,
    BitAllocationModifier,
    CodebookLinear,
    LowRankQKModifier,
    QuIPSharpModifier,
    TrellisModifier,
    plan_recipe,
)
from casp_plugin.checkpoint.check import check
from casp_plugin.checkpoint.fold import fold
from casp_plugin.checkpoint.sizes import size_breakdown
from casp_plugin.model.codebook_schemes import AdditiveScheme, TrellisScheme
from casp_plugin.modifiers.result_cache import ResultCache
from casp_plugin.plan.plan import CompressionPlan
from casp_plugin.statistics.cache import RESULTS_NAME

MODEL = "model.safetensors"


def trellis(**fields):
    return TrellisModifier(state_bits=10, **fields)  # the smallest, to be quick


def chosen(**fields):
    fields = {"average_bits": 3.5, "candidates": [2, 3, 4], "granularity": "matrix"} | fields
    return BitAllocationModifier(**fields)


def quip():
    return QuIPModifier(transform_type="hadamard", transform_block_size=16, ignore=["lm_head"])


def factors(keep=0.5):
    return LowRankQKModifier(keep=keep, rank_multiple=16)


SCALAR = {
    "w4": {
        "targets": ["re:.*mlp.*"],
        "weights": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    }
}
RECIPES = {
    "one width": lambda: [trellis(bits=3)],
    "chosen widths": lambda: [chosen(), trellis()],
    "chosen ranks": lambda: [factors("auto"), chosen(), trellis()],
    "factors": lambda: [factors(), chosen(), trellis()],
    "lattice": lambda: [factors(), chosen(), QuIPSharpModifier()],
    "learned": lambda: [factors(), chosen(average_bits=45), AQLMModifier()],
    "one width, learned": lambda: [AQLMModifier(bits=2)],
    "two codebooks": lambda: [
        trellis(bits=3, targets="re:.*self_attn.*"),
        QuIPSharpModifier(bits=2, targets="re:.*mlp.*"),
    ],
    "beside integers": lambda: [
        trellis(bits=3, targets="re:.*self_attn.*"),
        QuantizationModifier(config_groups=SCALAR),
    ],
}


@pytest.fixture(scope="module")
def ids(batches):
    return next(iter(batches))["input_ids"]


def compress(model, recipe, batches, out):
    oneshot(model=model, dataset=batches, recipe=recipe, output_dir=str(out))
    return out


@pytest.mark.parametrize("name", RECIPES)
def test_checkpoint_says_what_the_run_said(name, load_tiny, batches, ids, tmp_path):
    model, out = load_tiny(), tmp_path / "out"
    compress(model, RECIPES[name](), batches, out)
    findings = check(out)
    assert [finding for finding in findings if finding.passed is False] == []
    assert any(finding.what == "codebook layers" for finding in findings)
    again = AutoModelForCausalLM.from_pretrained(out)
    coded = [module for module in again.modules() if isinstance(module, CodebookLinear)]
    assert len(coded) == sum(isinstance(module, CodebookLinear) for module in model.modules())
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["one width", "factors", "learned"])
def test_saved_again_it_is_the_same(name, load_tiny, batches, ids, tmp_path):
    out = compress(load_tiny(), RECIPES[name](), batches, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(out)
    again(ids)  # decodes
    again.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_decoded_at_load(load_tiny, batches, ids, tmp_path):
    """`dequantize=True` as with integers; the codes stay for saving."""
    out = compress(load_tiny(), RECIPES["one width"](), batches, tmp_path / "out")
    lazy = AutoModelForCausalLM.from_pretrained(out)
    config = CompressedTensorsConfig(dequantize=True)
    eager = AutoModelForCausalLM.from_pretrained(out, quantization_config=config)
    layer = "model.layers.0.mlp.up_proj"
    assert lazy.get_submodule(layer)._decoded is None
    assert eager.get_submodule(layer)._decoded is not None
    assert torch.equal(lazy(ids).logits, eager(ids).logits)


@pytest.mark.parametrize("name", ["factors", "learned", "beside integers"])
def test_folded_copy_needs_no_plugin(name, load_tiny, batches, ids, tmp_path):
    out = compress(load_tiny(), RECIPES[name](), batches, tmp_path / "out")
    fold(out, tmp_path / "folded")
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    assert not any(isinstance(module, CodebookLinear) for module in folded.modules())
    again = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(folded(ids).logits, again(ids).logits, atol=1e-4, rtol=1e-3)


def test_widths_of_the_plan_are_those_of_the_layers(load_tiny, batches, tmp_path):
    model = load_tiny()
    out = compress(model, RECIPES["chosen widths"](), batches, tmp_path / "out")
    plan = CompressionPlan.load(out)
    assert len({unit.choice.bits for unit in plan.units}) > 1
    for unit in plan.units:
        assert unit.choice.codec == "trellis"
        for name in unit.modules:
            assert model.get_submodule(name).scheme.bits == unit.choice.bits
    warning = "vLLM on CUDA runs trellis codes only with an extra package: pip install casp-plugin"
    assert plan.warnings == [warning]
    kinds = size_breakdown(out)["language"]
    assert kinds["codes"] + kinds["scales"] == plan.unit_bytes


def test_prices_are_near_what_encoding_leaves(load_tiny, batches, tmp_path):
    """The predicted output error of every layer against its own, in one uniform recipe."""
    model, dense = load_tiny(), load_tiny()
    settings = {"importance": "uniform", "average_bits": 3.9, "candidates": [3, 4]}
    compress(model, [chosen(**settings), trellis(correction=0)], batches, tmp_path / "out")
    ratios = []
    for unit in model.casp_plan.units:
        [name] = unit.modules
        if ".0." not in name:
            continue  # reads what the first layer has changed
        inputs = []
        hook = dense.get_submodule(name).register_forward_pre_hook(
            lambda _, args, inputs=inputs: inputs.append(args[0].flatten(0, -2))
        )
        for batch in batches:
            dense(batch["input_ids"])
        hook.remove()
        x = torch.cat(inputs)
        weight = dense.get_submodule(name).weight
        lost = (x @ (model.get_submodule(name).weight - weight).T).square().sum()
        lost = (lost / (x @ weight.T).square().sum()).item()
        ratios.append(unit.choice.error / lost)
    assert len(ratios) == 7
    assert all(0.7 < ratio < 1.6 for ratio in ratios), ratios


@pytest.mark.parametrize("targets", [["LlamaAttention", "LlamaMLP"], ["Linear"]])
def test_layers_may_be_traced_in_part(targets, load_tiny, batches, ids, tmp_path):
    """Where decoder layers do not run as modules, their linears are compressed all the same."""
    model = load_tiny()
    options = {"sequential_targets": targets, "output_dir": str(tmp_path / "out")}
    oneshot(model=model, dataset=batches, recipe=[trellis(bits=4)], **options)
    coded = [module for module in model.modules() if isinstance(module, CodebookLinear)]
    assert len(coded) == 14
    dense = load_tiny()(ids).logits
    assert (model(ids).logits - dense).square().mean() < 0.05 * dense.square().mean()


def test_decoded_weights_follow_a_cast(load_tiny, batches, ids, tmp_path):
    out = compress(load_tiny(), RECIPES["one width"](), batches, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.inference_mode():
        before = model(ids).logits
    assert not model.model.layers[0].mlp.up_proj.weight.is_inference()
    after = model.to(torch.float64)(ids).logits
    torch.testing.assert_close(after.float(), before.clone(), atol=1e-4, rtol=1e-3)


def test_layers_make_up_for_those_before(load_tiny, batches, ids, tmp_path):
    """With the correction the model is nearer to the dense one on its calibration data."""
    dense, errors = load_tiny(), []
    for share in (0.0, 0.5):
        model = load_tiny()
        compress(model, [trellis(bits=2, correction=share)], batches, tmp_path / f"{share}")
        error = sum(
            (model(b["input_ids"]).logits - dense(b["input_ids"]).logits).square().sum().item()
            for b in batches
        )
        errors.append(error)
    assert errors[1] < errors[0]


def test_tiles_are_as_narrow_as_rows_allow(load_tiny, batches, tmp_path):
    model = load_tiny()
    compress(model, [trellis(bits=2)], batches, tmp_path / "out")
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.scheme.tile == (64, 4)
    assert attention.k_proj.scheme.tile == (32, 8)


@pytest.mark.parametrize("metric", ["fisher", "identity"])
def test_plan_of_one_width_tells_the_tokens(metric, load_tiny, batches, tmp_path):
    compress(load_tiny(), [trellis(bits=2, output_metric=metric)], batches, tmp_path / "out")
    assert CompressionPlan.load(tmp_path / "out").calibration_tokens == 8 * 24


def test_same_seed_same_bytes(load_tiny, batches, tmp_path):
    for name in ("a", "b"):
        compress(load_tiny(), RECIPES["factors"](), batches, tmp_path / name)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["one width", "factors"])
def test_outputs_have_the_metric_of_the_gradient(name, load_tiny, batches, tmp_path, monkeypatch):
    """Of every layer, and of a first factor as both readers of its latent see it."""
    given, encode = [], TrellisScheme.encode

    def noting(self, weights, *args):
        given.extend(zip(weights, args[-1] or [None] * len(weights), strict=True))
        return encode(self, weights, *args)

    monkeypatch.setattr(TrellisScheme, "encode", noting)
    for metric, count in (("fisher", 0), ("identity", None)):
        recipe = RECIPES[name]()
        recipe[-1].output_metric = metric
        compress(load_tiny(), recipe, batches, tmp_path / metric)
        assert given
        for weight, own in given:
            if count is None:
                assert own is None
            else:
                assert own.shape == (len(weight), len(weight))
                values = torch.linalg.eigvalsh(own)
                # a moment of mean diagonal one, dampened by 3
                assert values.min() > 2.99
                torch.testing.assert_close(own.diagonal().mean(), torch.tensor(4.0))
                count += int(values.max() > 1.5 * values.min())
        assert count is None or count > len(given) / 2  # more than the dampening
        del given[:]
    fisher, identity = (load_file(tmp_path / n / MODEL) for n in ("fisher", "identity"))
    assert fisher.keys() == identity.keys()
    assert any(not torch.equal(fisher[key], identity[key]) for key in fisher)


@pytest.mark.parametrize("name", ["chosen ranks", "one width, learned"])
def test_a_run_that_died_goes_on(name, load_tiny, batches, tmp_path, monkeypatch):
    """Layers that were encoded before are not encoded again, and nothing else changes."""
    encoded = []

    def counting(method):
        def encode(*args, **kwargs):
            if len(encoded) == stop:
                raise KeyboardInterrupt
            encoded.append(1)
            return method(*args, **kwargs)

        return encode

    for scheme in (AdditiveScheme, TrellisScheme):
        monkeypatch.setattr(scheme, "encode", counting(scheme.encode))

    def run(out, cache):
        recipe = RECIPES[name]()
        for modifier in recipe:
            modifier.cache_dir = cache and str(tmp_path / cache)
        return load_file(compress(load_tiny(), recipe, batches, tmp_path / out) / MODEL)

    stop = None
    whole, count = run("whole", None), len(encoded)
    stop = count + 3
    with pytest.raises(KeyboardInterrupt):
        run("died", "cache")
    (first, *_) = sorted((tmp_path / "cache" / RESULTS_NAME).iterdir())
    first.write_bytes(b"no tensors")  # is made anew
    stop = None
    again = run("again", "cache")
    assert len(encoded) == 2 * count + 1
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    run("once more", "cache")
    assert len(encoded) == 2 * count + 1


def test_codes_used_longest_ago_go_first(tmp_path):
    cache = ResultCache(tmp_path)
    keys = []
    for number in range(3):
        key = cache.key([number], [torch.zeros(4)])
        cache.keep(key, [{"weight_codes": torch.full((8,), number)}])
        os.utime(key, (number, number))
        keys.append(key)
    assert len(set(keys)) == 3
    [found] = cache.read(keys[0])  # is used last
    assert not found["weight_codes"].any()
    cache.limit(2 * keys[0].stat().st_size)
    assert [key.exists() for key in keys] == [True, False, True]


def test_experts_are_refused(tmp_path):
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path, "qwen3_moe", **sizes))
    with pytest.raises(ValueError, match=r"is an expert, .* into TrellisModifier.ignore"):
        plan_recipe(model.to("meta"), [trellis(bits=2)])
    plan_recipe(model, [trellis(bits=2, ignore=["re:.*experts.*", "lm_head"])])


REFUSED = {
    "bits must": ([trellis()], "bits: set it, or put BitAllocationModifier before"),
    "bits twice": ([chosen(), trellis(bits=2)], "must leave bits.* unset"),
    "width": ([QuIPSharpModifier(bits=5)], "QuIPSharpModifier cannot have bits 5"),
    "no such width": (
        [chosen(candidates=[2, 6]), QuIPSharpModifier()],
        "QuIPSharpModifier cannot have bits 6",
    ),
    "rounding": ([chosen(rounding="gptq"), trellis()], "BitAllocationModifier.rounding"),
    "order": ([trellis(bits=2), factors()], "then quantizers"),
    "1 bit of integers": (
        [chosen(candidates=[1, 2]), GPTQModifier()],
        "GPTQModifier has no weights of 1 bit",
    ),
    "twice": (
        [trellis(bits=2), QuIPSharpModifier(bits=2, targets="re:.*mlp.*")],
        "QuIPSharpModifier.targets: ",
    ),
    "rotated twice": ([quip(), chosen(), trellis()], "leave QuIPModifier out"),
    "another quantizer": (
        [chosen(group_size=16, average_bits=5), GPTQModifier(), trellis()],
        "bits: set it, for another quantizer runs at the plan's",
    ),
    "tied head": ([trellis(bits=2, ignore=[])], "is tied to another weight"),
    "tiles": (
        [LowRankQKModifier(keep=0.1, rank_multiple=8), chosen(), trellis()],
        "does not divide into tiles of 16 x 16",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_runs(name, load_tiny):
    recipe, why = REFUSED[name]
    with pytest.raises(ValueError, match=why):
        plan_recipe(load_tiny(), recipe)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_models_do_not_initialise_decoded_weights(family, tmp_path):
    """CLIP writes random numbers into the weights of its layers before a checkpoint is read."""
    components = compressed_vlms.COMPONENTS[family]
    bits = {"average_bits": 5, "candidates": [2, 3, 4, 6, 8], "components": components}
    compressed_vlms.compress(tmp_path, family, trellis(), **bits)
    assert [finding for finding in check(tmp_path / "out") if finding.passed is False] == []

"""Faults of dependencies are there without our patches, and gone with them.

A test that fails with ``MENDED`` says which patch to drop.
"""

import gc
from copy import deepcopy

import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationConfig,
    apply_quantization_config,
    fake_quantize,
)
from compressed_tensors.quantization.utils import is_module_quantized
from llmcompressor import oneshot
from llmcompressor.args import DatasetArguments
from llmcompressor.modifiers.autoround import AutoRoundModifier as StockAutoRoundModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import QuIPModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.sequential import pipeline
from llmcompressor.pipelines.sequential.helpers import SequentialTracer
from llmcompressor.pipelines.sequential.transformers_helpers import HFTracer
from llmcompressor.utils.helpers import calibration_forward_context
from support import tiny_vlms
from support.compressed_vlms import batch_of
from support.tiny_models import SIZES, save_tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import CompressedTensorsConfig as StockCompressedTensorsConfig
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from casp_plugin import AutoRoundModifier
from casp_plugin.statistics import tracing
from casp_plugin.system import patches

MENDED = "the dependency is mended: drop {}"
METHOD = "compressed-tensors"
MIXTURES = {
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64},
}
GEMMA4 = {
    **{"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 2},
    **{"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 96, "global_head_dim": 16},
}


def tiny(family, **sizes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **sizes}))


def fails(error, function, *args):
    """Whether a function raises an error."""
    try:
        function(*args)
    except error:
        return True
    return False


def group(targets, bits, symmetric):
    """A group of a quantization config."""
    args = {"strategy": "group", "group_size": 32, "num_bits": bits, "symmetric": symmetric}
    return {"targets": targets, "weights": args}


def decoder_layers_of(model):
    return [type(model.get_decoder().layers[0]).__name__]


def runs_alike(model, batch, subgraphs):
    """Whether the last decoder layer puts out in parts what it puts out in the whole model."""
    outputs = []
    layer = model.get_decoder().layers[-1]
    handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    values = IntermediatesCache.from_dataloader([batch])
    with handle, calibration_forward_context(model):
        model(**batch)
        for graph in subgraphs:
            values.update(0, graph.forward(model, **values.fetch(0, graph.input_names)))
    whole, parts = outputs
    return torch.allclose(whole, parts, atol=1e-5)


def test_patches_are_installed_once():
    records = [value for value in vars(patches).values() if isinstance(value, patches.Patch)]
    before = [patch.original for patch in records]
    patches.apply(tracing.trace)
    assert [patch.original for patch in records] == before
    assert None not in before
    assert pipeline.trace_subgraphs is tracing.trace
    assert tracing.trace not in before


@pytest.mark.skipif(torch.accelerator.is_available(), reason="memory can be pinned here")
def test_pin_memory():
    cache = IntermediatesCache.from_dataloader([{"x": torch.zeros(2)}])
    cache.pin_memory(0)
    assert torch.equal(cache.fetch(0)["x"], torch.zeros(2))
    assert fails(RuntimeError, patches.PIN_MEMORY.original, cache, 0), MENDED.format("PIN_MEMORY")


@pytest.mark.parametrize("family", MIXTURES)
def test_config_arguments(family, batches, monkeypatch):
    model, batch = tiny(family, **MIXTURES[family]), next(iter(batches))

    def parts():
        trace = patches.TRACE_SUBGRAPHS.original
        return trace(model, batch, decoder_layers_of(model), [])

    assert runs_alike(model, batch, parts())
    monkeypatch.setattr(SequentialTracer, "create_arg", patches.CONFIG_ARGUMENTS.original)
    assert not runs_alike(model, batch, parts()), MENDED.format("CONFIG_ARGUMENTS")


def test_restore_torch(monkeypatch):
    names = HFTracer._TORCH_METHODS_TO_PATCH
    before = [getattr(torch, name) for name in names]
    for name, function in zip(names, before, strict=True):
        monkeypatch.setattr(torch, name, function)  # restores it after the test

    def after_a_failure(patch_for_tracing):
        with pytest.raises(ZeroDivisionError), patch_for_tracing(HFTracer(), nn.Linear(2, 2)):
            raise ZeroDivisionError
        return [getattr(torch, name) for name in names]

    assert after_a_failure(HFTracer.patch_for_tracing) == before
    assert after_a_failure(patches.RESTORE_TORCH.original) != before, MENDED.format("RESTORE_TORCH")


def test_trace_subgraphs_of_a_vision_tower(tmp_path):
    folder = tiny_vlms.save_tiny_vlm(tmp_path, "llava")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    batch = batch_of(model, folder, "llava")
    groups = {"w4": group(["re:.*vision_tower.*fc1"], 4, True)}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups))
    quantized = {module for module in model.modules() if is_module_quantized(module)}
    assert quantized

    def held(trace):
        subgraphs = trace(model, batch, decoder_layers_of(model), [])
        return {module for graph in subgraphs for module in graph.submodules(model)}

    assert quantized <= held(pipeline.trace_subgraphs)
    assert not quantized & held(patches.TRACE_SUBGRAPHS.original), MENDED.format(
        "TRACE_SUBGRAPHS (vision towers)"
    )


def test_trace_subgraphs_of_layers_that_share_values(batches):
    model, batch = tiny("gemma4_text", **GEMMA4), next(iter(batches))
    arguments = decoder_layers_of(model), DatasetArguments().tracing_ignore
    assert len(pipeline.trace_subgraphs(model, batch, *arguments)) == 1
    parts = patches.TRACE_SUBGRAPHS.original(model, batch, *arguments)
    assert len(parts) == 3
    assert fails(KeyError, runs_alike, model, batch, parts), MENDED.format(
        "TRACE_SUBGRAPHS (Gemma 4)"
    )


def tuned(modifier, folder, batches):
    """Linear layers of a model that are quantized to several widths, by whole names."""
    names = {bits: f"model.layers.0.mlp.{leaf}_proj" for bits, leaf in {8: "up", 2: "down"}.items()}
    recipe = modifier(
        config_groups={f"w{bits}": group([name], bits, False) for bits, name in names.items()},
        iters=1,
        enable_torch_compile=False,
    )
    model = oneshot(model=folder, recipe=recipe, dataset=batches)
    return {bits: model.get_submodule(name) for bits, name in names.items()}


def has_levels(layer, bits):
    """Whether no group of a layer's weights has more than 2^bits values."""
    groups = layer.weight.unflatten(1, (-1, 32)).flatten(0, 1)
    return all(len(values.unique()) <= 2**bits for values in groups)


def is_reproduced(layer):
    """Whether the scales and zero points of a layer reproduce its rounded weights."""
    args = layer.quantization_scheme.weights
    rounded = fake_quantize(layer.weight, layer.weight_scale, layer.weight_zero_point, args)
    return torch.allclose(rounded, layer.weight)


def test_auto_round(tmp_path, batches, monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda: 0)  # takes most of the time
    folder = save_tiny_model(tmp_path, num_hidden_layers=1)
    layers = tuned(AutoRoundModifier, folder, batches)
    assert has_levels(layers[2], 2)
    assert not has_levels(layers[8], 2)
    assert all(map(is_reproduced, layers.values()))
    layers = tuned(StockAutoRoundModifier, folder, batches)
    assert not has_levels(layers[2], 2), MENDED.format("AutoRoundModifier (targets)")
    assert not all(map(is_reproduced, layers.values())), MENDED.format(
        "AutoRoundModifier (zero points)"
    )


def experts(layer):
    return [
        f"model.layers.{layer}.mlp.experts.{i}.{leaf}_proj"
        for i in range(2)
        for leaf in ("gate", "up", "down")
    ]


CHECKPOINTS = {
    "rotations": (
        "llama",
        [
            QuIPModifier(transform_type="hadamard", transform_block_size=16, ignore=["lm_head"]),
            QuantizationModifier(config_groups={"w8": group(["re:.*_proj$"], 8, True)}),
        ],
    ),
    "zero points of experts": (
        "qwen3_moe",
        [QuantizationModifier(config_groups={"w8": group(experts(0) + experts(1), 8, False)})],
    ),
    "schemes of experts": (
        "qwen3_moe",
        [
            QuantizationModifier(
                config_groups={"w4": group(experts(0), 4, True), "w8": group(experts(1), 8, True)}
            )
        ],
    ),
}


@pytest.mark.parametrize("what", CHECKPOINTS)
def test_loading(what, tmp_path, monkeypatch):
    family, recipe = CHECKPOINTS[what]
    source = save_tiny_model(tmp_path / "in", family, **MIXTURES.get(family, {}))
    model = oneshot(model=source, recipe=deepcopy(recipe), output_dir=str(tmp_path / "out"))

    @torch.no_grad()
    def is_loaded():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        ids = torch.arange(3, 19)[None]
        return torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)

    assert is_loaded()
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, METHOD, CompressedTensorsHfQuantizer)
    monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD, StockCompressedTensorsConfig)
    try:
        is_mended = is_loaded()
    except RuntimeError:  # some faults are errors, some are wrong weights
        is_mended = False
    assert not is_mended, MENDED.format(f"CaspHfQuantizer ({what})")

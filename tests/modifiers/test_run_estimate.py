"""What measuring takes, against counts that torch makes and files that are there."""

from dataclasses import fields

import pytest
import torch
from llmcompressor.modifiers.gptq import GPTQModifier
from support.tiny_models import save_tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from casp_plugin import BitAllocationModifier, LowRankQKModifier
from casp_plugin.model.experts import linearize_experts
from casp_plugin.model.load import bare_model, load_model
from casp_plugin.modifiers import estimate_recipe, plan_recipe
from casp_plugin.modifiers.run_estimate import (
    SLACK,
    Data,
    Estimate,
    Work,
    disk_of,
    memory_of,
    speed_of,
    work_of,
)
from casp_plugin.statistics.statistics import Request

SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "initializer_range": 0.1}
Q, K, UP = (f"model.layers.0.{name}_proj" for name in ("self_attn.q", "self_attn.k", "mlp.up"))
DATA = Data(sequences=8, tokens=24)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("in"), **SIZES)


def recipe(cache=None):
    allocation = {"average_bits": 3.4, "candidates": [2, 3, 4], "group_size": 64}
    factors = LowRankQKModifier(cache_dir=None if cache is None else str(cache))
    return [factors, BitAllocationModifier(**allocation), GPTQModifier()]


def test_operations_of_a_pass(source):
    """torch counts those of a forward pass, its attention and its head too."""
    model = load_model(source)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(torch.zeros(DATA.sequences, DATA.tokens, dtype=torch.long))
    found = work_of(model, Request(second_moments=frozenset({Q})), [], DATA)
    assert found.passes == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_operations_of_moments(source):
    model = load_model(source)
    x = torch.zeros(DATA.all_tokens, 256)
    with FlopCounterMode(display=False) as counter:
        x.T @ x
    one = work_of(model, Request(second_moments=frozenset({Q, K})), [], DATA)
    two = work_of(model, Request(second_moments=frozenset({Q, K, UP})), [], DATA)
    assert one.products == counter.get_total_flops()  # of 256 channels: one block
    assert two.products == 2 * one.products


def test_experts_that_read_one_input_count_once(tmp_path):
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    model = bare_model(AutoConfig.from_pretrained(save_tiny_model(tmp_path, "qwen3_moe", **sizes)))
    linearize_experts(model)
    names = [f"model.layers.0.mlp.experts.{e}.{w}_proj" for e in range(4) for w in ("up", "down")]
    found = work_of(model, Request(second_moments=frozenset(names)), [], DATA)
    assert found.products == 2 * DATA.all_tokens * (64**2 + 4 * 64**2)


def test_operations_of_rounding(source):
    """One Cholesky factor for every input and rank, and 32 columns one by one; or all of GPTQ."""
    model = bare_model(AutoConfig.from_pretrained(source))
    units = plan_recipe(bare_model(AutoConfig.from_pretrained(source)), recipe()).units
    linears = frozenset(name for unit in units for name in unit.modules)
    moments = Request(second_moments=linears)
    estimated = work_of(model, moments, units, DATA)
    by_gptq = work_of(model, moments, units, DATA, by_gptq=True)
    nearest = work_of(model, Request(), units, DATA)
    ranks = {c.rank for unit in units for c in unit.candidates} - {None}
    inputs = 2 * (3 * 256**3 + 512**3)  # of q, k and v, of o, of gate and up; of down
    assert ranks == {64, 128}
    assert estimated.roots == inputs + 2 * (64**3 + 128**3)
    assert by_gptq.roots == 6 * 3 * estimated.roots
    assert by_gptq.columns > 4 * estimated.columns > 0
    assert estimated.entries == by_gptq.entries == nearest.entries > 0
    assert nearest.roots == nearest.columns == 0


def test_estimate_of_a_plan_that_is_known(source):
    model = load_model(source)
    planned = plan_recipe(bare_model(AutoConfig.from_pretrained(source)), recipe())
    one, two = (estimate_recipe(model, recipe(), DATA, plan) for plan in (None, planned))
    assert (one.disk, one.seconds) == pytest.approx((two.disk, two.seconds), rel=1e-6)


def test_bytes_of_the_cache(source, batches, tmp_path):
    found = estimate_recipe(load_model(source), recipe(), Data(4, 24))
    plan_recipe(load_model(source), recipe(tmp_path), batches)
    kept = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert found.disk == pytest.approx(kept, rel=0.15)


def test_memory_grows_with_the_data_and_holds_the_model(source):
    model = load_model(source)
    stored = sum(parameter.nbytes for parameter in model.parameters())
    request = Request(second_moments=frozenset({Q, K}))
    some, more, enough = (memory_of(model, request, Data(n, 512)) for n in (6, 16, 100))
    waiting = 10 * 512 * 256 * 4  # activations, between layers
    assert more - some == pytest.approx(SLACK * waiting)
    assert enough == more  # 8,192 tokens are measured, of however many
    assert some > stored
    assert disk_of(model, request) == 0


def test_bare_model_is_as_good(source):
    models = load_model(source), bare_model(AutoConfig.from_pretrained(source))
    one, two = (estimate_recipe(model, recipe(), DATA) for model in models)
    assert (one.disk, one.memory) == pytest.approx((two.disk, two.memory), rel=0.1)


def test_speed_of_this_machine():
    speed = speed_of(torch.float32)
    assert all(getattr(speed, each.name) > 0 for each in fields(speed))
    assert speed.seconds(speed) == len(fields(Work))


@pytest.mark.parametrize(
    ("seconds", "words"), [(42, "42 seconds"), (600, "10 minutes"), (9000, "2.5 hours")]
)
def test_duration(seconds, words):
    assert Estimate(0, 0, seconds).duration == words

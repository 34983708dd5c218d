"""The same seed on the same machine: the same bytes. Other thread counts: the same plan."""

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from support.tiers import tiered
from support.tiny_models import save_tiny_model
from transformers import set_seed

from casp_plugin import BitAllocationModifier, LowRankQKModifier, plan_recipe
from casp_plugin.model.load import load_model


def recipe(method="fisher"):
    bits = BitAllocationModifier(average_bits=4.8, candidates=[2, 3, 8], group_size=16)
    return [LowRankQKModifier(rank_multiple=16, method=method), bits, GPTQModifier()]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("in"), "llama", torch.bfloat16)


def test_same_seed_same_bytes(model, batches, tmp_path):
    for name in ("a", "b"):
        set_seed(3)
        oneshot(model=model, recipe=recipe(), dataset=batches, output_dir=str(tmp_path / name))
    for name in ("model.safetensors", "casp_plan.json", "config.json", "recipe.yaml"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize("method", tiered(["fisher", "attention", "whitened"], "fisher"))
def test_threads_do_not_change_the_plan(model, batches, method):
    before = torch.get_num_threads()
    plans = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            set_seed(0)
            plans.append(plan_recipe(load_model(model), recipe(method), batches))
    finally:
        torch.set_num_threads(before)
    for plan in plans[1:]:
        assert [u.choice.bits for u in plan.units] == [u.choice.bits for u in plans[0].units]
        assert [e.rank for e in plan.low_rank] == [e.rank for e in plans[0].low_rank]

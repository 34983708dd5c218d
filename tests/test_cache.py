"""What was measured is read back as it was, and only for what it was measured on."""

import shutil

import pytest
import torch
from conftest import VOCABULARY, save_tiny_model
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import default_data_collator, set_seed

import casp_plugin.modifiers.base as base
from casp_plugin import BitAllocationModifier, CompressionPlan, LowRankQKModifier, plan_recipe
from casp_plugin.attention_maps import AttentionDensity
from casp_plugin.cache import MeasurementCache
from casp_plugin.pricing import Pricing
from casp_plugin.statistics import Request, Statistics


def recipe(cache_dir=None, average_bits=5.0, **fields):
    return [
        LowRankQKModifier(rank_multiple=16, cache_dir=cache_dir and str(cache_dir)),
        BitAllocationModifier(
            **{"average_bits": average_bits, "candidates": [2, 3, 8], "group_size": 16, **fields}
        ),
        GPTQModifier(),
    ]


@pytest.fixture
def measured(monkeypatch):
    """Names of what was measured, as it happens."""
    done = []
    collect, finish = base.collect, Pricing.finish

    def collected(*args):
        done.append("collect")
        return collect(*args)

    def finished(pricing):
        if pricing.statistics is not None:  # not of a plan without data
            done.append("finish")
        finish(pricing)

    monkeypatch.setattr(base, "collect", collected)
    monkeypatch.setattr(Pricing, "finish", finished)
    return done


def test_statistics_as_they_were(tmp_path):
    shared = torch.randn(4, 4)
    statistics = Statistics(
        second_moments={"a.q": shared, "a.k": shared, "b": torch.randn(3, 3)},
        mean_squares={"a.q": torch.randn(4)},
        output_energies={"a.q": 1 / 3},
        influences={"a": 0.1},
        gradient_moments={"a.q": torch.randn(2, 2).T},  # not contiguous
        attention_densities={"a": AttentionDensity([0.1, 0.2], [1 / 7], image=[0.5], text=[0.25])},
        tokens=7,
    )
    cache = MeasurementCache(tmp_path, {"a": 1})
    assert cache.statistics() is None
    cache.keep_statistics(statistics)
    found = MeasurementCache(tmp_path, {"a": 1}).statistics()
    assert found.second_moments["a.q"] is found.second_moments["a.k"]
    assert MeasurementCache(tmp_path, {"a": 2}).statistics() is None
    for name in ("second_moments", "mean_squares", "gradient_moments"):
        expected = getattr(statistics, name)
        assert getattr(found, name).keys() == expected.keys()
        for module, tensor in getattr(found, name).items():
            assert torch.equal(tensor, expected[module])
    for name in ("output_energies", "influences", "attention_densities", "tokens"):
        assert getattr(found, name) == getattr(statistics, name)
    assert {path.name for path in tmp_path.iterdir()} == {cache.folder.name}


def test_other_budgets_measure_nothing(tmp_path, load_tiny, batches, measured):
    for average_bits in (5.0, 4.0):
        expected = plan_recipe(load_tiny(), recipe(None, average_bits), batches)
        del measured[:]
        found = plan_recipe(load_tiny(), recipe(tmp_path, average_bits), batches)
        assert found == expected
        assert measured == (["collect", "finish"] if average_bits == 5 else [])


def test_what_changes_is_measured_again(tmp_path, load_tiny, batches, measured):
    plan_recipe(load_tiny(), recipe(tmp_path), batches)
    del measured[:]

    plan_recipe(load_tiny(), recipe(tmp_path, candidates=[2, 4, 8]), batches)
    assert measured == ["finish"]  # the statistics are the same
    del measured[:]

    other = load_tiny()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] += 1
    plan_recipe(other, recipe(tmp_path), batches)
    samples = [dict(row) for row in batches.dataset]
    samples[3]["input_ids"] = samples[3]["input_ids"].clone()
    samples[3]["input_ids"][7] = (samples[3]["input_ids"][7] + 1) % VOCABULARY
    loader = DataLoader(samples, batch_size=2, collate_fn=default_data_collator)
    plan_recipe(load_tiny(), recipe(tmp_path), loader)
    set_seed(1)
    plan_recipe(load_tiny(), recipe(tmp_path), batches)
    plan_recipe(load_tiny(), recipe(tmp_path, importance="uniform"), batches)
    assert measured == ["collect", "finish"] * 4


def test_statistics_that_were_thrown_away(tmp_path, load_tiny, batches, measured):
    """Prices may be there without them, or the other way round."""
    expected = plan_recipe(load_tiny(), recipe(tmp_path), batches)
    (written,) = tmp_path.rglob("statistics.json")
    shutil.rmtree(written.parent)
    del measured[:]
    assert plan_recipe(load_tiny(), recipe(tmp_path), batches) == expected
    assert measured == ["collect", "finish"]
    next(tmp_path.rglob("units-*.json")).unlink()
    assert plan_recipe(load_tiny(), recipe(tmp_path), batches) == expected
    assert measured == ["collect", "finish", "finish"]


def test_checkpoints_from_a_cache_are_the_same(tmp_path, batches, measured):
    """By oneshot from YAML; the recipe that is published names no folder of this machine."""
    model = save_tiny_model(tmp_path / "in", "llama", torch.bfloat16)
    text = """
        casp_stage:
          casp_modifiers:
            LowRankQKModifier: {rank_multiple: 16}
            BitAllocationModifier:
              {average_bits: 5, candidates: [2, 3, 8], group_size: 16 CACHE}
            GPTQModifier: {}
    """
    cached = text.replace(" CACHE", f", cache_dir: {tmp_path / 'cache'}")
    for name, each in (("a", text.replace(" CACHE", "")), ("b", cached), ("c", cached)):
        set_seed(0)
        oneshot(model=model, recipe=each, dataset=batches, output_dir=str(tmp_path / name))
        assert "cache" not in (tmp_path / name / "recipe.yaml").read_text()
    assert measured.count("collect") == 2
    plans = [CompressionPlan.load(tmp_path / name) for name in "abc"]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in "abc"]
    for plan, found in zip(plans[1:], weights[1:], strict=True):
        assert plan == plans[0]
        assert found.keys() == weights[0].keys()
        assert all(torch.equal(found[key], weights[0][key]) for key in found)


def test_a_folder_that_cannot_be_written(load_tiny, batches, measured):
    with pytest.raises(OSError, match="/dev/null"):
        plan_recipe(load_tiny(), recipe("/dev/null/cache"), batches)
    assert measured == []


def test_a_config_of_its_own(tmp_path, load_tiny):
    """What weights do not tell, as the base of rotary embeddings."""
    model = load_tiny()
    first = MeasurementCache.of(tmp_path, model, [], Request(), {})
    assert MeasurementCache.of(tmp_path, load_tiny(), [], Request(), {}).folder == first.folder
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5.0}
    assert MeasurementCache.of(tmp_path, model, [], Request(), {}).folder != first.folder


def test_a_run_that_stops_while_it_prices(tmp_path, load_tiny, batches, monkeypatch):
    """The same modifiers again: what the check before the run does not know is never kept."""
    modifiers = recipe(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(BitAllocationModifier, "_priced", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            plan_recipe(load_tiny(), modifiers, batches)
    assert plan_recipe(load_tiny(), modifiers, batches).decided


def _interrupted(self, *arguments, original=BitAllocationModifier._priced):
    if arguments[-1] is not None:  # statistics
        raise KeyboardInterrupt
    return original(self, *arguments)

"""What was measured is read back as it was, and only for what it was measured on."""

import io

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from loguru import logger
from safetensors.torch import load_file
from support.tiny_models import VOCABULARY, save_tiny_model
from torch.utils.data import DataLoader
from transformers import default_data_collator, set_seed

import casp_plugin.statistics.forward as collection
import casp_plugin.statistics.layer_by_layer as measuring
from casp_plugin import BitAllocationModifier, CompressionPlan, LowRankQKModifier, plan_recipe
from casp_plugin.maths.low_rank import Spectrum
from casp_plugin.plan.plan import Candidate, UnitPlan
from casp_plugin.statistics.cache import StatisticsCache
from casp_plugin.statistics.layer_notes import LayerNotes
from casp_plugin.statistics.statistics import AttentionDensity, Request, Statistics

MLP = ("gate_proj", "up_proj", "down_proj")


def recipe(cache_dir=None, average_bits=5.0, **fields):
    return [
        LowRankQKModifier(rank_multiple=16, cache_dir=cache_dir and str(cache_dir)),
        BitAllocationModifier(
            **{"average_bits": average_bits, "candidates": [2, 3, 8], "group_size": 16, **fields}
        ),
        GPTQModifier(),
    ]


@pytest.fixture
def log():
    """What the user is told."""
    told = io.StringIO()
    handle = logger.add(told)
    yield told
    logger.remove(handle)


@pytest.fixture
def measured(monkeypatch):
    """What was measured, as it happens: derivatives, and sections of the model; a layer each."""
    done = []
    derivatives, sections = measuring.collect_derivatives, measuring.collect_sections

    def collected(*args):
        done.append("derivatives")
        return derivatives(*args)

    def measured_sections(*args):
        for section in sections(*args):
            done.append(section.end)
            yield section

    monkeypatch.setattr(measuring, "collect_derivatives", collected)
    monkeypatch.setattr(measuring, "collect_sections", measured_sections)
    monkeypatch.setattr(collection, "SECTION_BYTES", 1)
    return done


ALL = ["derivatives", 2, 3]  # the tiny model has two layers, and a subgraph before them


def test_sections_as_they_were(tmp_path):
    shared = torch.randn(4, 4)
    statistics = Statistics(
        second_moments={"a.q": shared, "a.k": shared, "b": torch.randn(3, 3)},
        mean_squares={"a.q": torch.randn(4)},
        output_energies={"a.q": 1 / 3},
        influences={"a": 0.1},
        gradient_moments={"a.q": torch.randn(2, 2).T},  # not contiguous
        attention_densities={"a": AttentionDensity([0.1, 0.2], [1 / 7], image=[0.5], text=[0.25])},
        reached=frozenset({"a.q", "b"}),
        tokens=7,
    )
    candidates = [
        Candidate(bits=2, rank=rank, group_size=16, bytes=5, error=0.1) for rank in (None, 3)
    ]
    unit = UnitPlan(name="b", modules={"b": (3, 3)}, weights=9, candidates=candidates)
    spectrum = Spectrum(torch.rand(4).double(), torch.randn(4, 2), torch.randn(2, 3))
    section = LayerNotes([unit], {("a.q", "a.k"): spectrum}, statistics, 3, False)
    cache = StatisticsCache(tmp_path, {"a": 1}, {"b": 1})
    assert cache.sections() == []
    cache.keep_section(0, section)
    assert StatisticsCache(tmp_path, {"a": 2}, {"b": 1}).sections() == []
    assert StatisticsCache(tmp_path, {"a": 1}, {"b": 2}).sections() == []
    [found] = StatisticsCache(tmp_path, {"a": 1}, {"b": 1}).sections()
    assert (found.priced, found.end, found.last) == ([unit], 3, False)
    [(names, kept)] = found.spectra.items()
    assert names == ("a.q", "a.k")
    for name in ("energies", "up", "down"):
        assert torch.equal(getattr(kept, name), getattr(spectrum, name))
    found = found.statistics
    assert found.second_moments["a.q"] is found.second_moments["a.k"]
    for name in ("second_moments", "mean_squares", "gradient_moments"):
        expected = getattr(statistics, name)
        assert getattr(found, name).keys() == expected.keys()
        for module, tensor in getattr(found, name).items():
            assert torch.equal(tensor, expected[module])
    for name in ("output_energies", "influences", "attention_densities", "reached", "tokens"):
        assert getattr(found, name) == getattr(statistics, name)
    assert cache.derivatives(0) is None
    cache.keep_derivatives(0, statistics)
    assert cache.derivatives(0).influences == {"a": 0.1}


def test_other_budgets_measure_nothing(tmp_path, load_tiny, batches, measured):
    for average_bits in (5.0, 4.0):
        expected = plan_recipe(load_tiny(), recipe(None, average_bits), batches)
        del measured[:]
        found = plan_recipe(load_tiny(), recipe(tmp_path, average_bits), batches)
        assert found == expected
        assert measured == (ALL if average_bits == 5 else [])


def test_many_metrics_take_several_passes(tmp_path, load_tiny, batches, measured, monkeypatch):
    """With little memory for moments of gradients; a run that died keeps the passes it made."""
    model, names = load_tiny(), [f"model.layers.{i}.mlp.{n}" for i in (0, 1) for n in MLP]
    request = Request(gradient_moments=frozenset(names), gradients=frozenset(names[:1]))
    whole = collection.collect_derivatives(model, batches, request)
    entries = [model.get_submodule(name).out_features ** 2 for name in names]
    monkeypatch.setattr(collection, "DERIVATIVE_BYTES", 4 * sum(entries[:2]))
    parts = collection.derivative_parts(model, request)
    assert len(parts) > 1
    assert sorted(name for part in parts for name in part.gradient_moments) == sorted(names)
    assert [bool(part.gradients) for part in parts] == [True] + [False] * (len(parts) - 1)

    def measure_all():
        cache = StatisticsCache(tmp_path, {}, {})
        return measuring.measure(model, batches, request, cache, lambda *_: None).statistics

    monkeypatch.setattr(measuring, "derivative_parts", lambda *_: parts[:1])
    measure_all()
    monkeypatch.setattr(measuring, "derivative_parts", lambda *_: parts)
    found = measure_all().gradient_moments
    assert measured.count("derivatives") == len(parts)
    assert found.keys() == whole.gradient_moments.keys() == set(names)
    assert all(torch.equal(found[name], whole.gradient_moments[name]) for name in names)


def test_what_changes_is_measured_again(tmp_path, load_tiny, batches, measured):
    plan_recipe(load_tiny(), recipe(tmp_path), batches)
    del measured[:]

    plan_recipe(load_tiny(), recipe(tmp_path, candidates=[2, 4, 8]), batches)
    assert measured == ALL[1:]  # derivatives are the same
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
    assert measured == ALL * 4


def test_goes_on_where_it_was(tmp_path, load_tiny, batches, measured):
    """Whatever of it is missing or broken."""
    expected = plan_recipe(load_tiny(), recipe(tmp_path), batches)
    [derivatives] = tmp_path.rglob("derivatives-0.json")
    [first] = tmp_path.rglob("0000.safetensors")
    [last] = tmp_path.rglob("0001.json")

    def again():
        del measured[:]
        assert plan_recipe(load_tiny(), recipe(tmp_path), batches) == expected
        return measured

    last.unlink()
    assert again() == [3]
    last.with_suffix(".safetensors").unlink()
    assert again() == [3]
    first.write_bytes(first.read_bytes()[:-5])
    assert again() == [2, 3]
    derivatives.unlink()
    assert again() == ["derivatives"]


def test_says_what_has_changed(tmp_path, load_tiny, batches, log):
    set_seed(0)
    plan_recipe(load_tiny(), recipe(tmp_path), batches)
    assert "measuring anew" not in log.getvalue()
    set_seed(1)
    plan_recipe(load_tiny(), recipe(tmp_path), batches)
    assert "measuring anew: seed differ" in log.getvalue()
    plan_recipe(load_tiny(), recipe(tmp_path, candidates=[2, 4, 8]), batches)
    assert "measuring anew: BitAllocationModifier differ" in log.getvalue()


def test_what_was_used_longest_ago_goes_first(tmp_path, load_tiny, batches, measured):
    def planned(seed, limit=None):
        set_seed(seed)
        modifiers = recipe(tmp_path)
        modifiers[0].cache_limit = limit
        plan_recipe(load_tiny(), modifiers, batches)

    for seed in (0, 1, 0, 2):
        planned(seed)
    [size, *_] = [sum(p.stat().st_size for p in each.rglob("*.*")) for each in tmp_path.iterdir()]
    planned(0, 2.5 * size / 1e9)  # seed 1 goes
    assert len(list(tmp_path.iterdir())) == 2
    del measured[:]
    planned(2)
    assert measured == []
    planned(1, 0.1 * size / 1e9)  # what is in use stays
    assert measured == ALL
    assert len(list(tmp_path.iterdir())) == 1


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
    assert measured == ALL * 2
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
    first = StatisticsCache.of(tmp_path, model, [], Request(), {}, {})
    assert StatisticsCache.of(tmp_path, load_tiny(), [], Request(), {}, {}).folder == first.folder
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5.0}
    assert StatisticsCache.of(tmp_path, model, [], Request(), {}, {}).folder != first.folder


def test_a_run_that_stops_while_it_prices(tmp_path, load_tiny, batches, monkeypatch):
    """The same modifiers again: nothing of the first attempt is left in them."""
    modifiers = recipe(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(BitAllocationModifier, "note", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            plan_recipe(load_tiny(), modifiers, batches)
    assert plan_recipe(load_tiny(), modifiers, batches).decided


def _interrupted(*arguments):
    raise KeyboardInterrupt


def test_notes_of_other_code_are_not_read(tmp_path, load_tiny, batches, measured, monkeypatch):
    plan_recipe(load_tiny(), recipe(tmp_path, 5.0), batches)
    del measured[:]
    plan_recipe(load_tiny(), recipe(tmp_path, 5.0), batches)
    assert not measured
    monkeypatch.setattr("casp_plugin.statistics.cache.code_digest", lambda: "other")
    plan_recipe(load_tiny(), recipe(tmp_path, 5.0), batches)
    assert measured

"""Grids, the models of a study, what is told from their scores, and bit allocation by it."""

import json
import math
from itertools import combinations, product

import numpy as np
import pandas as pd
import pytest
import torch
from compressed_tensors.offload.cache import CPUCache
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from pydantic import ValidationError
from safetensors.torch import save_file
from support import tiny_vlms
from support.samples import png, save_texts
from support.tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from casp_plugin import BitAllocationModifier
from casp_plugin.cli import app
from casp_plugin.cli.app import main
from casp_plugin.evaluation.text import evaluate
from casp_plugin.model.load import bare_model, load_model
from casp_plugin.model.location import AXES, Location, find_locations, levels
from casp_plugin.model.schemes import stored_bytes, weight_args
from casp_plugin.plan.sensitivity_file import Sensitivity, Shares, shares_of
from casp_plugin.sensitivity import scoring, study
from casp_plugin.sensitivity.analysis import (
    analyse,
    best_models,
    losses_together,
    pareto_front,
)
from casp_plugin.sensitivity.grid import (
    Configuration,
    Layer,
    features,
    grid,
    space_filling,
    weights_of,
)
from casp_plugin.sensitivity.rounding import changed_by, uniform
from casp_plugin.sensitivity.scoring import ScoredData
from casp_plugin.sensitivity.study import Calibration, Study, find_layers, points_of
from casp_plugin.sensitivity.summary import analyse_all

HEAD = ["re:(.*[.])?lm_head$"]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """A tenth of the forests that intervals are told from."""
    monkeypatch.setattr("casp_plugin.sensitivity.analysis.RESAMPLES", 10)


def layers_of(*components, blocks=("front", "middle", "end")):
    """One layer of each kind in each block of some components."""
    return {
        f"{component}.{block}.{kind}": Layer(Location(component, block, kind), (64, 64 + 32 * i))
        for component in components
        for i, (block, kind) in enumerate(product(blocks, ("attention", "feed-forward")))
    }


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Path of a random llama of six layers."""
    return save_tiny_model(tmp_path_factory.mktemp("llama"), num_hidden_layers=6)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    save_texts(path)
    return path


# Parts and grids.


def test_parts_of_a_language_model(llama):
    layers = find_layers(load_model(llama), HEAD)
    assert len(layers) == 6 * 7
    for name, layer in layers.items():
        index = int(name.split(".")[2])
        block = ("front", "front", "middle", "middle", "end", "end")[index]
        kind = "attention" if "self_attn" in name else "feed-forward"
        assert layer.location == Location("language", block, kind)


@pytest.mark.parametrize(
    ("family", "connector", "loose"),
    [
        ("llava", "model.multi_modal_projector.linear_1", 2),
        ("blip-2", "qformer.encoder.layer.2.output_query.dense", 1),
    ],
)
def test_parts_of_three_components(family, connector, loose, tmp_path):
    tiny_vlms.save_tiny_vlm(tmp_path, family, blocks=3)
    layers = find_layers(load_model(str(tmp_path)), HEAD)
    parts = [layer.location for layer in layers.values()]
    assert set(levels(parts, "component")) == {"vision", "connector", "language"}
    assert levels(parts, "block group") == ["front", "middle", "end"]
    assert levels(parts, "layer type") == ["attention", "feed-forward"]
    assert sum(part.block is None for part in parts) == loose
    [name] = [name for name in layers if name.endswith(connector)]
    assert layers[name].location.component == "connector"
    if family == "blip-2":
        assert layers[name].location == Location("connector", "end", "feed-forward")


def test_short_stacks_and_experts_have_no_thirds():
    inside = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(4)])
    layer = torch.nn.ModuleDict({"attention": torch.nn.Linear(2, 2), "experts": inside})
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer] * 3)})
    names = ["layers.2.experts.0", "layers.0.attention"]
    assert list(find_locations(model, names).values()) == [
        Location("language", "end", "feed-forward"),
        Location("language", "front", "attention"),
    ]
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer] * 2)})
    for name in ("layers.1.attention", "layers.1.experts.3"):
        assert find_locations(model, [name]) == {name: Location("language", None, None)}


def test_sizes_of_the_grids():
    three = layers_of("vision", "connector", "language")
    assert len(grid("uniform", three)) == 4 * 7 * 7 * 3
    assert len(grid("gptq", three)) == len(grid("awq", three)) == 6 * 7
    # a projector without blocks is quantized or not, whatever blocks are chosen
    projector = {"p": Layer(Location("connector", None, None), (8, 8))}
    assert len(grid("uniform", layers_of("vision", "language") | projector)) == 4 * (6 * 21 + 1)
    assert len(grid("uniform", layers_of("language"))) == 4 * 7 * 3
    assert len(grid("gptq", layers_of("language"))) == 6 * 7 * 3


def test_a_grid_quantizes_no_set_of_layers_twice():
    layers = layers_of("vision", "language") | {
        "p": Layer(Location("connector", None, None), (8, 8))
    }
    seen = {
        (one.bits, frozenset(name for name, each in layers.items() if one.takes(each.location)))
        for one in grid("uniform", layers)
    }
    assert len(seen) == len(grid("uniform", layers))
    sets = {taken for _, taken in seen}
    expected = set()
    for components in subsets(["vision", "connector", "language"]):
        for blocks in subsets(["front", "middle", "end"]):
            for kinds in subsets(["attention", "feed-forward"]):
                expected.add(
                    frozenset(
                        name
                        for name, each in layers.items()
                        if each.location.component in components
                        and each.location.block in (None, *blocks)
                        and each.location.layer_type in (None, *kinds)
                    )
                )
    assert sets == expected - {frozenset()}


def subsets(names):
    return [each for n in range(1, len(names) + 1) for each in combinations(names, n)]


def test_bits_a_weight():
    layers = layers_of("vision", "language")
    one = Configuration("uniform", 4, ("vision",), ("front", "end"), ("attention",))
    found = features(one, layers, torch.bfloat16, 32)
    spent, whole = {}, {}
    for layer in layers.values():
        weights = math.prod(layer.shape)
        part = layer.location
        taken = (part.component, part.layer_type) == (
            "vision",
            "attention",
        ) and part.block != "middle"
        bits = weights * 4 + 32 if taken else weights * 16
        for level in ("per_weight", *map(part.level, AXES)):
            spent[level] = spent.get(level, 0) + bits
            whole[level] = whole.get(level, 0) + weights
    assert found == pytest.approx({f"bits_{k}": spent[k] / whole[k] for k in spent})
    everything = Configuration("gptq", 3, ("language",), (), ())
    flat = {"p": Layer(Location("language", None, None), (48, 96))}
    stored = stored_bytes((48, 96), weight_args(3, 32), torch.bfloat16)
    taken = features(everything, flat, torch.bfloat16, 32)["bits_per_weight"]
    assert taken == pytest.approx(stored * 8 / (48 * 96))


def test_an_order_that_fills_the_space():
    points = np.random.default_rng(0).random((40, 3)) * [1, 100, 0]
    order = space_filling(points, [7, 3])
    assert sorted(order) == list(range(40))
    assert order[:2] == [7, 3]
    scaled = points[:, :2] / np.ptp(points[:, :2], axis=0)
    for place in range(2, 40):
        taken, left = order[:place], order[place:]
        gaps = [min(np.linalg.norm(scaled[i] - scaled[j]) for j in taken) for i in left]
        assert gaps[0] == pytest.approx(max(gaps))


def test_more_points_add_to_fewer():
    layers = layers_of("vision", "connector", "language")
    everything = points_of(["uniform", "gptq"], layers, torch.bfloat16, 32)
    some = points_of(["uniform", "gptq"], layers, torch.bfloat16, 32, 50)
    assert some == everything[:50]
    assert sum(one.method == "gptq" for one in some) == 25
    assert len(everything) == 588 + 42
    first = [one for one in everything if one.method == "uniform"][:28]  # whole components
    assert {(len(one.block), len(one.kind)) for one in first} == {(3, 2)}


# Weights.


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_uniform_is_the_formula(bits):
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(bits)) * 0.1
    wide = weight.double().numpy()
    low, high = wide.min(), wide.max()
    scaled = np.rint((2**bits - 1) * (wide - low) / (high - low)) / (2**bits - 1)
    found = uniform(weight, bits)
    np.testing.assert_allclose(found.numpy(), (high - low) * scaled + low, atol=1e-7)
    assert len(found.unique()) <= 2**bits
    assert (found - weight).abs().max() <= (high - low) / (2**bits - 1) / 2 + 1e-7


def test_uniform_of_one_value():
    weight = torch.full((3, 4), 0.3, dtype=torch.bfloat16)
    assert uniform(weight, 2).equal(weight)


def changed(llama, batches, method, bits, names):
    return changed_by(method, load_model(llama), names, bits, 32, batches, 0)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_quantizers_change_what_they_were_given(llama, batches, method):
    """And with all that they change, eight bits are nearly the original."""
    names = [name for name in find_layers(load_model(llama), HEAD) if ".3." in name]
    found = changed(llama, batches, method, 8, names)
    weights = {f"{name}.weight" for name in names}
    norms = {f"model.layers.3.{which}_layernorm.weight" for which in ("input", "post_attention")}
    assert found.keys() == (weights | norms if method == "awq" else weights)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    batch = next(iter(batches))
    with torch.no_grad():
        expected = model(**batch).logits
        for name, tensor in found.items():
            model.get_parameter(name).copy_(tensor)
        torch.testing.assert_close(model(**batch).logits, expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_weights_are_those_that_a_checkpoint_holds(llama, batches, method, monkeypatch):
    """Where weights come from an accelerator as copies, too."""
    onload = CPUCache.onload
    monkeypatch.setattr(CPUCache, "onload", lambda *args: onload(*args).clone())
    name = "model.layers.0.mlp.down_proj"
    weight = changed(llama, batches, method, 2, [name])[f"{name}.weight"]
    for row in weight.view(-1, 32):
        assert len(row.unique()) <= 4


def test_cells_that_change_one_tensor(tmp_path):
    for cell in ("attention", "feed-forward"):
        save_file({"norm": torch.zeros(2), cell: torch.zeros(2)}, tmp_path / cell)
    files = {cell: tmp_path / cell for cell in ("attention", "feed-forward")}
    with pytest.raises(ValueError, match="norm is changed for attention and for feed-forward"):
        study._check_apart("awq", files)
    study._check_apart("awq", {"attention": tmp_path / "attention"})


# Studies.


def judged(llama, texts):
    rows = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    return ScoredData(AutoTokenizer.from_pretrained(llama), texts=tuple(rows[:3]), max_length=24)


def study_of(llama, texts, batches, folder, processes=1):
    layers = find_layers(load_model(llama), HEAD)
    calibration = Calibration(batches, 32, 0)
    what = judged(llama, texts)
    return Study(llama, layers, torch.float32, what, calibration, folder, processes)


BLOCKS, KINDS = ("front", "middle", "end"), ("attention", "feed-forward")
SOME = [
    Configuration("uniform", 2, ("language",), BLOCKS, KINDS),
    Configuration("uniform", 2, ("language",), ("middle",), ("attention",)),
    Configuration("gptq", 2, ("language",), ("front",), ("feed-forward",)),
    Configuration("gptq", 2, ("language",), ("front", "middle"), ("feed-forward",)),
]


@pytest.fixture(scope="module")
def whole(llama, texts, tmp_path_factory):
    """A small study in one go: its folder and rows."""
    batches = torch.utils.data.DataLoader(
        [{"input_ids": torch.arange(3, 27) + i} for i in range(4)], batch_size=1
    )
    folder = tmp_path_factory.mktemp("study")
    return folder, study_of(llama, texts, batches, folder).run(SOME), batches


def test_scores_are_those_of_the_changed_models(llama, texts, whole):
    _, rows, batches = whole
    assert list(rows.method) == ["original", "uniform", "uniform", "gptq", "gptq"]
    what = judged(llama, texts)

    def perplexity(change):
        model = load_model(llama)
        with torch.no_grad():
            for name, tensor in change(dict(model.named_parameters())):
                model.get_parameter(name).copy_(tensor)
        return evaluate(model, what.processor, what.texts, 24, stride=24).perplexity

    def row(one):
        same = rows[list(one.row())].eq(list(one.row().values())).all(axis=1)
        return rows[same]["text/perplexity"].item()

    assert rows["text/perplexity"][0] == pytest.approx(perplexity(lambda _: []), rel=1e-6)
    for one in SOME[:2]:
        names = [
            n for n, e in find_layers(load_model(llama), HEAD).items() if one.takes(e.location)
        ]
        rounded = perplexity(
            lambda p, names=names: [
                (f"{n}.weight", uniform(p[f"{n}.weight"].data, 2)) for n in names
            ]
        )
        assert row(one) == pytest.approx(rounded, rel=1e-6)
    names = [
        n for n, e in find_layers(load_model(llama), HEAD).items() if SOME[2].takes(e.location)
    ]
    by_gptq = changed(llama, batches, "gptq", 2, names)
    assert row(SOME[2]) == pytest.approx(perplexity(lambda _: by_gptq.items()), rel=1e-5)
    assert row(SOME[3]) != row(SOME[2])


def test_a_study_that_stopped_goes_on(llama, texts, whole, tmp_path, monkeypatch):
    folder, rows, batches = whole
    asked = []

    def scores(self, model):
        asked.append(1)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return original(self, model)

    original = ScoredData.scores
    monkeypatch.setattr(ScoredData, "scores", scores)
    with pytest.raises(KeyboardInterrupt):
        study_of(llama, texts, batches, tmp_path).run(SOME)
    assert len(pd.read_parquet(tmp_path / "points.parquet")) == 3
    found = study_of(llama, texts, batches, tmp_path).run(SOME)
    assert len(asked) == 4 + 2
    pd.testing.assert_frame_equal(found, rows)
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "points.parquet"), rows)
    assert not (tmp_path / "weights").exists()
    study_of(llama, texts, batches, tmp_path).run(SOME)
    assert len(asked) == 6


def test_two_processes_find_the_same(llama, texts, whole, tmp_path):
    _, rows, batches = whole
    found = study_of(llama, texts, batches, tmp_path, processes=2).run(SOME)
    pd.testing.assert_frame_equal(found, rows, rtol=1e-6)


def test_processes_that_memory_allows(monkeypatch):
    memory = type("memory", (), {"available": 10_000})
    monkeypatch.setattr(scoring.psutil, "virtual_memory", lambda: memory)
    assert scoring.processes_of(8, 1_000) == 3
    assert scoring.processes_of(2, 1_000) == 2
    assert scoring.processes_of(8, 1_000_000) == 1


# What is told from the scores.


def frame(loss, levels_=("a", "b", "c"), models=80, method="uniform"):
    """Models whose perplexity is exp of a function of their bits."""
    rng = np.random.default_rng(0)
    bits = rng.choice([2.0, 4, 6, 8, 16], (models, len(levels_)))
    columns = {f"bits_{level}": bits[:, i] for i, level in enumerate(levels_)}
    worse = [loss(*row) for row in 4 * 2.0**-bits]
    rest = {"block": "", "kind": "", **columns, "t/perplexity": np.exp(worse)}
    return pd.DataFrame({"method": method, **rest})


def told(points, parts=("a", "b", "c")):
    return analyse(points, "uniform", "t", "perplexity", "component", dict.fromkeys(parts, 1 / 3))


def test_importance_is_that_of_what_counts():
    found = told(frame(lambda a, b, c: 4 * a + b))
    for measure in ("forest", "permutation", "shap", "consensus"):
        values = [getattr(found.parts[part], measure) for part in "abc"]
        assert sum(values) == pytest.approx(1)
        assert values[0] > values[1] > values[2]
        assert values[2] < 0.02
    for one in found.parts.values():
        assert one.low <= one.forest <= one.high
        assert one.consensus == pytest.approx((one.forest + one.permutation + one.shap) / 3)
    assert found.points == 80
    assert found.fit > 0.9
    assert told(frame(lambda a, b, c: 4 * a + b)) == found  # the seed is fixed


def test_pairs_that_only_count_together():
    apart = told(frame(lambda a, b, c: a + b)).pairs
    together = told(frame(lambda a, b, c: 4 * a * b)).pairs
    assert apart.keys() == {"a x b", "a x c", "b x c"}
    assert apart["a x b"] < 0.1 < together["a x b"]
    assert together["a x c"] < 0.03


def test_what_cannot_be_told():
    with pytest.raises(ValueError, match="uniform, t: 5 models are too few"):
        told(frame(lambda a, b, c: a, models=5))
    with pytest.raises(ValueError, match="uniform, t: perplexity is the same for all models"):
        told(frame(lambda a, b, c: 1.0))
    points = frame(lambda a, b, c: 4 * a + b)
    points.loc[3, "t/perplexity"] = math.inf
    points.loc[5, "t/perplexity"] = math.nan
    assert told(points).points == 78  # the others tell all the same


def test_axes_that_a_method_does_not_vary():
    """GPTQ quantizes whole components: thirds of the blocks go up and down together."""
    layers = layers_of("vision", "language")
    rows = []
    for one in points_of(["uniform", "gptq"], layers, torch.bfloat16, 32, 60):
        found = features(one, layers, torch.bfloat16, 32)
        rows.append(one.row() | found | {"t/perplexity": 1 + 8 / found["bits_per_weight"]})
    found = analyse_all(pd.DataFrame(rows), layers, "perplexity")
    assert [(one.method, one.axis) for one in found] == [
        ("uniform", "component"),
        ("gptq", "component"),
        ("uniform", "block group"),
        ("uniform", "layer type"),
    ]


def test_a_connector_that_is_always_whole_does_not_tell_for_others():
    """Its bits are the width of all that is quantized, which those of others, averages, hide."""
    layers = layers_of("vision", "language") | {
        "connector": Layer(Location("connector", None, None), (64, 64))
    }
    rows = []
    for one in points_of(["uniform"], layers, torch.bfloat16, 32, 150):
        worst = any(one.takes(layer.location) for n, layer in layers.items() if "language" in n)
        found = features(one, layers, torch.bfloat16, 32)
        rows.append(one.row() | found | {"t/perplexity": math.exp(8 / one.bits if worst else 0)})
    found = {one.axis: one for one in analyse_all(pd.DataFrame(rows), layers, "perplexity")}
    shapes = [layer.shape for layer in layers.values()]
    shares = weights_of(layers, "component")
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["connector"] == pytest.approx(64 * 64 / sum(o * i for o, i in shapes))
    assert found["component"].parts["connector"].weights == shares["connector"]
    assert found["component"].points == 28
    assert found["component"].parts["connector"].consensus < 0.05
    assert found["component"].parts["language"].consensus > 0.9
    assert found["layer type"].points == 150  # thirds and types are told by all models


def test_losses_add_up_or_not():
    rows = [
        ("original", 16, "", "", "", 2.0),
        ("gptq", 2, "vision", "front+end", "attention", 4.0),
        ("gptq", 2, "language", "front+end", "attention", 8.0),
        ("gptq", 2, "vision+language", "end", "attention", 1e9),  # some of its layers only
        ("gptq", 2, "vision+language", "front+end", "attention", 64.0),
        ("gptq", 3, "vision+language", "front+end", "attention", 4.0),
        ("gptq", 3, "vision", "front+end", "attention", 4.0),
        ("gptq", 3, "language", "front", "attention", 4.0),
    ]
    columns = ["method", "bits", "component", "block", "kind", "t/perplexity"]
    points = pd.DataFrame(rows, columns=columns)
    [found] = losses_together(points, "gptq", "t", "perplexity").to_dict("records")
    assert found["pair"] == "vision+language"
    assert found["alone"] == pytest.approx(math.log(2) + math.log(4))
    assert found["together"] == pytest.approx(math.log(32))
    assert found["ratio"] == pytest.approx(5 / 3)
    hardly = points.assign(**{"t/perplexity": points["t/perplexity"] ** 0.01})
    assert losses_together(hardly, "gptq", "t", "perplexity").ratio.isna().all()
    points = points.rename(columns={"t/perplexity": "t/f1"})
    assert losses_together(points, "gptq", "t", "f1").alone.item() == -2 - 6


@pytest.mark.parametrize("lower", [True, False])
def test_pareto_front(lower):
    rng = np.random.default_rng(0)
    bits, quality = rng.integers(0, 12, 60).astype(float), rng.random(60).round(1)
    errors = quality if lower else -quality
    front = pareto_front(bits, quality, lower)
    assert (np.diff(bits[front]) > 0).all()
    for i in range(60):
        beaten = ((bits <= bits[i]) & (errors < errors[i])) | (
            (bits < bits[i]) & (errors <= errors[i])
        )
        same = (bits[front] == bits[i]) & (errors[front] == errors[i])
        assert same.any() != beaten.any()


def test_best_models_are_of_one_method_and_the_original():
    rows = [("original", 16.0, 0.9), ("gptq", 4.0, 0.5), ("gptq", 8.0, 0.5), ("awq", 4.0, 0.8)]
    points = pd.DataFrame(rows, columns=["method", "bits_per_weight", "t/f1"])
    found = best_models(points, "gptq", "t", "f1")
    assert found.to_records(index=False).tolist() == [rows[1], rows[0]]


# Bit allocation by a study.


def written(folder, parts, pairs=(), axis="component", method="gptq"):
    shares = Shares(parts=parts, pairs=dict(pairs))
    path = folder / "sensitivity.json"
    found = Sensitivity(model="m", axis=axis, methods={method: shares})
    path.write_text(found.model_dump_json())
    return str(path)


def test_shares_of_tasks():
    found = shares_of(
        [{"a": 0.8, "b": 0.2}, {"a": 0.4, "b": 0.6}], [{"a x b": 0.1}, {"a x b": 0.3}]
    )
    assert found.parts == pytest.approx({"a": 0.48, "b": 0.32})
    assert found.pairs == pytest.approx({"a x b": 0.2})


def test_shares_of_some_parts():
    shares = Shares(parts={"a": 0.4, "b": 0.2, "c": 0.1}, pairs={"a x b": 0.1, "b x c": 0.2})
    found = Sensitivity(model="m", axis="component", methods={"gptq": shares})
    some = found.of_method("gptq", ["b", "a"])
    assert some.parts == pytest.approx({"b": 2 / 7, "a": 4 / 7})
    assert some.pairs == pytest.approx({"a x b": 1 / 7})
    with pytest.raises(ValueError, match="has gptq, not awq: run casp sensitivity with --methods"):
        found.of_method("awq", ["a"])
    with pytest.raises(ValueError, match=r"not \['d'\]"):
        found.of_method("gptq", ["a", "d"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("[]", "was not written by casp sensitivity"),
        ('{"model": "m", "axis": "component", "methods": {"gptq": {"parts": {"a": 2}, "pairs": '
         '{}}}}', "sum to 1"),
        ('{"model": "m", "axis": "component", "methods": {"gptq": {"parts": {"a": 0.9}, "pairs": '
         '{"a x b": 0.1}}}}', "pairs name"),
    ],
)  # fmt: skip
def test_files_that_are_no_studies(content, message, tmp_path):
    path = tmp_path / "s.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValidationError, match=message):
        BitAllocationModifier(average_bits=3, importance=str(path))


def test_settings_that_do_not_go_with_a_study(tmp_path):
    path = written(tmp_path, {"language": 1.0})
    for fields, message in (
        ({"average_bits": {"language": 3}}, "average_bits must be one number"),
        ({"component_weights": {"language": 2}}, "leave out component_weights"),
        ({"solver": "closed_form"}, "closed_form needs one importance a layer"),
        ({"importance": "fischer"}, "must be one of fisher, block_influence, uniform"),
    ):
        with pytest.raises(ValidationError, match=message):
            BitAllocationModifier(**{"average_bits": 3, "importance": path, **fields})


def planned(folder, batches, path, budget=5.0, quantizer=None, **fields):
    allocate = BitAllocationModifier(
        average_bits=budget, candidates=[2, 3, 4, 8], group_size=32, importance=path, **fields
    )
    recipe = [allocate, quantizer or GPTQModifier()]
    return oneshot(model=load_model(folder), recipe=recipe, dataset=batches).casp_plan


def bits_by(plan, group):
    found = {}
    for unit in plan.units:
        found.setdefault(group(unit), []).append(unit.choice.bits)
    return {name: np.mean(bits) for name, bits in found.items()}


def test_blocks_that_matter_get_the_bits(llama, batches, tmp_path):
    def third(unit):
        return int(unit.name.split(".")[2]) // 2

    plans = {}
    for favourite in BLOCKS:
        shares = {block: 0.98 if block == favourite else 0.01 for block in BLOCKS}
        path = written(tmp_path, shares, axis="block group")
        plans[favourite] = planned(llama, batches, path)
        assert 4.9 < plans[favourite].reached_bits <= 5
        assert plans[favourite].settings["BitAllocationModifier"]["importance"] == path
    for index, favourite in enumerate(BLOCKS):
        found = bits_by(plans[favourite], third)
        assert found[index] == max(found.values())
        assert found[index] >= 5.5
    values = [point.error for point in plans["front"].pareto]
    assert values == sorted(values, reverse=True)
    assert values[0] == pytest.approx(1)


def test_shares_as_predicted_change_nothing(llama, batches, tmp_path):
    """Without pairs, and with the shares that the errors have themselves, the knapsack is the
    default's."""
    default = planned(llama, batches, "fisher")
    worst = {}
    for unit in default.units:
        block = BLOCKS[int(unit.name.split(".")[2]) // 2]
        worst[block] = worst.get(block, 0) + max(c.error for c in unit.candidates)
    whole = sum(worst.values())
    path = written(tmp_path, {b: worst[b] / whole for b in BLOCKS}, axis="block group")
    found = planned(llama, batches, path)

    def error(plan):
        return sum(unit.importance * unit.choice.error for unit in plan.units)

    assert error(found) <= error(default) * (1 + 1e-6)


def test_studies_of_something_else(llama, batches, tmp_path):
    path = written(tmp_path, {"front": 0.5, "end": 0.5}, axis="block group")
    with pytest.raises(ValueError, match=r"importance: the study of m has .*, not \['middle'\]"):
        planned(llama, batches, path)
    path = written(tmp_path, dict.fromkeys(BLOCKS, 1 / 3), axis="block group", method="awq")
    with pytest.raises(ValueError, match="has awq, not gptq"):
        planned(llama, batches, path)
    path = written(tmp_path, dict.fromkeys(BLOCKS, 1 / 3), axis="block group")
    with pytest.raises(ValueError, match="lm_head lies in none: put it into ignore"):
        planned(llama, batches, path, ignore=[])
    path = written(tmp_path, {"language": 0.5, "vision": 0.5})
    with pytest.raises(ValueError, match="tells components apart, and all layers are of one"):
        planned(llama, batches, path)


# The command.


def casp(*arguments):
    found = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


def test_the_command_on_a_model_that_sees(tmp_path):
    tiny_vlms.save_tiny_vlm(tmp_path / "in", "llava", blocks=3)
    rows = {
        "image": [png(seed=i) for i in range(4)],
        "question": ["w5 w9"] * 4,
        "answer": [f"w{i + 9} w20" for i in range(4)],
        "task": ["caption", "vqa"] * 2,
    }
    Dataset.from_dict(rows).to_parquet(tmp_path / "data.parquet")
    data = ("--dataset", tmp_path / "data.parquet", "--heldout", tmp_path / "data.parquet")
    arguments = (
        *("sensitivity", tmp_path / "in", "--output", tmp_path / "out", *data),
        *("--task-column", "task", "--methods", "uniform", "--max-points", 40),
        *("--group-size", 32, "--heldout-split", "train"),
    )
    casp(*arguments, "--metric", "f1")
    points = pd.read_parquet(tmp_path / "out" / "points.parquet")
    assert len(points) == 41
    for task in ("caption", "vqa"):
        for metric in ("perplexity", "f1", "exact_match"):
            assert f"{task}/{metric}" in points
    with pytest.raises(ValueError, match="metric was 'f1'"):
        casp(*arguments)
    arguments = [tmp_path / "again" if each == tmp_path / "out" else each for each in arguments]
    output = casp(*arguments)
    points = pd.read_parquet(tmp_path / "again" / "points.parquet")
    assert not any("f1" in column for column in points)
    assert "Importance of components" in output
    found = Sensitivity.load(tmp_path / "again" / "sensitivity.json")
    assert found.axis == "component"
    assert found.methods["uniform"].parts.keys() == {"vision", "connector", "language"}
    for name in ("quality", "importance_component", "importance_block_group"):
        assert (tmp_path / "again" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    text = (tmp_path / "again" / "sensitivity.md").read_text()
    assert "| uniform | caption | vision" in text
    assert "Models that no other beats in bits a weight and in perplexity" in text
    assert "| original | vqa" in text
    analyses = json.loads((tmp_path / "again" / "analysis.json").read_text())
    assert {one["task"] for one in analyses} == {"caption", "vqa"}


def test_the_command_on_a_language_model(llama, texts, tmp_path):
    output = casp(
        *("sensitivity", llama, "--output", tmp_path / "out", "--methods", "uniform"),
        *("--heldout", texts, "--heldout-samples", 2, "--max-length", 24, "--max-points", 14),
    )
    assert "Importance of block groups" in output
    assert "Importance of layer types" in output
    assert "Importance of components" not in output
    found = Sensitivity.load(tmp_path / "out" / "sensitivity.json")
    assert found.methods["uniform"].parts.keys() == set(BLOCKS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "uniform, rtn"), "'rtn' must be one of uniform, gptq, awq"),
        (("--methods", "gptq", "--group-size", "48"), "does not divide the 64 columns of"),
        (("--metric", "f1", "--group-size", "32"), "needs questions about images"),
        (("--metric", "acc", "--methods", "uniform"), "'acc' must be one of perplexity, exact"),
        (("--ignore", "re:.*"), "every matching layer is excluded by ignore"),
        (("--dataset", "nowhere.jsonl", "--group-size", "32"), "cannot read dataset 'nowhere"),
    ],
)
def test_errors_before_anything_is_done(llama, tmp_path, arguments, message, capsys, monkeypatch):
    command = ["casp", "sensitivity", llama, "--output", str(tmp_path / "out"), *arguments]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_awq_of_a_model_that_nobody_knows(tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.for_model("gpt_neox", hidden_size=64, num_hidden_layers=3, vocab_size=96)
    bare = bare_model(config)
    layers = find_layers(bare, ["re:.*embed_out$"])
    study.check_method("uniform", bare, layers, 32)
    with pytest.raises(ValueError, match=r"--methods awq: AWQModifier\.mappings"):
        study.check_method("awq", bare, layers, 32)

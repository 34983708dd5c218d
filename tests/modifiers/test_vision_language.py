"""Vision-language models, compressed with images and loaded again."""

import json
import shutil
from functools import cache

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.sequential.transformers_helpers import HFTracer
from loguru import logger
from support import tiny_vlms
from support.compressed_vlms import COMPONENTS, DENSE_CONNECTORS, batch_of, compress
from support.tiers import tiered
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoTokenizer, DynamicCache
from transformers.models.opt import modeling_opt
from typer.testing import CliRunner

from casp_plugin import (
    AutoRoundModifier,
    BitAllocationModifier,
    CompressionPlan,
    LowRankQKModifier,
    cli,
)
from casp_plugin.checkpoint.check import check
from casp_plugin.checkpoint.fold import fold
from casp_plugin.model.low_rank_linear import LowRankLinear
from casp_plugin.modifiers import plan_recipe
from casp_plugin.plan.tables import plan_tables
from casp_plugin.report.figures.plans import draw
from casp_plugin.statistics import tracing

#: `make test` has one of those that are alike, a dense connector, and a tower by other names
FAMILIES = tiered(tiny_vlms.FAMILIES, "llava", "blip-2", "gemma3")
# families whose processor does without torchvision
WITH_PROCESSOR = {"llava", "llava_next", "gemma3", "paligemma", "blip-2"}


@pytest.fixture(scope="module")
def all_components(tmp_path_factory):
    """Compresses all components of a family, once by each quantizer: folder, model and batch."""

    @cache
    def made(family, quantizer):
        folder = tmp_path_factory.mktemp("all_components")
        model, batch = compress(folder, family, quantizer(), components=COMPONENTS[family])
        for path in (folder / "in").glob("*processor*"):
            shutil.copy(path, folder / "out")
        return folder / "out", model, batch

    return made


@pytest.mark.parametrize("quantizer", [GPTQModifier, QuantizationModifier])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_components(family, quantizer, all_components):
    out, model, batch = all_components(family, quantizer)
    found = {unit.component for unit in model.casp_plan.units}
    assert found == set(COMPONENTS[family])
    assert all(torch.isfinite(p).all() for p in model.parameters() if p.is_floating_point())
    reloaded = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, reloaded(**batch).logits)
    findings = {finding.what: finding for finding in check(out)}
    failed = [what for what, finding in findings.items() if finding.passed is False]
    assert failed == (["vLLM"] if family in DENSE_CONNECTORS else [])
    assert findings["reload"].detail.endswith("for an image") == (family in WITH_PROCESSOR)


@pytest.mark.parametrize("family", FAMILIES)
def test_fold(family, all_components, tmp_path):
    """Stock transformers does not load SigLIP towers quantized."""
    if family in ("gemma3", "paligemma"):
        model, batch = compress(tmp_path, family, GPTQModifier(), components=["language"])
        out = tmp_path / "out"
    else:
        out, model, batch = all_components(family, GPTQModifier)
    fold(out, tmp_path / "folded")
    folded = AutoModelForImageTextToText.from_pretrained(tmp_path / "folded", dtype=torch.float32)
    assert not any(isinstance(module, LowRankLinear) for module in folded.modules())
    with torch.no_grad():
        expected, found = (each(**batch).logits for each in (model, folded))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_auto_round_tunes_language_models_only(tmp_path):
    quantizer = AutoRoundModifier(iters=2, batch_size=1, enable_torch_compile=False)
    model, batch = compress(tmp_path, "llava", quantizer)
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits.float(), reloaded(**batch).logits)
    (tmp_path / "again").mkdir()
    with pytest.raises(ValueError, match=r"not model\.vision_tower\.\S+: put it into"):
        compress(tmp_path / "again", "llava", quantizer, components=["language", "vision"])


def test_awq_scales_the_language_model(tmp_path):
    """The vision tower has layers of the same names, and no norms of those names."""
    awq = AWQModifier()
    model, batch = compress(tmp_path, "llava", awq, QuantizationModifier())
    before = AutoModelForImageTextToText.from_pretrained(tmp_path / "in", dtype=torch.float32)
    norms = [
        f"model.language_model.layers.{i}.{which}_layernorm.weight"
        for i in range(2)
        for which in ("input", "post_attention")
    ]
    for name in norms:
        assert not torch.equal(model.get_parameter(name), before.get_parameter(name))
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, reloaded(**batch).logits)


@pytest.mark.parametrize("family", ["gemma3", "qwen2_vl"])
def test_awq_without_factors(family, tmp_path):
    tiny_vlms.save_tiny_vlm(tmp_path / "in", family)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "in", dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "norm" in name}
    bits = BitAllocationModifier(average_bits=5, candidates=[2, 3, 4, 8], group_size=32)
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(tmp_path / "in"),
        recipe=[bits, AWQModifier(), QuantizationModifier()],
        dataset=DataLoader([batch_of(model, tmp_path / "in", family)] * 4, batch_size=None),
    )
    scaled = [n for n, old in before.items() if not torch.allclose(model.get_parameter(n), old)]
    assert scaled
    assert all("language_model" in name for name in scaled)


def test_awq_of_opt(tmp_path):
    """llm-compressor has no mappings for it."""
    model, batch = compress(tmp_path, "blip-2", AWQModifier(), QuantizationModifier())
    before = AutoModelForImageTextToText.from_pretrained(tmp_path / "in", dtype=torch.float32)
    layers = [f"language_model.model.decoder.layers.{i}" for i in range(2)]
    norms = [f"{layer}.{n}_layer_norm.weight" for layer in layers for n in ("self_attn", "final")]
    own = dict(model.named_parameters())
    known = {n: p for n, p in before.named_parameters() if "norm" in n and n in own}
    assert {n for n, p in known.items() if not torch.equal(p, own[n])} == set(norms)
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, reloaded(**batch).logits)


def test_language_only_is_the_default(tmp_path):
    model, batch = compress(tmp_path, "llava", GPTQModifier())
    assert {unit.component for unit in model.casp_plan.units} == {"language"}
    quantized = {
        name for name, module in model.named_modules() if hasattr(module, "quantization_scheme")
    }
    assert quantized
    assert all("language_model" in name for name in quantized)
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, reloaded(**batch).logits)


def test_a_budget_for_each_component(tmp_path):
    budgets = {"language": 4.5, "vision": 6.0}
    model, _ = compress(tmp_path, "llava", GPTQModifier(), average_bits=budgets)
    plan = model.casp_plan
    for budget in plan.budgets:
        assert budgets[budget.component] - 0.2 < budget.reached_bits <= budgets[budget.component]
    assert {point.component for point in plan.pareto} == set(budgets)
    shown = json.loads((tmp_path / "out" / "casp_plan.json").read_text())["average_bits"]
    assert shown == budgets


def test_drawn(tmp_path):
    """Components have layers and names in common, so each has its own panel."""
    model, _ = compress(tmp_path, "llava", GPTQModifier(), components=["language", "vision"])
    plan = model.casp_plan
    drawn = draw(plan).axes
    panels = {axes.get_title("left"): axes for axes in drawn if axes.get_title("left")}
    density = "language: attention density"
    names = [title.split(",")[0] for title in panels]
    assert names == ["vision: bits", "language: bits", density, density, density]
    for component, axes in zip(("vision", "language"), panels.values(), strict=False):
        drawn = axes.images[0].get_array().compressed()
        chosen = [unit.choice.bits for unit in plan.units if unit.component == component]
        assert sorted(drawn) == sorted(chosen)
    drawn = panels[density].images[0].get_array()
    assert drawn.T.tolist() == [attention.heads for attention in plan.attention]
    drawn = panels[f"{density}, over images"].images[0].get_array()
    assert drawn.T.tolist() == [attention.image for attention in plan.attention]


def test_low_rank_in_a_vision_tower(tmp_path):
    """LLaVA's last layer there does nothing for the loss, and stays dense."""
    tiny_vlms.save_tiny_vlm(tmp_path / "in", "llava")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "in", dtype=torch.float32)
    both = ["language", "vision"]
    model = oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(tmp_path / "in"),
        recipe=[
            LowRankQKModifier(components=both, ranks=32),
            BitAllocationModifier(
                components=both, average_bits=5, candidates=[2, 3, 4, 8], group_size=32
            ),
            GPTQModifier(),
        ],
        dataset=DataLoader([batch_of(model, tmp_path / "in", "llava")] * 4, batch_size=None),
        output_dir=str(tmp_path / "out"),
    )
    factored = {each.module for each in model.casp_plan.low_rank if each.rank is not None}
    layers = ["model.language_model.layers.0", "model.language_model.layers.1"]
    layers += ["model.vision_tower.encoder.layers.0"]
    assert factored == {f"{layer}.self_attn.{p}_proj" for layer in layers for p in "qk"}
    assert any("layers dense, because the loss" in one for one in model.casp_plan.warnings)
    batch = batch_of(model, tmp_path / "in", "llava")
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, reloaded(**batch).logits)


def test_component_weights(tmp_path):
    """A heavier component gets more bits of a common budget."""
    reached = []
    for name, weight in (("light", 1e-6), ("heavy", 1e6)):
        (tmp_path / name).mkdir()
        model, _ = compress(
            tmp_path / name,
            "llava",
            GPTQModifier(),
            components=["language", "vision"],
            component_weights={"vision": weight},
        )
        units = [unit for unit in model.casp_plan.units if unit.component == "vision"]
        reached.append(sum(u.choice.bytes for u in units) / sum(u.weights for u in units))
    assert reached[0] < reached[1]


def test_components_by_patterns_of_the_user(tmp_path):
    """Given once, they count for every modifier: no factors in what is vision now."""
    tiny_vlms.save_tiny_vlm(tmp_path / "in", "llava")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "in", dtype=torch.float32)
    bits = BitAllocationModifier(
        average_bits={"language": 5, "upper": 6},
        component_patterns={"upper": ["1"]},  # ...layers.1
        candidates=[2, 3, 4, 8],
        group_size=32,
    )
    model = oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(tmp_path / "in"),
        recipe=[LowRankQKModifier(), bits, GPTQModifier()],
        dataset=DataLoader([batch_of(model, tmp_path / "in", "llava")] * 4, batch_size=None),
    )
    plan = model.casp_plan
    assert {each.module.split(".")[3] for each in plan.low_rank} == {"0"}
    assert {unit.component: unit.name.split(".layers.")[1][0] for unit in plan.units} == {
        "language": "0",
        "upper": "1",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"components": ["vision", "audio"]}, "no matching linear layer lies in 'audio'"),
        ({"average_bits": {"language": 4, "vision": 30}}, "average_bits of vision: 30.0 cannot be"),
        (
            {"average_bits": {"language": 4}, "components": ["vision"]},
            r"budgets for \['language'\], components are \['vision'\]",
        ),
        ({"component_weights": {"vision": 2}}, r"\['vision'\] are not among the components"),
        ({"average_bits": {"language": -1}}, "must be positive"),
    ],
)
def test_wrong_components(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        compress(tmp_path, "llava", GPTQModifier(), **settings)


def test_image_weights_must_agree(tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(tiny_vlms.save_tiny_vlm(tmp_path, "llava"))
    bits = BitAllocationModifier(average_bits=4, group_size=32, image_weight=1)
    with pytest.raises(ValueError, match=r"image_weight must be the same .* got \[0.5, 1.0\]"):
        plan_recipe(model, [LowRankQKModifier(image_weight=0.5), bits, GPTQModifier()])


def test_image_weight_without_images(tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(tiny_vlms.save_tiny_vlm(tmp_path, "llava"))
    warnings = []
    sink = logger.add(lambda message: warnings.append(str(message)), level="WARNING")
    recipe = [LowRankQKModifier(keep=0.5, image_weight=0.5)]
    plan_recipe(model, recipe, [{"input_ids": torch.tensor([[5, 6, 7, 8]])}])
    logger.remove(sink)
    assert any("image_weight changes nothing" in warning for warning in warnings)


def test_untraceable(tmp_path, monkeypatch):
    """One clear warning before the statistics, one clear error after them, and torch as it was."""
    before = [getattr(torch, name) for name in HFTracer._TORCH_METHODS_TO_PATCH]
    monkeypatch.setattr(tracing, "_FEATURES", [])  # then BLIP-2 is such a model
    warnings = []
    sink = logger.add(lambda message: warnings.append(str(message)), level="WARNING")
    message = r"Blip2ForConditionalGeneration cannot be traced \(.*\): name the method"
    with pytest.raises(ValueError, match=message):
        compress(tmp_path, "blip-2", GPTQModifier())
    logger.remove(sink)
    assert sum("calibration may fail" in warning for warning in warnings) == 1
    assert [getattr(torch, name) for name in HFTracer._TORCH_METHODS_TO_PATCH] == before
    assert modeling_opt.DynamicCache is DynamicCache


def test_untraceable_on_the_command_line(files, monkeypatch):
    monkeypatch.setattr(tracing, "trace_subgraphs", lambda *args: 1 / 0)
    result = casp(files, "run", "--dataset", files / "data.jsonl", "--output", files / "out")
    assert "cannot be traced (division by zero)" in str(result.exception)
    assert "Collecting" not in result.output
    assert not (files / "out").exists()


def test_batches_of_images(files):
    arguments = ("--dataset", files / "data.jsonl", "--output", files / "out", "--batch-size", 2)
    assert "--batch-size is for text" in str(casp(files, "run", *arguments).exception)


RECIPE = """
casp_stage:
  casp_modifiers:
    LowRankQKModifier: {image_weight: 0.5}
    BitAllocationModifier:
      average_bits: 5
      candidates: [2, 3, 4, 8]
      group_size: 32
      components: [language, vision]
    GPTQModifier: {}
"""


@pytest.fixture
def files(tmp_path):
    """A model, a recipe, and questions about images of several sizes, one or two at a time."""
    tiny_vlms.save_tiny_vlm(tmp_path / "in", "llava")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    rows = []
    for i in range(6):
        tiny_vlms.image().resize((32 + 8 * i, 40)).save(tmp_path / f"{i}.png")
        images = [f"{i}.png", "0.png"][: 1 + i % 2]
        rows.append({"image": images, "question": f"w{5 + i} w6", "answer": "w7"})
    rows.append({"image": [], "question": "w5", "answer": "w6"})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def casp(files, command, *more):
    arguments = [command, files / "in", "--recipe", files / "recipe.yaml", *more]
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_command_line(files):
    result = casp(files, "run", "--dataset", files / "data.jsonl", "--output", files / "out")
    assert result.exit_code == 0, result.output
    plan = CompressionPlan.load(files / "out")
    assert plan.calibration_tokens == 6 * 3 + 9 * 16  # not the row without images
    assert {unit.component for unit in plan.units} == {"language", "vision"}
    kept = [path for path in (files / "in").iterdir() if "processor" in path.name]
    kept += [files / "in" / "tokenizer.json", files / "in" / "tokenizer_config.json"]
    for path in kept:  # the user's own, byte for byte
        assert (files / "out" / path.name).read_bytes() == path.read_bytes()
    written = {path.name for path in (files / "out").iterdir() if "processor" in path.name}
    assert written == {path.name for path in kept if "processor" in path.name}
    checked = CliRunner().invoke(cli.app, ["check", str(files / "out")])
    assert checked.exit_code == 0, checked.output


def test_plan_on_the_command_line(files):
    result = casp(files, "plan", "--dataset", files / "data.jsonl", "--json", files / "p.json")
    assert result.exit_code == 0, result.output
    plan = CompressionPlan.load(files / "p.json")
    assert plan.decided
    (table,) = [table for table in plan_tables(plan) if table.title == "Components"]
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["vision", "language"]
    for shares in cells[3:]:  # of the error
        assert sum(int(cell.split("(")[1].rstrip("%)")) for cell in shares) in (99, 100, 101)
    bare = casp(files, "plan", "--json", files / "bare.json")
    assert bare.exit_code == 0, bare.output
    assert not CompressionPlan.load(files / "bare.json").decided


def test_text_alone(files):
    rows = [{"text": f"w{5 + i} w6 w7"} for i in range(4)]
    (files / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = casp(files, "plan", "--dataset", files / "text.jsonl", "--json", files / "p.json")
    assert "text alone" in result.output
    assert "no calibration token reached 'vision'" in str(result.exception)


def test_chats_alone(files):
    (files / "in" / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.content }} {% endfor %}"
    )
    rows = [{"messages": [{"role": "user", "content": f"w{5 + i} w6 w7"}]} for i in range(4)]
    (files / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = casp(files, "plan", "--dataset", files / "chats.jsonl", "--json", files / "p.json")
    assert "text alone" in result.output
    assert "no calibration token reached 'vision'" in str(result.exception)


def test_neither_images_nor_text(files):
    (files / "other.jsonl").write_text(json.dumps({"picture": "0.png"}))
    result = casp(files, "plan", "--dataset", files / "other.jsonl")
    assert "no column 'image'" in str(result.exception)

"""The page and the card say what the files say, to people who did not make them."""

import shutil
from html.parser import HTMLParser

import pytest
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from huggingface_hub import ModelCard
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from support import tiny_vlms
from support.command_line import casp, error_of
from support.tiny_models import save_tiny_model

from casp_plugin import CompressionPlan
from casp_plugin.bench.runs import Speed
from casp_plugin.checkpoint.sizes import size_breakdown
from casp_plugin.evaluation.records import save_records
from casp_plugin.evaluation.results import Evaluation, Measurement
from casp_plugin.model.load import load_model
from casp_plugin.report.facts import read_facts
from casp_plugin.report.page import page


@pytest.fixture
def checkpoint(compressed_llama, tmp_path):
    """A copy of one's own, into which the page and the card are written."""
    return shutil.copytree(compressed_llama, tmp_path / "out")


def evaluation(model, losses):
    fields = {"task": "texts<1>", "metric": "perplexity", "documents": "d"}
    found = Measurement.of_mean(
        losses, [10.0] * len(losses), True, **fields, higher_is_better=False
    )
    settings = {"seed": 0, "limit": 8, "join": False, "num_fewshot": None}
    return Evaluation(model=str(model), settings=settings, versions={}, measurements=[found])


def speed(model, prefill, bytes_on_disk):
    workload = {"prompt_tokens": 8, "new_tokens": 11}
    one = {"prompt_tokens": 8, "prefill": prefill, "total": 1.25, "prefill_memory": 10**9}
    return Speed(
        model=str(model), engine="hf", device="a device", versions={}, workload=workload,
        bytes_on_disk=bytes_on_disk, rounds=[{**one, "memory": 2 * 10**9}],
    )  # fmt: skip


@pytest.fixture
def measured(checkpoint, tiny_llama, files):
    """--eval and --bench of a checkpoint and its original."""
    losses = [10.0 + i for i in range(8)]
    records = [evaluation(tiny_llama, losses), evaluation(checkpoint, [x + 2 for x in losses])]
    save_records(records, files / "eval.json")
    save_records([speed(tiny_llama, 0.25, 2000), speed(checkpoint, 0.75, 500)], files / "b.json")
    return ["--eval", files / "eval.json", "--bench", files / "b.json"]


class Reader(HTMLParser):
    """Text, tags, and whatever a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.ids, self.text = [], set(), set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data", "srcset"):
                self.links.add(value)
            if name == "id":
                self.ids.add(f"#{value}")

    def handle_data(self, data):
        self.text += data


def quantize(source, target):
    """Round the language model of any model to nearest."""
    weights = QuantizationArgs(num_bits=8, strategy="channel")
    groups = {"w8": QuantizationScheme(targets=["Linear"], weights=weights)}
    recipe = QuantizationModifier(config_groups=groups, ignore=["re:.*lm_head"])
    oneshot(model=load_model(str(source)), recipe=[recipe], output_dir=str(target))


def test_sizes_are_those_of_the_file(checkpoint):
    breakdown = size_breakdown(checkpoint)["language"]
    tensors = load_file(checkpoint / "model.safetensors")

    def of(*ends):
        return sum(t.nbytes for name, t in tensors.items() if name.endswith(ends))

    factors = of("up.weight_packed", "down.weight_packed")
    assert factors > 0
    assert breakdown["codes of factors"] == factors
    assert breakdown["codes"] == of("weight_packed") - factors
    assert breakdown["scales"] == of("weight_scale")
    assert breakdown["zero points"] == of("weight_zero_point")
    assert breakdown["embedding"] == of("embed_tokens.weight")
    assert sum(breakdown.values()) == sum(t.nbytes for t in tensors.values())
    assert sum(breakdown.values()) == CompressionPlan.load(checkpoint).total_bytes


def test_sizes_by_component_and_head(tmp_path):
    save_tiny_model(tmp_path / "m", tie_word_embeddings=False)
    quantize(tmp_path / "m", tmp_path / "q")
    assert size_breakdown(tmp_path / "q")["language"]["output head"] == 96 * 64 * 4
    tiny_vlms.save_tiny_vlm(tmp_path / "vlm", "llava")
    quantize(tmp_path / "vlm", tmp_path / "qv")
    found = size_breakdown(tmp_path / "qv")
    assert set(found) == {"language", "vision", "connector"}
    tensors = load_file(tmp_path / "qv" / "model.safetensors")
    total = sum(size for kinds in found.values() for size in kinds.values())
    assert total == sum(tensor.nbytes for tensor in tensors.values())
    assert found["vision"]["other matrices"] > 0  # position and patch embeddings


def test_page_and_card(checkpoint, tiny_llama, files, measured):
    result = casp("report", checkpoint, *measured, "--license", "apache-2.0")
    assert result.exit_code == 0, result.output
    text = (checkpoint / "report.html").read_text()
    seen = Reader(text)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in seen.links)
    assert not {"script", "link", "iframe", "img"} & set(seen.tags)
    assert "@import" not in text
    assert "url(http" not in text
    parts = {"#size", "#quality", "#speed", "#bits", "#ranks", "#attention", "#how"}
    plan = CompressionPlan.load(checkpoint)
    assert plan.warnings
    parts.add("#warnings")
    assert parts <= seen.links
    assert parts <= seen.ids
    # nine pictures: sizes, changes, speed, bits, costs, budgets, ranks, spectra, densities
    assert seen.tags.count("figure") == seen.tags.count("svg") == 9
    assert f"{plan.reached_bits:.3f}" in seen.text
    assert "x1.221 [1.221, 1.221]" in seen.text  # exp of 2 nats over 10 tokens
    assert "texts<1>" in seen.text  # escaped in the page
    assert "Measured by: seed 0, limit 8." in seen.text
    assert "x3.000" in seen.text  # prefill
    assert "BitAllocationModifier:" in seen.text
    assert all(unit.name in seen.text for unit in plan.units)

    card = ModelCard.load(checkpoint / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model is None  # a folder, which nobody else has
    assert card.data.pipeline_tag == "text-generation"
    assert {"casp", "compressed-tensors", "vllm"} <= set(card.data.tags)
    assert card.data.eval_results[0].metric_value == pytest.approx(evaluation("", [
        12.0 + i for i in range(8)]).measurements[0].value)  # fmt: skip
    assert r"| texts\<1\> | perplexity |" in card.text  # escaped there too
    assert "x1.221" in card.text
    assert "vllm serve out" in card.text
    assert "\n\n\n" not in card.text
    assert page(read_facts(checkpoint, measured[1:2], measured[3:])) == text  # the same each time


def test_without_measurements(checkpoint):
    assert casp("report", checkpoint).exit_code == 0
    seen = Reader((checkpoint / "report.html").read_text())
    assert not {"#quality", "#speed"} & (seen.links | seen.ids)
    assert "Not measured yet." in (checkpoint / "README.md").read_text()


def test_checkpoints_of_stock_recipes(tmp_path):
    """No plan: what is known is shown."""
    save_tiny_model(tmp_path / "m")
    quantize(tmp_path / "m", tmp_path / "q")
    assert casp("report", tmp_path / "q").exit_code == 0
    seen = Reader((tmp_path / "q" / "report.html").read_text())
    assert "holds no plan" in seen.text
    assert seen.tags.count("svg") == 1


def test_a_hub_model_is_named_in_the_card(checkpoint):
    plan = CompressionPlan.load(checkpoint)
    plan.model = "someone/model-1.5"
    plan.save(checkpoint / "casp_plan.json")
    assert casp("report", checkpoint).exit_code == 0
    card = ModelCard.load(checkpoint / "README.md")
    assert card.data.base_model == "someone/model-1.5"
    assert card.data.base_model_relation == "quantized"


def test_a_card_of_someone_else_stays(checkpoint):
    path = checkpoint / "README.md"
    path.write_text("my own")
    result = casp("report", checkpoint)
    assert "--overwrite replaces it" in " ".join(result.output.split())
    assert path.read_text() == "my own"
    assert casp("report", checkpoint, "--overwrite").exit_code == 0
    assert path.read_text().startswith("---")
    path.write_text(path.read_text().replace("## Limitations", "## Limits"))
    assert casp("report", checkpoint).exit_code == 0  # ours: made again
    assert "## Limitations" in path.read_text()


def test_wrong_files(checkpoint, tiny_llama, files, capsys, monkeypatch):
    save_records([evaluation(tiny_llama, [1.0, 2.0])], files / "other.json")
    found = error_of(capsys, monkeypatch, "report", checkpoint, "--eval", files / "other.json")
    assert f"other.json measured {tiny_llama}, not" in found
    (files / "x.json").write_text("{}")
    found = error_of(capsys, monkeypatch, "report", checkpoint, "--bench", files / "x.json")
    assert "was not written by casp bench" in found
    assert "is no checkpoint of compressed-tensors" in error_of(
        capsys, monkeypatch, "report", tiny_llama
    )
    assert not (checkpoint / "report.html").exists()

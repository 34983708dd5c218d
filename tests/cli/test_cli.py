"""The command line as a user types it."""

import json
import os
import shutil

import pytest
import torch
from support.command_line import RECIPE, casp, error_of, run_arguments
from transformers import AutoModelForCausalLM

from casp_plugin import CompressionPlan
from casp_plugin.data.sources import load_text


def test_plan_without_data(tiny_llama, files):
    result = casp("plan", tiny_llama, "--recipe", files / "recipe.yaml", "--json", files / "p.json")
    assert result.exit_code == 0, result.output
    assert "2|3|4|8" in result.output
    assert "512 samples of 2048 tokens takes about" in " ".join(result.output.split())
    plan = CompressionPlan.load(files / "p.json")
    assert len(plan.units) == 10
    assert not plan.decided


def test_plan_with_data_draws_the_bits(tiny_llama, files):
    result = casp(
        "plan", tiny_llama, "--recipe", files / "recipe.yaml", "--dataset", files / "data.jsonl",
        "--max-length", 32, "--json", files / "p.json", "--png", files / "p.png",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert CompressionPlan.load(files / "p.json").decided
    assert "it/s" not in result.output  # but one line for every stage
    assert result.output.count("choosing\n") == 1
    assert (files / "p.png").read_bytes().startswith(b"\x89PNG")


def test_budget_of_the_command_line(tiny_llama, files):
    result = casp(*run_arguments(tiny_llama, files, "--average-bits", 4, "--samples", 2))
    assert result.exit_code == 0, result.output
    plan = CompressionPlan.load(files / "out")
    assert plan.average_bits == 4
    assert 3.95 <= plan.reached_bits <= 4
    assert "average_bits: 4.0" in (files / "out" / "recipe.yaml").read_text()


def test_budgets_of_components_of_the_command_line(tiny_llama, files):
    recipe = files / "recipe.yaml"
    recipe.write_text(RECIPE.replace("average_bits: 5", "average_bits: {language: 5}"))
    command = ["plan", tiny_llama, "--recipe", recipe, "--json", files / "p.json"]
    assert casp(*command, "--average-bits", "language=4.5").exit_code == 0
    assert CompressionPlan.load(files / "p.json").average_bits == {"language": 4.5}


@pytest.mark.parametrize(
    ("budget", "average_bits", "message"),
    [
        ("4", "{language: 5}", "average_bits has a budget for each component (language)"),
        ("4", "{language: 5}", "budgets of the same components can, as in language=5"),
        ("vision=4", "{language: 5}", "average_bits has a budget for each component (language)"),
        ("language=4", "5", "average_bits has one budget for all components: one number is needed"),
        ("language=", "{language: 5}", "--average-bits : numbers are needed"),
        ("many", "5", "--average-bits many: numbers are needed"),
        ("-1", "5", "--average-bits -1: numbers are needed"),
        ("nan", "5", "--average-bits nan: numbers are needed"),
        ("1.5", "5", "1.5 cannot be reached"),
        ("4", None, "has no BitAllocationModifier to give average_bits to"),
    ],
)
def test_budgets_that_do_not_fit(
    tiny_llama, files, capsys, monkeypatch, budget, average_bits, message
):
    recipe = RECIPE.replace("average_bits: 5", f"average_bits: {average_bits}")
    if average_bits is None:
        recipe = "\n".join(line for line in RECIPE.splitlines() if "BitAllocation" not in line)
    (files / "recipe.yaml").write_text(recipe)
    arguments = run_arguments(tiny_llama, files, "--average-bits", budget)
    told = error_of(capsys, monkeypatch, *arguments)
    assert message in told
    assert "average" in told
    assert not (files / "out").exists()


def test_run_check_fold(tiny_llama, files):
    result = casp(*run_arguments(tiny_llama, files))
    assert result.exit_code == 0, result.output
    for name in ("tokenizer.json", "tokenizer_config.json"):
        with open(os.path.join(tiny_llama, name), "rb") as source:
            assert (files / "out" / name).read_bytes() == source.read()
    assert casp("check", files / "out").exit_code == 0
    assert casp("fold", files / "out", files / "folded").exit_code == 0
    assert casp("check", files / "folded").exit_code == 0
    assert not [path for path in files.iterdir() if path.name.startswith(".")]


def test_fold_to_one_width(tiny_llama, files, capsys, monkeypatch):
    """Codebooks become integers that stock transformers and vLLM read."""
    (files / "recipe.yaml").write_text(
        "{casp_stage: {casp_modifiers: {TrellisModifier: {bits: 3, state_bits: 10}}}}"
    )
    assert casp(*run_arguments(tiny_llama, files)).exit_code == 0
    data = ("--dataset", files / "data.jsonl", "--max-length", 32)
    fold = ("fold", files / "out", files / "folded")
    wrong = {
        (*data, "--bits", 4): "--group-size 128 does not divide the 64 columns of model.layers.0",
        ("--bits", 4): "--bits and --dataset go together",
        data: "--bits and --dataset go together",
        ("--dataset", files / "no.jsonl", "--bits", 4, "--group-size", 32): "no.jsonl",
    }
    for arguments, message in wrong.items():
        assert message in error_of(capsys, monkeypatch, *fold, *arguments)
        assert not (files / "folded").exists()
    result = casp(*fold, *data, "--bits", 4, "--group-size", 32)
    assert result.exit_code == 0, result.output
    assert "14 layers are of 4 bits now" in " ".join(result.output.split())
    assert casp("check", files / "folded").exit_code == 0
    config = json.loads((files / "folded" / "config.json").read_text())["quantization_config"]
    assert "casp" not in config
    [group] = config["config_groups"].values()
    assert (group["weights"]["num_bits"], group["weights"]["group_size"]) == (4, 32)
    models = [AutoModelForCausalLM.from_pretrained(files / name) for name in ("out", "folded")]
    ids = torch.randint(3, 96, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, rounded = (model(ids).logits for model in models)
    assert (rounded - whole).norm() < 0.3 * whole.norm()
    assert not [path for path in files.iterdir() if path.name.startswith((".", "casp-"))]


def test_check_fails_on_a_broken_checkpoint(compressed_llama, tmp_path):
    shutil.copytree(compressed_llama, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    result = casp("check", tmp_path / "out")
    assert result.exit_code == 1
    assert "FAILED" in result.output


def test_output_that_is_in_the_way(tiny_llama, files, capsys, monkeypatch):
    (files / "out").mkdir()
    (files / "out" / "mine").write_text("keep me")
    error = error_of(capsys, monkeypatch, *run_arguments(tiny_llama, files))
    assert "exists and is not an empty folder" in error
    assert (files / "out" / "mine").read_text() == "keep me"


def test_output_without_permission(tiny_llama, files, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert "cannot be written" in error_of(capsys, monkeypatch, *run_arguments(tiny_llama, files))


def test_quantized_model(compressed_llama, files, capsys, monkeypatch):
    arguments = ["plan", compressed_llama, "--recipe", files / "recipe.yaml"]
    assert "already quantized" in error_of(capsys, monkeypatch, *arguments)


def test_bad_recipe_is_one_line(tiny_llama, files, capsys, monkeypatch):
    (files / "recipe.yaml").write_text(RECIPE.replace("0.4", "1.4"))
    error = error_of(capsys, monkeypatch, *run_arguments(tiny_llama, files))
    assert "keep" in error
    assert "keep must lie in (0, 1)" in error
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "cannot read dataset"),
        ("blank.jsonl", '{"text": "  "}', "holds no text"),
        ("other.jsonl", '{"body": "w3 w4"}', "has no column 'text'; its columns are ['body']"),
        ("absent.jsonl", None, "no such file"),
    ],
)
def test_bad_data(tiny_llama, files, capsys, monkeypatch, name, content, message):
    if content is not None:
        (files / name).write_text(content)
    arguments = run_arguments(tiny_llama, files, "--dataset", files / name)
    assert message in error_of(capsys, monkeypatch, *arguments)
    assert not (files / "out").exists()


def test_sources_of_text(tmp_path):
    import pandas

    rows = {"text": ["w3 w4", "w5 w6"]}
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    pandas.DataFrame(rows).to_csv(tmp_path / "a.csv")
    (tmp_path / "a.txt").write_text("w3 w4\n\nw5 w6\n")
    from datasets import Dataset

    Dataset.from_dict(rows).save_to_disk(str(tmp_path / "folder"))
    for name in ("a.parquet", "a.csv", "a.txt", "folder"):
        texts = load_text(str(tmp_path / name), None, samples=10)
        assert sorted(text.strip() for text in texts["text"]) == rows["text"], name
    bundled = load_text("bundled", None, samples=5)
    assert len(bundled) == 5
    assert bundled["text"] == load_text("bundled", None, samples=5)["text"]

"""The command line as a user types it."""

import os

import pytest
from conftest import save_texts
from typer.testing import CliRunner

from casp_plugin import CompressionPlan, cli
from casp_plugin.data.sources import load_text

RECIPE = """
casp_stage:
  casp_modifiers:
    LowRankQKModifier: {keep: 0.4}
    BitAllocationModifier: {average_bits: 5, candidates: [2, 3, 4, 8], group_size: 16}
    GPTQModifier: {}
"""


@pytest.fixture
def files(tmp_path):
    """A recipe and a calibration file."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    save_texts(tmp_path / "data.jsonl")
    return tmp_path


def casp(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def error_of(capsys, monkeypatch, *arguments):
    """What ``casp`` prints to stderr when it fails."""
    monkeypatch.setattr("sys.argv", ["casp", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    return " ".join(capsys.readouterr().err.split())


def run_arguments(tiny_llama, files, *more):
    return [
        "run", tiny_llama, "--recipe", files / "recipe.yaml", "--dataset", files / "data.jsonl",
        "--output", files / "out", "--max-length", 32, *more,
    ]  # fmt: skip


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
    assert (files / "p.png").read_bytes().startswith(b"\x89PNG")


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


def test_check_fails_on_a_broken_checkpoint(tiny_llama, files):
    casp(*run_arguments(tiny_llama, files))
    (files / "out" / "model.safetensors").unlink()
    result = casp("check", files / "out")
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


def test_quantized_model(tiny_llama, files, capsys, monkeypatch):
    casp(*run_arguments(tiny_llama, files))
    arguments = ["plan", files / "out", "--recipe", files / "recipe.yaml"]
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

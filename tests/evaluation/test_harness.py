"""Tasks of lm-eval and lmms-eval over files beside this one, without any hub."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import tiny_vlms
from support.samples import save_texts
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from casp_plugin.cli import app
from casp_plugin.evaluation.harness import (
    TASK_GROUPS,
    find_tasks,
    measurements_of,
    run_tasks,
)
from casp_plugin.evaluation.records import load_records
from casp_plugin.evaluation.results import Evaluation
from casp_plugin.evaluation.text import evaluate
from casp_plugin.kv_cache import with_kv_cache

TASKS = Path(__file__).parents[1] / "tasks"
LM_EVAL = str(TASKS / "lm_eval")
FACTS = list(map(json.loads, (TASKS / "lm_eval" / "facts.jsonl").read_text().splitlines()))


def asked(model, *tasks, **settings):
    found = run_tasks(str(model), tasks, include_path=LM_EVAL, **settings)
    return {(one.task, one.metric): one for one in found}


def log_likelihood(model, ids, context):
    """Of the tokens after the first ``context``."""
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(scores[i - 1, ids[i]].item() for i in range(context, len(ids)))


def test_perplexity_against_a_loop(tiny_llama, load_tiny):
    found = asked(tiny_llama, "casp_facts_text")["casp_facts_text", "word_perplexity"]
    model, tokenizer = load_tiny(), AutoTokenizer.from_pretrained(tiny_llama)
    loss = words = 0
    for row in FACTS:
        text = f"{row['question']} {row['choices'][row['answer']]}."
        loss -= log_likelihood(model, [tokenizer.bos_token_id, *tokenizer(text).input_ids], 1)
        words += len(text.split())
    assert found.value == pytest.approx(math.exp(loss / words), rel=1e-4)
    assert found.low < found.value < found.high
    assert (len(found.totals), found.higher_is_better) == (len(FACTS), False)


def test_limit_and_patterns(tiny_llama):
    found = asked(tiny_llama, "casp_facts*", limit=3)
    assert {task for task, _ in found} == {"casp_facts", "casp_facts_text", "casp_facts_said"}
    assert all(len(one.totals) == 3 for one in found.values())
    assert found["casp_facts", "acc"].weights == (1, 1, 1)
    assert ("casp_facts_said", "exact_match,first-word") in found


def test_images(tmp_path):
    """A vision-language model is asked by lm-eval's own class for such."""
    tiny_vlms.save_tiny_vlm(tmp_path, "llava")
    found = asked(tmp_path, "casp_colours", backend="hf-multimodal", limit=2)
    assert found["casp_colours", "exact_match"].value == 0


def test_eval_compares(tiny_llama, compressed_llama, tmp_path):
    data = tmp_path / "text.jsonl"
    rows = [{"text": " ".join(f"w{(i * 11 + j) % 90 + 3}" for j in range(20))} for i in range(12)]
    data.write_text("\n".join(map(json.dumps, rows)))
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    shared = ["--dataset", data, "--max-length", 16, "--reference", tiny_llama]
    shared += ["--tasks", "casp_facts", "--include-path", LM_EVAL]
    arguments = map(str, ["eval", tiny_llama, compressed_llama, *shared, "--output", first])
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    original, smaller = load_records(Evaluation, first, "casp eval")
    assert [one.metric for one in smaller.measurements] == [
        "perplexity",
        "kl",
        "top1_agreement",
        "acc",
    ]
    assert [one.value for one in original.measurements[1:3]] == [pytest.approx(0, abs=1e-6), 1]
    assert smaller.measurements[1].value > 0
    assert smaller.settings["stride"] == 16
    assert smaller.versions["transformers"]
    assert f"{compressed_llama} against" in " ".join(result.output.split())

    # the same by two calls
    command = ["eval", compressed_llama, *shared, "--baseline", first, "--output", second]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 0, result.output
    assert load_records(Evaluation, second, "casp eval")[0].measurements == smaller.measurements
    assert "against" in result.output


KV_CACHE = "kcvt:bits=2,g=4"


def test_eval_with_a_kv_cache(tiny_llama, load_tiny, tmp_path):
    """Texts and tasks are scored as a model scores them that keeps its keys and values so."""
    save_texts(tmp_path / "data.jsonl")
    output = tmp_path / "found.json"
    shared = ["--dataset", tmp_path / "data.jsonl", "--output", output, "--kv-cache", KV_CACHE]
    shared += ["--tasks", "casp_facts_text", "--include-path", LM_EVAL]
    result = CliRunner().invoke(app, list(map(str, ["eval", tiny_llama, *shared])))
    assert result.exit_code == 0, result.output
    [found] = load_records(Evaluation, output, "casp eval")
    assert found.settings["kv_cache"] == KV_CACHE
    model, tokenizer = load_tiny(), AutoTokenizer.from_pretrained(tiny_llama)
    texts = [json.loads(row)["text"] for row in (tmp_path / "data.jsonl").read_text().splitlines()]
    dense = evaluate(model, tokenizer, texts, 512).perplexity
    with with_kv_cache(model, KV_CACHE):
        expected = evaluate(model, tokenizer, texts, 512).perplexity
    assert found.measurements[0].value == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(dense, rel=1e-5)
    task = asked(tiny_llama, "casp_facts_text")["casp_facts_text", "word_perplexity"]
    measured = {one.metric: one.value for one in found.measurements}
    assert measured["word_perplexity"] != pytest.approx(task.value, rel=1e-5)
    eight = asked(tiny_llama, "casp_facts_text", kv_cache="kcvt:bits=8,g=4")
    near = eight["casp_facts_text", "word_perplexity"].value
    assert near == pytest.approx(task.value, rel=1e-2)


def test_answers_that_are_kept_are_those_of_one_model(tiny_llama, tmp_path):
    """The harness tells requests apart, not models."""
    kept = str(tmp_path / "answers")
    values = [
        asked(tiny_llama, "casp_facts_text", kv_cache=scheme, use_cache=kept)
        for scheme in (None, KV_CACHE, None)
    ]
    first, other, again = (each["casp_facts_text", "word_perplexity"].value for each in values)
    assert first == again != other
    assert len(list(tmp_path.glob("answers_*.db"))) == 2


def test_stock_command(compressed_llama, tmp_path):
    """lm_eval itself, after the import."""
    code = "import casp_plugin; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    command = ["--model", "hf", "--model_args", f"pretrained={compressed_llama}", "--device", "cpu"]
    command += ["--tasks", "casp_facts_text", "--include_path", LM_EVAL]
    command += ["--output_path", str(tmp_path / "stock")]
    subprocess.run([sys.executable, "-c", code, *command], check=True)
    [path] = (tmp_path / "stock").rglob("results*.json")
    stock = json.loads(path.read_text())["results"]["casp_facts_text"]["word_perplexity,none"]
    found = asked(compressed_llama, "casp_facts_text")["casp_facts_text", "word_perplexity"]
    assert stock == pytest.approx(found.value, rel=1e-3)
    model = AutoModelForCausalLM.from_pretrained(compressed_llama)
    assert hasattr(model.model.layers[0].self_attn.q_proj, "down")  # the factors were in use


def error_of(*arguments):
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)])
    assert result.exit_code == 1
    return str(result.exception)


def test_bad_input(tiny_llama, tmp_path):
    assert "nowhere" in error_of(tiny_llama, tmp_path / "nowhere")  # before the first is scored
    assert "lm-eval has no task nonsense" in error_of(
        tiny_llama, "--tasks", "nonsense", "--include-path", LM_EVAL
    )
    wrong = error_of(tiny_llama, "--tasks", "x", "--harness", "helm")
    assert "harness 'helm' must be one of lm-eval, lmms-eval" in wrong
    longer = error_of(tiny_llama, "--max-length", 8, "--stride", 9)
    assert "--stride 9 is more than --max-length 8" in longer
    (tmp_path / "other.json").write_text("{}")
    baseline = error_of(tiny_llama, "--baseline", tmp_path / "other.json")
    assert "was not written by casp eval" in baseline
    assert "'kivi' must be one of" in error_of(tiny_llama, "--kv-cache", "kivi")
    with pytest.raises(ValueError, match="no folder with a comma"):
        run_tasks("a,b", ["casp_facts"], include_path=LM_EVAL)


def test_harness_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("casp_plugin.evaluation.harness.find_spec", lambda package: None)
    with pytest.raises(ValueError, match=r"pip install 'casp-plugin\[lmms\]'"):
        find_tasks(["casp_image"], "lmms-eval")


def test_other_aggregates_keep_the_harness_interval():
    """What is no mean over documents: groups, scores of pairs, medians."""
    rows = [{"doc_id": i, "mme": {"score": i}, "median": float(i)} for i in range(3)]
    found = measurements_of(
        {
            "results": {
                "t": {
                    "alias": "t",
                    "mme,none": 10.0,
                    "mme_stderr,none": 2.0,
                    "mme_stderr_clt,none": 2.0,
                    "median,none": 2.0,
                    "median_stderr,none": "N/A",
                },
                "group": {"acc,none": 0.5, "acc_stderr,none": 0.1},
            },
            "samples": {"t": rows},
            "higher_is_better": {"t": {"mme": True}},
        }
    )
    mme, median, group = found
    assert (mme.value, mme.totals, mme.higher_is_better) == (10, (), True)
    assert (mme.low, mme.high) == pytest.approx((6.08, 13.92), abs=1e-3)
    assert (median.value, median.low, median.totals) == (2, None, ())
    assert (group.task, group.low) == ("group", pytest.approx(0.304, abs=1e-3))


@pytest.fixture
def lmms_python():
    python = os.environ.get("CASP_LMMS_PYTHON")
    if python is None:
        pytest.skip("CASP_LMMS_PYTHON is not set")
    return python


@pytest.mark.lmms
def test_paper_groups(lmms_python):
    """lmms-eval knows every task of our groups."""
    code = (
        "import sys, yaml; from casp_plugin.evaluation.harness import find_tasks;"
        "manager, _ = find_tasks([], 'lmms-eval');"
        "assert not set(sys.argv[1:]) - set(manager.all_subtasks), sys.argv;"
        "assert {'casp_image', 'casp_video', 'casp_judged'} <= set(manager.all_groups)"
    )
    groups = [path.read_text().splitlines() for path in TASK_GROUPS.glob("*.yaml")]
    names = [line.removeprefix("  - ") for lines in groups for line in lines if line[:3] == "  -"]
    assert len(names) == 16
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "vllm_site")}
    subprocess.run([lmms_python, "-c", code, *names], check=True, env=environment)


@pytest.mark.lmms
@pytest.mark.parametrize("stock", [True, False])
def test_lmms_eval(lmms_python, stock, tmp_path):
    """A real vision-language model, compressed or not (CASP_LMMS_MODEL), says what colours are:
    by the harness's own command, which needs no import, and by ours."""
    model = os.environ["CASP_LMMS_MODEL"]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root / "tests" / "vllm_site")}
    shared = ["--tasks", "casp_colours"]
    if stock:
        command = ["-m", "lmms_eval", "--model", "llava_hf", "--device", "cpu", *shared]
        command += ["--model_args", f"pretrained={model},device_map=cpu"]
        command += ["--include_path", "tests/tasks/lmms_eval", "--output_path", str(tmp_path)]
    else:
        command = ["-m", "casp_plugin", "eval", model, "--harness", "lmms-eval", *shared]
        command += ["--backend", "llava_hf", "--model-args", "device_map=cpu"]
        command += [
            "--include-path",
            "tests/tasks/lmms_eval",
            "--output",
            tmp_path / "results.json",
        ]
    subprocess.run([lmms_python, *command], check=True, cwd=root, env=environment)
    [path] = tmp_path.rglob("*results.json")
    if stock:
        right = json.loads(path.read_text())["results"]["casp_colours"]["exact_match,none"]
    else:
        [right] = [one.value for one in load_records(Evaluation, path, "casp eval")[0].measurements]
    assert right > 0.5

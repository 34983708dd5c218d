"""Speed and memory: the arithmetic by hand, the machinery on tiny models."""

import gc
import multiprocessing
import shutil
import threading
from pathlib import Path

import pytest
import torch
from llmcompressor.modifiers.gptq import GPTQModifier
from pydantic import ValidationError
from rich.console import Console
from support import tiny_vlms
from transformers import AutoConfig, AutoProcessor
from typer.testing import CliRunner

from casp_plugin import BitAllocationModifier, CompressionPlan, LowRankQKModifier
from casp_plugin.bench.engines import Round, TransformersEngine, Workload, answer
from casp_plugin.bench.memory import peak_memory, reset_peak_memory
from casp_plugin.bench.runs import Speed, measure, speed_table
from casp_plugin.bench.shapes import Shapes
from casp_plugin.checkpoint.check import check
from casp_plugin.cli import app
from casp_plugin.data.conversation_batches import processed
from casp_plugin.evaluation.records import load_records
from casp_plugin.model.load import bare_model, bytes_on_disk
from casp_plugin.modifiers.base import without_data

SMALL = Workload(prompt_tokens=6, new_tokens=3, batch_size=2)


def test_peak_memory_forgets():
    size = 256 * 2**20
    reset_peak_memory()
    before = peak_memory()
    block = torch.ones(size, dtype=torch.uint8)
    assert peak_memory() - before > 0.9 * size
    del block
    gc.collect()
    assert peak_memory() - before > 0.9 * size  # still
    reset_peak_memory()
    assert peak_memory() - before < 0.5 * size


def test_workload_is_the_same_each_time():
    assert SMALL.token_ids(50) == SMALL.token_ids(50)
    assert SMALL.token_ids(50) != SMALL.model_copy(update={"seed": 1}).token_ids(50)
    rows = SMALL.token_ids(50)
    assert [len(row) for row in rows] == [6, 6]
    assert all(0 <= token < 50 for row in rows for token in row)
    with pytest.raises(ValidationError, match="new_tokens"):
        Workload(new_tokens=1)


@pytest.mark.parametrize(("shown", "video"), [({"images": 2}, False), ({"frames": 3}, True)])
def test_random_pictures(shown, video):
    asked = Workload(**shown, image_size=20).conversation()
    pictures = asked.decoded()
    assert len(pictures) == next(iter(shown.values()))
    assert asked.video == video
    assert {picture.size for picture in pictures} == {(20, 20)}
    assert pictures[0].tobytes() != pictures[1].tobytes()


def speed(model, *rounds, size=None):
    made = [
        Round(prompt_tokens=6, prefill=prefill, total=total, prefill_memory=memory, memory=10**9)
        for prefill, total, memory in rounds
    ]
    shared = {"engine": "hf", "device": "abacus", "versions": {}, "workload": SMALL}
    return Speed(model=model, bytes_on_disk=size, rounds=made, **shared)


def test_speeds_by_hand():
    fast = speed("fast", (1.0, 2.0, 7), (2.0, 4.0, 9), (1.0, 5.0, 8), size=10**9)
    slow = speed("slow", (2.0, 4.0, 1), (3.0, 5.0, 2), (4.0, 5.0, 3), size=2 * 10**9)
    assert fast.prefill == 1
    assert fast.decode == 2  # rounds of 2 x 2 tokens in 1, 2 and 4 seconds
    assert (fast.prefill_memory, fast.memory) == (9, 10**9)
    ratios = fast.against(slow)
    assert ratios["prefill"] == (0.5, 0.25, pytest.approx(2 / 3))
    assert ratios["decode"] == (1, 0.25, 2)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(speed_table([slow, fast]))
    text = console.export_text()
    assert "1.000  x0.5" in text
    assert "x0.5 [0.25, 0.667]" in text
    speed_table([speed("from the hub", (2.0, 4.0, 1)), speed("here", (2.0, 4.0, 1), size=9)])


def test_too_few_tokens():
    hasty = speed("hasty", (2.0, 1.0, 1))
    with pytest.raises(ValueError, match="3 new tokens took no longer than one"):
        _ = hasty.decode


def test_engine_generates_all_tokens(tiny_llama):
    found = answer(TransformersEngine(tiny_llama, SMALL), SMALL)
    assert found.prompt_tokens == 6
    assert found.prefill > 0
    assert found.memory >= 2**20


def test_engine_sees(tmp_path):
    tiny_vlms.save_tiny_vlm(tmp_path, "llava")
    workload = Workload(images=1, image_size=16, new_tokens=2)
    engine = TransformersEngine(str(tmp_path), workload)
    assert "pixel_values" in engine.inputs
    assert answer(engine, workload).prompt_tokens == engine.inputs["input_ids"].shape[1]


def test_a_process_of_its_own(tiny_llama):
    [found] = measure([tiny_llama], SMALL, rounds=1, warmup=0)
    assert found.rounds[0].prompt_tokens == 6
    assert not multiprocessing.active_children()


def test_measure_in_turns(tiny_llama, bench_in_threads):
    first, second = measure([tiny_llama, tiny_llama], SMALL, rounds=2, warmup=1)
    assert len(first.rounds) == len(second.rounds) == 2
    assert first.bytes_on_disk > 0
    assert first.versions["torch"] == torch.__version__


def test_a_model_that_fails(tiny_llama, bench_in_threads, tmp_path):
    running = threading.active_count()
    with pytest.raises(ChildProcessError, match=r"nowhere: (OSError|HFValidationError)"):
        measure([tiny_llama, str(tmp_path / "nowhere")], SMALL)
    assert threading.active_count() == running


def test_command(tiny_llama, bench_in_threads, tmp_path):
    path = tmp_path / "bench.json"
    command = ["bench", tiny_llama, "--baseline", tiny_llama, "--prompt-tokens", 6, "--new-tokens"]
    command += [40, "--rounds", 1, "--engine-args", "dtype=float64", "--output", path]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 0, result.output
    assert "peak memory" in result.output
    assert len(load_records(Speed, path, "casp bench")) == 2


RECIPE = """
casp_stage:
  casp_modifiers:
    LowRankQKModifier: {}
    BitAllocationModifier: {average_bits: 5, candidates: [2, 3, 4, 8], group_size: 16}
    GPTQModifier: {}
"""


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_random_weights(tiny_llama, bench_in_threads, tmp_path, family):
    """From a folder without weights: the recipe's shapes and bytes, that load and run."""
    source = tiny_llama if family == "llama" else tiny_vlms.save_tiny_vlm(tmp_path / "in", family)
    bare, path = tmp_path / "bare", tmp_path / "bench.json"
    shutil.copytree(source, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "casp.yaml").write_text(RECIPE)
    command = ["bench", "--random-weights", bare, "--recipe", tmp_path / "casp.yaml", "--keep"]
    command += [tmp_path / "kept", "--prompt-tokens", 4, "--new-tokens", 58, "--rounds", 1]
    command += ["--output", path, *(["--images", 1] if family == "llava" else [])]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 0, result.output
    original, made = load_records(Speed, path, "casp bench")
    assert made.bytes_on_disk < original.bytes_on_disk
    assert original.bytes_on_disk == pytest.approx(bytes_on_disk(source), rel=0.02)
    findings = check(tmp_path / "kept" / "bare-casp")
    assert all(finding.passed is not False for finding in findings)
    plan = CompressionPlan.load(tmp_path / "kept" / "bare-casp")
    assert 4.9 < plan.reached_bits <= 5
    assert all(entry.rank == 16 for entry in plan.low_rank)


def test_recipes_that_data_would_decide():
    recipe = [
        LowRankQKModifier(ranks=32),
        BitAllocationModifier(average_bits=3, importance="block_influence"),
        GPTQModifier(),
    ]
    low_rank, bits, _ = without_data(recipe)
    assert (low_rank.ranks, low_rank.keep) == (32, "auto")  # as given
    assert (low_rank.method, bits.importance, bits.solver) == ("svd", "uniform", "closed_form")
    assert recipe[1].importance == "block_influence"
    assert without_data([LowRankQKModifier()])[0].keep == 0.25


def test_random_weights_without_bits(tiny_llama):
    with pytest.raises(ValueError, match="has no BitAllocationModifier"):
        Shapes.of(tiny_llama, RECIPE.replace("BitAlloc", "#"))


def test_random_weights_with_rotations(tiny_llama, tmp_path):
    rotation = "QuIPModifier: {rotations: [v], transform_type: hadamard}\n    GPTQModifier"
    Shapes.of(tiny_llama, RECIPE.replace("GPTQModifier", rotation)).write(tmp_path / "x")
    assert all(finding.passed is not False for finding in check(tmp_path / "x"))
    assert "transform_config" in (tmp_path / "x" / "config.json").read_text()


@pytest.mark.parametrize(
    ("name", "billions"), [("llava-1.5-7b", 7.06), ("llava-next-video-7b", 7.06)]
)
def test_sizes_that_ship(name, billions):
    """benchmarks/configs: the published models' shapes, without their words."""
    folder = Path(__file__).parents[2] / "benchmarks" / "configs" / name
    model = bare_model(AutoConfig.from_pretrained(folder))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)
    if name == "llava-1.5-7b":
        processor = AutoProcessor.from_pretrained(folder)
        inputs = processed([Workload(images=1).conversation()], processor, answered=False)
        assert (inputs["input_ids"] == model.config.image_token_index).sum() == 576


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--random-weights", "x"], "either OUT or --random-weights"),
        (["--keep", "x"], "--recipe and --keep go with --random-weights"),
        (["--engine", "onnx"], "--engine 'onnx' must be one of hf, vllm"),
        (["--images", "1", "--frames", "8"], "images or a video, not both"),
        (["--engine-args", "dtype"], "must be key=value"),
    ],
)
def test_bad_input(tiny_llama, more, message):
    result = CliRunner().invoke(app, ["bench", tiny_llama, *more])
    assert message in str(result.exception)

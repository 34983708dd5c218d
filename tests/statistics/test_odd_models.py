"""Models whose modules put out what others do not: measured, or left alone, never a traceback."""

import pytest
import torch
from support.samples import save_texts
from support.tiny_models import save_tiny_model
from torch import nn
from typer.testing import CliRunner

from casp_plugin import CompressionPlan, cli
from casp_plugin.checkpoint.check import check
from casp_plugin.model.load import load_model
from casp_plugin.model.low_rank_linear import named_linears
from casp_plugin.model.units import matched_linears
from casp_plugin.statistics import tracing
from casp_plugin.statistics.layer_by_layer import try_first_batch

RECIPE = """
casp_stage:
  casp_modifiers:
    BitAllocationModifier: {average_bits: 5, candidates: [2, 3, 4, 8], group_size: 16}
    GPTQModifier: {}
"""
SLIDING = ["sliding_attention", "full_attention"] * 2
GEMMA4 = {
    **{"num_kv_shared_layers": 2, "num_hidden_layers": 4, "layer_types": SLIDING},
    **{"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 96},
    **{"global_head_dim": 16, "sliding_window": 8},
}
GEMMA3N = {
    **{"num_kv_shared_layers": 2, "num_hidden_layers": 4, "layer_types": SLIDING},
    **{"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 96},
    **{"sliding_window": 8, "laurel_rank": 16, "intermediate_size": [128] * 4},
    **{"activation_sparsity_pattern": [0.0] * 4},
}


@pytest.fixture
def files(tmp_path):
    """A recipe and texts."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    save_texts(tmp_path / "data.jsonl")
    return tmp_path


def run(files, model, *more):
    arguments = [
        "run", model, "--recipe", files / "recipe.yaml", "--dataset", files / "data.jsonl",
        "--output", files / "out", "--max-length", 32, *more,
    ]  # fmt: skip
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


@pytest.mark.parametrize(("family", "sizes"), [("gemma4_text", GEMMA4), ("gemma3n_text", GEMMA3N)])
def test_values_that_layers_share_or_change_in_place(files, family, sizes):
    source = save_tiny_model(files / "in", family, **sizes)
    result = run(files, source)
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    names = {n for u in CompressionPlan.load(files / "out").units for n in u.modules}
    assert not [name for name in names if "correction_coefs" in name]  # of a handful of columns


def test_parts_that_do_something_else_run_as_a_whole(files, tiny_llama, batches, monkeypatch):
    """As values that parts get copies of."""
    model = load_model(tiny_llama)
    assert len(tracing.subgraphs_of(model, batches)) == 3

    def broken(*args):
        graphs = stock(*args)
        graphs[1].forward = lambda model, **inputs: {}[0]
        return graphs

    stock = tracing.trace_subgraphs
    monkeypatch.setattr(tracing, "trace_subgraphs", broken)
    [whole] = tracing.subgraphs_of(model, batches)
    assert whole.forward(model, **next(iter(batches))) == {}
    result = run(files, tiny_llama)
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"


def test_a_text_model_that_cannot_be_traced_runs_as_a_whole(files, tiny_llama, monkeypatch):
    monkeypatch.setattr(tracing, "trace_subgraphs", lambda *args: 1 / 0)
    result = run(files, tiny_llama)
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    assert not [each for each in check(files / "out") if each.passed is False]


def test_pipeline(files, tiny_llama, monkeypatch):
    from llmcompressor.pipelines.basic import pipeline

    seen = []
    stock = pipeline.BasicPipeline.__call__

    def watched(*args):
        seen.append(args)
        return stock(*args)

    monkeypatch.setattr(pipeline.BasicPipeline, "__call__", staticmethod(watched))
    assert run(files, tiny_llama).exit_code == 0
    assert not seen
    result = CliRunner().invoke(
        cli.app,
        [
            "run", tiny_llama, "--recipe", str(files / "recipe.yaml"), "--max-length", "32",
            "--dataset", str(files / "data.jsonl"), "--output", str(files / "whole"),
            "--pipeline", "basic",
        ],
    )  # fmt: skip
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    assert len(seen) == 1


class Router(nn.Linear):
    """Puts out more than a product."""

    def forward(self, x):
        return super().forward(x), x


class OwnProduct(nn.Linear):
    """As Falcon's."""

    def forward(self, x):
        return x @ self.weight.T


def test_what_is_a_linear_layer():
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(16, 8),
            "router": Router(16, 8),
            "own": OwnProduct(16, 8, bias=False),
            "attention": nn.MultiheadAttention(16, 2),
        }
    )
    assert [name for name, _ in named_linears(model)] == ["plain", "own"]


def test_routers_and_gates_stay_unless_called_by_name():
    model = nn.ModuleDict(
        {
            "gate": nn.Linear(64, 4),
            "shared_expert_gate": nn.Linear(64, 1),
            "router": nn.ModuleDict({"proj": nn.Linear(64, 4)}),
            "gate_proj": nn.Linear(64, 128),
            "per_layer_input_gate": nn.Linear(64, 16),
            "wide": nn.ModuleDict({"gate": nn.Linear(64, 128)}),
            "coefs": nn.Linear(4, 64),
        }
    )

    def matched(*targets):
        return list(matched_linears(model, list(targets), [], "targets"))

    quantized = ["gate_proj", "per_layer_input_gate", "wide.gate"]
    assert matched("Linear") == quantized
    assert matched("re:.*") == quantized
    assert matched("Linear", "shared_expert_gate") == ["shared_expert_gate", *quantized]
    assert matched("re:.*router[.]proj$") == ["router.proj"]
    assert matched("coefs") == ["coefs"]


class Reads(nn.Module):
    """Stands for an MLP that reads a weight without calling the layer, beside a dead one."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp
        self.read = nn.Linear(64, 64, bias=False)
        self.dead = nn.Linear(64, 64, bias=False)

    def forward(self, x):
        return self.mlp(x) + 0.1 * x @ self.read.weight.T


def test_layers_that_are_read_without_being_called(tiny_llama, batches):
    model = load_model(tiny_llama)
    layer = model.model.layers[0]
    layer.mlp = Reads(layer.mlp)
    found = try_first_batch(model, batches)
    assert found.read == {"model.layers.0.mlp.read"}
    assert "model.layers.0.mlp.mlp.up_proj" in found.reached
    assert not {"model.layers.0.mlp.read", "model.layers.0.mlp.dead"} & found.reached
    assert not [p for p in model.parameters() if p.grad is not None]


def test_unreached_layers_get_scales_of_their_own(files):
    """Whisper's decoder attends to an encoder that is not there: random scales before."""
    sizes = {
        **{"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "encoder_layers": 2},
        **{"decoder_ffn_dim": 128, "encoder_attention_heads": 4, "encoder_ffn_dim": 128},
        "max_target_positions": 64,
    }
    source = save_tiny_model(files / "in", "whisper", decoder_start_token_id=1, **sizes)
    torch.full((10_000_000,), float("nan"))  # what empty memory holds next
    result = run(files, source)
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    stock, back = load_model(source), load_model(str(files / "out"))
    with torch.no_grad():
        back(torch.arange(3, 12)[None])  # makes its weights dense
    weights = dict(back.named_parameters())
    for name, weight in stock.named_parameters():
        assert (weights[name] - weight).norm() <= 0.9 * weight.norm(), name


def test_a_first_batch_that_cannot_run(tiny_llama):
    model = load_model(tiny_llama)
    model.model.layers[0].mlp.forward = lambda x: x[:, :, :3] + x
    with pytest.raises(ValueError, match=r"cannot be measured on the data: RuntimeError"):
        try_first_batch(model, [{"input_ids": torch.arange(3, 9)[None]}])
    with pytest.raises(ValueError, match="hold pixels, but no input_ids"):
        try_first_batch(model, [{"pixels": torch.zeros(1)}])

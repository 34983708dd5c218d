"""What would not load is refused before any data runs."""

import pytest
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from support.samples import save_texts
from support.tiers import tiered
from support.tiny_models import save_tiny_model
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig
from typer.testing import CliRunner

from casp_plugin import BitAllocationModifier, CompressionPlan, LowRankQKModifier, cli
from casp_plugin.checkpoint.check import check
from casp_plugin.checkpoint.fold import fold
from casp_plugin.model.load import bare_model
from casp_plugin.model.weights import read_headers
from casp_plugin.modifiers import plan_recipe

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


class Watched(Dataset):
    """Samples that say whether anybody asked for them."""

    def __init__(self, samples):
        self.samples, self.asked = samples, 0

    def __getitem__(self, index):
        self.asked += 1
        return self.samples[index]

    def __len__(self):
        return len(self.samples)


def recipe(*more):
    allocation = {"average_bits": 5, "candidates": [2, 3, 4, 8], "group_size": 16}
    return [BitAllocationModifier(**allocation), GPTQModifier(), *more]


@pytest.mark.parametrize("factored", [False, True])
def test_experts_that_transformers_could_not_read(batches, tmp_path, factored):
    source = save_tiny_model(tmp_path / "in", "gpt_oss", **EXPERTS)
    watched = Watched(list(batches))
    modifiers = [*([LowRankQKModifier()] if factored else []), *recipe()]
    with pytest.raises(ValueError, match=r"GptOssForCausalLM cannot be compressed .* experts"):
        oneshot(
            model=source, recipe=modifiers, output_dir=str(tmp_path / "out"),
            dataset=DataLoader(watched, batch_size=None),
        )  # fmt: skip
    assert watched.asked == 0
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="no conversion"):
        plan_recipe(bare_model(AutoConfig.from_pretrained(source)), modifiers)


@pytest.mark.parametrize("family", ["llama4_text", "gpt_oss"])
def test_a_plan_refuses_it_too(tmp_path, family):
    """Llama 4's experts take other arguments than those of other families."""
    source = save_tiny_model(
        tmp_path, family, **EXPERTS | {"num_experts_per_tok": 1, "intermediate_size_mlp": 128}
    )
    with pytest.raises(ValueError, match="cannot be compressed by this recipe"):
        plan_recipe(bare_model(AutoConfig.from_pretrained(source)), recipe())


def test_what_vllm_only_would_miss_is_a_warning(batches, tmp_path):
    source = save_tiny_model(tmp_path / "in", "mixtral", **EXPERTS)
    oneshot(model=source, recipe=recipe(), dataset=batches, output_dir=str(tmp_path / "out"))
    warnings = CompressionPlan.load(tmp_path / "out").warnings
    assert any("MixtralForCausalLM cannot be served with quantized experts" in w for w in warnings)
    assert not [each for each in check(tmp_path / "out") if each.passed is False]


GROUPED = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
BESIDE = {
    "head by GPTQ": (GPTQModifier, {"targets": ["lm_head"], "scheme": "W4A16"}),
    "head, zero points": (
        GPTQModifier,
        {"config_groups": {"head": {"targets": ["lm_head"], "weights": GROUPED}}},
    ),
    "head to nearest": (QuantizationModifier, {"targets": ["lm_head"], "scheme": "W8A16"}),
    "head in fp8": (QuantizationModifier, {"targets": ["lm_head"], "scheme": "FP8_DYNAMIC"}),
    "embedding": (QuantizationModifier, {"targets": ["Embedding"], "scheme": "W8A16"}),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", tiered(BESIDE, "head, zero points", "embedding"))
def test_bytes_of_what_another_quantizer_does(batches, tmp_path, name, tied):
    source = save_tiny_model(tmp_path / "in", hidden_size=128, tie_word_embeddings=tied)
    kind, fields = BESIDE[name]
    modifiers = recipe(kind(**fields))
    bare = plan_recipe(bare_model(AutoConfig.from_pretrained(source)), modifiers)
    out = tmp_path / "out"
    oneshot(model=source, recipe=modifiers, dataset=batches, output_dir=str(out))
    found = {each.what: each for each in check(out)}
    assert found["bytes as planned"].passed, found["bytes as planned"].detail
    assert not [each for each in found.values() if each.passed is False]
    assert CompressionPlan.load(out).other_bytes == bare.other_bytes


def test_a_tied_weight_that_is_quantized_twice(batches, tmp_path):
    source = save_tiny_model(tmp_path / "in", hidden_size=128, tie_word_embeddings=True)
    both = QuantizationModifier(targets=["Embedding", "lm_head"], scheme="W8A16")
    with pytest.raises(ValueError, match="are one tied weight, and the recipe quantizes both"):
        oneshot(model=source, recipe=recipe(both), dataset=batches)


def test_groups_of_another_quantizer_that_do_not_fit(batches, tmp_path):
    source = save_tiny_model(tmp_path / "in")
    head = GPTQModifier(targets=["lm_head"], scheme="W4A16")
    with pytest.raises(ValueError, match=r"groups of 128 .* do not divide the 64 columns of lm_he"):
        oneshot(model=source, recipe=recipe(head), dataset=batches)


def test_a_folded_copy_with_a_quantized_embedding(batches, tmp_path):
    source = save_tiny_model(tmp_path / "in", hidden_size=128)
    embedding = QuantizationModifier(targets=["Embedding"], scheme="W8A16")
    modifiers = [LowRankQKModifier(keep=0.4, rank_multiple=16), *recipe(embedding)]
    oneshot(model=source, recipe=modifiers, dataset=batches, output_dir=str(tmp_path / "out"))
    fold(tmp_path / "out", tmp_path / "folded")
    for name in ("out", "folded"):
        assert not [each for each in check(tmp_path / name) if each.passed is False]


HEAD = """
casp_stage:
  casp_modifiers:
    BitAllocationModifier: {average_bits: 5, candidates: [2, 3, 4, 8], group_size: 16}
    GPTQModifier: {}
head_stage:
  head_modifiers:
    GPTQModifier: {targets: [lm_head], scheme: W4A16}
"""


def test_a_second_quantizer_in_a_stage_of_its_own(tmp_path):
    """As YAML has to have it; each runs by itself then."""
    source = save_tiny_model(tmp_path / "in", hidden_size=128)
    (tmp_path / "recipe.yaml").write_text(HEAD)
    save_texts(tmp_path / "data.jsonl")
    arguments = [
        "run", source, "--recipe", tmp_path / "recipe.yaml", "--dataset", tmp_path / "data.jsonl",
        "--output", tmp_path / "out", "--max-length", 32,
    ]  # fmt: skip
    result = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    assert "lm_head.weight_packed" in read_headers(tmp_path / "out")

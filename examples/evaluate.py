"""Measure what a compressed language model lost: perplexity, KL divergence and agreement.

    python examples/evaluate.py [OUT MODEL DATASET]

OUT is the compressed model, MODEL the original.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import casp_plugin  # noqa: F401  transformers loads compressed checkpoints after this import
from casp_plugin.data.sources import load_text
from casp_plugin.evaluation.results import compare
from casp_plugin.evaluation.text import evaluate

OUT, MODEL, DATASET = sys.argv[1:] or (
    "OUT",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "bundled-heldout",
)
SAMPLES, MAX_LENGTH = 32, 512

tokenizer = AutoTokenizer.from_pretrained(MODEL)
original = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
compressed = AutoModelForCausalLM.from_pretrained(OUT, dtype="auto")
texts = load_text(DATASET, tokenizer, SAMPLES)["text"]

before = evaluate(original, tokenizer, texts, MAX_LENGTH)
after = evaluate(compressed, tokenizer, texts, MAX_LENGTH, reference=original)
for measurement in after.measurements(DATASET):
    print(f"{measurement.metric}: {measurement.value:.4f}")

perplexity, original_perplexity = (s.measurements(DATASET)[0] for s in (after, before))
ratio = compare(perplexity, original_perplexity)
print(f"perplexity x{ratio.change:.3f}, 95 % interval {ratio.low:.3f} to {ratio.high:.3f}")

"""Score a checkpoint, loaded from disk, and print JSON: the half of ``compare.py`` that runs in a
process of its own.

    python benchmarks/measure.py FOLDER REFERENCE HELDOUT SAMPLES MAX_LENGTH

A language model is scored on texts, a vision-language model on questions about images.
"""

import json
from dataclasses import asdict
from pathlib import Path

import typer
from safetensors import safe_open
from transformers import AutoProcessor, AutoTokenizer, set_seed

from casp_plugin.data.conversations import load_conversations
from casp_plugin.data.sources import load_text
from casp_plugin.evaluation.answers import evaluate_answers
from casp_plugin.evaluation.text import evaluate
from casp_plugin.model.components import LANGUAGE, component_of
from casp_plugin.model.load import is_multimodal, load_model
from casp_plugin.model.low_rank_linear import named_linears

PROMPT = "A compiler is a program that"


def main(folder: str, reference: str, heldout: str, samples: int, max_length: int) -> None:
    """Print scores, size and a sample of text."""
    original = load_model(reference)
    model = original if folder == reference else load_model(folder)
    against = None if model is original else original
    if is_multimodal(model.config):
        processor = AutoProcessor.from_pretrained(folder)
        questions = load_conversations(heldout, samples, task_column="task")
        scores = evaluate_answers(model, processor, questions, against)
        sample = scores.texts[0].answer
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = load_text(heldout, tokenizer, samples)["text"]
        scores = evaluate(model, tokenizer, texts, max_length, against)
        set_seed(0)
        ids = tokenizer(PROMPT, return_tensors="pt")
        sample = tokenizer.decode(model.generate(**ids, max_new_tokens=40, do_sample=False)[0])
    found = {"texts": [asdict(one) for one in scores.texts], "text": sample}
    print(json.dumps({**_sizes(folder, original), **found}))


def _sizes(folder: str, original) -> dict:
    """Bits of a weight of the language model's layers, everything else taken for 16 bits; bits of
    a parameter of the whole model; bytes of the tensors."""
    linears = [
        module.weight
        for name, module in named_linears(original)
        if not name.endswith("lm_head") and component_of(name) == LANGUAGE
    ]
    weights = sum(weight.numel() for weight in linears)
    other = sum(p.nbytes for p in original.parameters()) - sum(w.nbytes for w in linears)
    total = 0
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            total += sum(shard.get_tensor(name).nbytes for name in shard.keys())  # noqa: SIM118
    return {
        "bits": (total - other) * 8 / weights,
        "whole": total * 8 / sum(p.numel() for p in original.parameters()),
        "bytes": total,
    }


if __name__ == "__main__":
    typer.run(main)

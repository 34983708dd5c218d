"""Compress a model by a recipe, a stock recipe too.

python benchmarks/compress.py MODEL RECIPE OUT --average-bits 2.56 --dataset D
"""

import time
from pathlib import Path

import typer
from budgets import at_budget
from llmcompressor import oneshot
from transformers import AutoProcessor, AutoTokenizer, set_seed

from casp_plugin.checkpoint.format import copy_processor
from casp_plugin.data.conversation_batches import conversation_loader
from casp_plugin.data.conversations import load_conversations
from casp_plugin.data.sources import load_text
from casp_plugin.data.text_batches import calibration_loader
from casp_plugin.model.load import is_multimodal, load_model, read_model_config
from casp_plugin.modifiers.lifecycle import OneshotModifier


def main(
    model: str,
    recipe: Path,
    out: Path,
    average_bits: float | None = None,
    dataset: str = "bundled",
    samples: int = 32,
    max_length: int = 512,
    seed: int = 0,
) -> None:
    """Write the checkpoint."""
    text = recipe.read_text() if average_bits is None else at_budget(recipe, average_bits, model)
    compress(model, text, dataset, samples, max_length, seed, out)


def compress(
    model: str, recipe: str, dataset: str, samples: int, max_length: int, seed: int, out: Path
) -> dict:
    """Write a checkpoint by one oneshot run.

    :param recipe: its text
    :return: ``seconds`` that the run took, and ``casp_time``: the seconds of the casp modifiers
        over those of the rest, saving included
    """
    spent = []
    initialize = OneshotModifier.on_initialize

    def timed(self, *args, **kwargs):
        start = time.perf_counter()
        try:
            return initialize(self, *args, **kwargs)
        finally:
            spent.append(time.perf_counter() - start)

    processor, batches = calibration(model, dataset, samples, max_length, seed)
    set_seed(seed)
    OneshotModifier.on_initialize = timed
    start = time.perf_counter()
    try:
        oneshot(
            model=load_model(model),
            processor=processor,
            recipe=recipe,
            dataset=batches,
            output_dir=str(out),
        )
    finally:
        OneshotModifier.on_initialize = initialize
    seconds = time.perf_counter() - start
    copy_processor(model, out)
    return {"seconds": seconds, "casp_time": sum(spent) / (seconds - sum(spent))}


def calibration(model: str, dataset: str, samples: int, max_length: int, seed: int) -> tuple:
    """Return tokenizer or processor, and calibration batches."""
    if is_multimodal(read_model_config(model)):
        processor = AutoProcessor.from_pretrained(model)
        questions = load_conversations(dataset, samples, seed=seed)
        return processor, conversation_loader(questions, processor, max_length)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = load_text(dataset, tokenizer, samples, seed=seed)
    return tokenizer, calibration_loader(texts, tokenizer, max_length)


if __name__ == "__main__":
    typer.run(main)

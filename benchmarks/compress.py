"""Compress a model by a recipe, stock ones too: what ``compare.py`` times, and ``peers.py`` runs in
a process of its own.

    python benchmarks/compress.py MODEL RECIPE OUT --dataset D
"""

import time
from pathlib import Path

import typer


def main(
    model: str,
    recipe: Path,
    out: Path,
    dataset: str = "bundled",
    samples: int = 32,
    max_length: int = 512,
    seed: int = 0,
) -> None:
    """Write the checkpoint."""
    compress(model, recipe, dataset, samples, max_length, seed, out)


def compress(model, recipe, dataset, samples, max_length, seed, out) -> dict:
    """One oneshot run; seconds in all and in the casp modifiers."""
    from llmcompressor import oneshot
    from transformers import set_seed

    from casp_plugin.checkpoint.format import copy_processor
    from casp_plugin.model.load import load_model
    from casp_plugin.modifiers import CaspModifier

    spent = []
    initialize = CaspModifier.on_initialize

    def timed(self, *args, **kwargs):
        start = time.perf_counter()
        try:
            return initialize(self, *args, **kwargs)
        finally:
            spent.append(time.perf_counter() - start)

    processor, batches = calibration(model, dataset, samples, max_length, seed)
    set_seed(seed)
    CaspModifier.on_initialize = timed
    start = time.perf_counter()
    try:
        oneshot(
            model=load_model(model),
            processor=processor,
            recipe=str(recipe),
            dataset=batches,
            output_dir=str(out),
        )
    finally:
        CaspModifier.on_initialize = initialize
    seconds = time.perf_counter() - start
    copy_processor(model, Path(out))
    return {"seconds": seconds, "casp_time": sum(spent) / (seconds - sum(spent))}


def calibration(model, dataset, samples, max_length, seed):
    """(tokenizer or processor, batches)"""
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer

    from casp_plugin.data.conversation_batches import conversation_loader
    from casp_plugin.data.conversations import load_conversations
    from casp_plugin.data.sources import load_text
    from casp_plugin.data.text_batches import calibration_loader
    from casp_plugin.model.load import is_multimodal

    if is_multimodal(AutoConfig.from_pretrained(model)):
        processor = AutoProcessor.from_pretrained(model)
        questions = load_conversations(dataset, samples, seed=seed)
        return processor, conversation_loader(questions, processor, max_length)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = load_text(dataset, tokenizer, samples, seed=seed)
    return tokenizer, calibration_loader(texts, tokenizer, max_length)


if __name__ == "__main__":
    typer.run(main)

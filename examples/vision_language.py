"""Compress a vision-language model from Python.

    python examples/vision_language.py MODEL DATA RECIPE OUT

DATA has columns image, question and answer: see README, "Vision-language models".
"""

import sys
from pathlib import Path

from llmcompressor import oneshot
from rich import print
from transformers import AutoProcessor

from casp_plugin.checkpoint.format import copy_processor
from casp_plugin.data.conversation_batches import conversation_loader
from casp_plugin.data.conversations import load_conversations
from casp_plugin.model.load import load_model
from casp_plugin.plan.tables import plan_tables

model, data, recipe, out = sys.argv[1:]
processor = AutoProcessor.from_pretrained(model)
questions = load_conversations(data, samples=256)
compressed = oneshot(
    model=load_model(model),
    processor=processor,
    dataset=conversation_loader(questions, processor, max_length=2048),
    recipe=recipe,
    output_dir=out,
)
copy_processor(model, Path(out))
print(*plan_tables(compressed.casp_plan))

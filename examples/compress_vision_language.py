"""Compress a vision-language model: 2.5 bits a weight in the language model, 4.5 in the rest.

    python examples/compress_vision_language.py [MODEL QUESTIONS OUT]

QUESTIONS is a .jsonl or .parquet file or a Hugging Face id: columns image, question and answer.
"""

import sys

from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForImageTextToText, AutoProcessor

from casp_plugin import BitAllocationModifier, LowRankQKModifier
from casp_plugin.data.conversation_batches import conversation_loader, processed
from casp_plugin.data.conversations import load_conversations

MODEL, QUESTIONS, OUT = sys.argv[1:] or ("llava-hf/llava-1.5-7b-hf", "questions.jsonl", "OUT")
SAMPLES, MAX_LENGTH = 256, 2048

model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype="auto")
processor = AutoProcessor.from_pretrained(MODEL)
questions = load_conversations(QUESTIONS, SAMPLES)
batches = conversation_loader(questions, processor, MAX_LENGTH)

budget = {"language": 2.5, "vision": 4.5, "connector": 4.5}
recipe = [
    LowRankQKModifier(),
    BitAllocationModifier(average_bits=budget, candidates=[2, 3, 4, 8], group_size=64),
    GPTQModifier(),
]
oneshot(model=model, processor=processor, dataset=batches, recipe=recipe)

prompt = processed(questions[:1], processor, answered=False).to(model.device)
print(processor.decode(model.generate(**prompt, max_new_tokens=32)[0]))

model.save_pretrained(OUT)
processor.save_pretrained(OUT)

"""Tiny vision-language models, compressed on one batch with an image."""

import torch
from llmcompressor import oneshot
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoTokenizer

from casp_plugin import BitAllocationModifier, LowRankQKModifier
from support import tiny_vlms

COMPONENTS = {
    family: ["language", "vision"] + ["connector"] * (family != "gemma3")
    for family in tiny_vlms.FAMILIES
}

#: families whose connector vLLM cannot run quantized
DENSE_CONNECTORS = {"blip-2", "llava_next_video", "paligemma"}


def batch_of(model, folder, family) -> dict:
    """Return a batch of one prompt with an image."""
    ids = torch.tensor([tiny_vlms.image_prompt(family, expanded=True)])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family.startswith("qwen"):
        batch["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    return {**batch, **tiny_vlms.image_inputs(folder, family)}


def compress(folder, family, *quantizers, **bits):
    """Compress a model of a family from ``folder/in`` to ``folder/out``.

    :param bits: fields of BitAllocationModifier
    :return: the compressed model, and its batch
    """
    tiny_vlms.save_tiny_vlm(folder / "in", family)
    model = AutoModelForImageTextToText.from_pretrained(folder / "in", dtype=torch.float32)
    batch = batch_of(model, folder / "in", family)
    defaults = {"average_bits": 5, "candidates": [2, 3, 4, 8], "group_size": 32}
    model = oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(folder / "in"),
        recipe=[LowRankQKModifier(), BitAllocationModifier(**{**defaults, **bits}), *quantizers],
        dataset=DataLoader([batch] * 4, batch_size=None),
        output_dir=str(folder / "out"),
    )
    return model, batch

"""Tiny random models in real checkpoint folders, and calibration batches for them."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    default_data_collator,
)

VOCABULARY = 96
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def save_tiny_model(folder, model_type="llama", dtype=torch.float32, **overrides):
    """A random model of a family, saved with a word-level tokenizer; returns its path."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **overrides})
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return str(folder)


def save_texts(path):
    """Eight texts of words that the tiny models know, as JSON lines."""
    rows = [{"text": " ".join(f"w{(i * 7 + j) % 90 + 3}" for j in range(24))} for i in range(8)]
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory):
    """What `casp` measures in tests is kept apart from what a developer's runs keep."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CASP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Path of a random two-layer llama in float32."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny_llama"), tie_word_embeddings=True)


@pytest.fixture
def load_tiny(tiny_llama):
    """Loads the tiny llama afresh."""
    return lambda: AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


@pytest.fixture(scope="session")
def batches():
    """Calibration batches: a DataLoader of 8 samples of 24 tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (8, 24), generator=generator)
    samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    return DataLoader(samples, batch_size=2, collate_fn=default_data_collator)

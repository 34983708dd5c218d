"""A tiny model, a compressed one, and calibration data for them.

Fixtures of a session are made once for each worker of pytest-xdist, and only read.
"""

import gc

import pytest
import torch
from support.command_line import RECIPE, casp, run_arguments
from support.samples import save_texts
from support.threads import Threads
from support.tiny_models import VOCABULARY, save_tiny_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, default_data_collator


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory):
    """Keep what `casp` measures in tests apart from what a developer's runs keep."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CASP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def imports_are_no_garbage():
    """Keep what was imported out of garbage collections, which libraries ask for again and again:
    of a second each."""
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gc, "unfreeze", lambda: None)  # which vLLM calls after each engine
        yield
    gc.unfreeze()


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


@pytest.fixture
def files(tmp_path):
    """A folder with a recipe and calibration texts."""
    return _save_files(tmp_path)


@pytest.fixture(scope="session")
def compressed_llama(tiny_llama, cache_of_its_own, tmp_path_factory):
    """Path of the tiny llama after `casp run` with the recipe of `files`."""
    folder = _save_files(tmp_path_factory.mktemp("compressed_llama"))
    result = casp(*run_arguments(tiny_llama, folder))
    assert result.exit_code == 0, result.output
    return folder / "out"


@pytest.fixture
def bench_in_threads(monkeypatch):
    """`casp bench` without processes of its own."""
    monkeypatch.setattr("casp_plugin.bench.runs.multiprocessing", Threads)


def _save_files(folder):
    (folder / "recipe.yaml").write_text(RECIPE)
    save_texts(folder / "data.jsonl")
    return folder

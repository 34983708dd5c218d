"""Engines: one model in one runtime, which answers one prompt again and again."""

import os
import time
from io import BytesIO
from typing import Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field

from casp_plugin.bench.memory import peak_memory, reset_peak_memory

__all__ = ["ENGINES", "Engine", "Round", "Workload", "answer"]


class Workload(BaseModel):
    """The request that every model answers.

    :param prompt_tokens: tokens of a prompt of random text; the processor decides the length of
        prompts with images
    :param new_tokens: tokens to generate, even past the end of the text
    :param batch_size: prompts at a time
    :param images: random images in every prompt
    :param frames: frames of one random video in every prompt, instead of images
    :param image_size: edge of an image or frame, pixels
    :param seed: seed of all random numbers
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_tokens: int = Field(512, ge=1)
    new_tokens: int = Field(128, ge=2)
    batch_size: int = Field(1, ge=1)
    images: int = Field(0, ge=0)
    frames: int = Field(0, ge=0)
    image_size: int = Field(336, ge=1)
    seed: int = 0

    def token_ids(self, vocabulary: int) -> list[list[int]]:
        """Return random prompts of text, (batch_size, prompt_tokens).

        :param vocabulary: number of tokens in the vocabulary
        """
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.batch_size, self.prompt_tokens)
        return torch.randint(vocabulary, shape, generator=generator).tolist()

    def conversation(self):
        """Return a question about random images, or about a random video."""
        from PIL import Image

        from casp_plugin.data.conversations import Conversation

        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.image_size, self.image_size, 3)
        shown = []
        for _ in range(self.frames or self.images):
            pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
            file = BytesIO()
            Image.fromarray(pixels.numpy()).save(file, "png")
            shown.append(file.getvalue())
        question = "Describe in detail what can be seen."
        return Conversation(tuple(shown), question, "", video=bool(self.frames))


class Round(BaseModel):
    """Measurements of one answer.

    :param prompt_tokens: tokens of one prompt, with those of images
    :param prefill: seconds to the first new token
    :param total: seconds to the last new token
    :param prefill_memory: peak memory until the first new token, bytes; see ``memory.py``
    :param memory: peak memory until the last new token, bytes
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_tokens: int
    prefill: float
    total: float
    prefill_memory: int
    memory: int


class Engine(Protocol):
    """A loaded model and a prompt.

    Engines are made from a model (folder or Hugging Face id), a workload and more arguments of
    the runtime.

    :param prompt_tokens: tokens of one prompt
    """

    prompt_tokens: int

    def generate(self, tokens: int) -> None:
        """Answer the prompt with exactly so many tokens."""


def answer(engine: Engine, workload: Workload) -> Round:
    """Answer the prompt with a single token and then with all; return times and peak memory."""
    reset_peak_memory()
    prefill = _timed(engine, 1)
    prefill_memory = peak_memory()
    reset_peak_memory()
    total = _timed(engine, workload.new_tokens)
    return Round(
        prompt_tokens=engine.prompt_tokens,
        prefill=prefill,
        total=total,
        prefill_memory=prefill_memory,
        memory=peak_memory(),
    )


def _timed(engine: Engine, tokens: int) -> float:
    """Return the seconds that an answer takes."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    start = time.perf_counter()
    engine.generate(tokens)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start


class TransformersEngine:
    """A model in transformers; more arguments are those of ``from_pretrained``."""

    def __init__(self, model: str, workload: Workload, **arguments):
        from transformers import AutoProcessor

        import casp_plugin  # noqa: F401  registers loading
        from casp_plugin.data.conversation_batches import processed
        from casp_plugin.model.load import load_model

        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        self.model = load_model(model, device_map=str(device), **arguments).eval()
        if workload.images or workload.frames:
            trusted = {"trust_remote_code": arguments.get("trust_remote_code", False)}
            processor = AutoProcessor.from_pretrained(model, **trusted)
            asked = [workload.conversation()] * workload.batch_size
            inputs = processed(asked, processor, answered=False)
            self.inputs = inputs.to(device, dtype=self.model.dtype)
        else:
            vocabulary = self.model.config.get_text_config().vocab_size
            ids = torch.tensor(workload.token_ids(vocabulary), device=device)
            self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.prompt_tokens = self.inputs["input_ids"].shape[1]

    @torch.no_grad()
    def generate(self, tokens: int) -> None:
        """Answer the prompt with exactly so many tokens."""
        length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        ids = self.model.generate(**self.inputs, **length, do_sample=False)
        assert ids.shape[1] - self.prompt_tokens == tokens or ids.shape[1] == tokens


class VLLMEngine:
    """A model in vLLM, in this process; more arguments are those of ``vllm.LLM``."""

    def __init__(self, model: str, workload: Workload, **arguments):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # memory is measured in this process
        from transformers import AutoConfig, AutoProcessor
        from vllm import LLM, SamplingParams

        from casp_plugin.data.conversation_batches import prompt_text

        trusted = {"trust_remote_code": arguments.get("trust_remote_code", False)}
        settings = {"seed": workload.seed, "enable_prefix_caching": False}
        if workload.images:
            settings["limit_mm_per_prompt"] = {"image": workload.images}
        self.llm = LLM(model, **{**settings, **arguments})
        self.params = SamplingParams
        if workload.images or workload.frames:
            asked = workload.conversation()
            kind = "video" if workload.frames else "image"
            processor = AutoProcessor.from_pretrained(model, **trusted)
            text = prompt_text(asked, processor, answered=False)
            prompt = {"prompt": text, "multi_modal_data": {kind: asked.decoded()}}
            self.prompts = [prompt] * workload.batch_size
        else:
            config = AutoConfig.from_pretrained(model, **trusted)
            vocabulary = config.get_text_config().vocab_size
            rows = workload.token_ids(vocabulary)
            self.prompts = [{"prompt_token_ids": row} for row in rows]
        self.prompt_tokens = 0
        self.generate(1)

    def generate(self, tokens: int) -> None:
        """Answer the prompt with exactly so many tokens."""
        params = self.params(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        answers = self.llm.generate(self.prompts, params, use_tqdm=False)
        self.prompt_tokens = len(answers[0].prompt_token_ids)
        assert all(len(answer.outputs[0].token_ids) == tokens for answer in answers)


ENGINES = {"hf": TransformersEngine, "vllm": VLLMEngine}

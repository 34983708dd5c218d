"""Scores of the models of a study: every process holds one model, whose tensors are changed, scored
and restored."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file
from torch import nn

from casp_plugin.data.conversations import Conversation
from casp_plugin.evaluation.answers import evaluate_answers
from casp_plugin.evaluation.text import evaluate
from casp_plugin.model.experts import linearize_experts
from casp_plugin.model.load import load_model
from casp_plugin.sensitivity.rounding import uniform

__all__ = ["Changes", "ScoredData", "load_linearized", "processes_of", "scorer_pool"]

#: copies of the model that a process holds at most: one to score, one to restore it from
_COPIES = 2.5


@dataclass(frozen=True)
class ScoredData:
    """Data that all models of a study are scored on: texts, or questions about images.

    :param processor: tokenizer, or processor of a vision-language model
    :param texts: texts, each scored on its own
    :param questions: questions, scored by task
    :param max_length: tokens of a window of text
    :param answers: whether models answer the questions; else only the loss of the reference answers
        is measured, which takes less time
    :param add_special_tokens: whether the tokenizer adds special tokens to texts; False for chats
    """

    processor: object
    texts: tuple[str, ...] = ()
    questions: tuple[Conversation, ...] = ()
    max_length: int = 2048
    answers: bool = True
    add_special_tokens: bool = True

    def scores(self, model: nn.Module) -> dict[str, float]:
        """Return the values of all metrics of a model, by ``task/metric``."""
        if self.texts:
            tokenizer = getattr(self.processor, "tokenizer", self.processor)
            scores = evaluate(
                model,
                tokenizer,
                self.texts,
                self.max_length,
                stride=self.max_length,
                add_special_tokens=self.add_special_tokens,
            )
            by_task = {"text": scores}
        else:
            longest = {} if self.answers else {"max_new_tokens": 0}
            by_task = evaluate_answers(model, self.processor, self.questions, **longest).by_task
        return {
            f"{task or 'answers'}/{measured.metric}": measured.value
            for task, scores in by_task.items()
            for measured in scores.measurements(task)
        }


@dataclass(frozen=True)
class Changes:
    """Changes of the original model that make a model of a study.

    :param files: files of tensors that replace the original ones
    :param names: layers to round by ``uniform``
    :param uniform_bits: width of their codes
    """

    files: tuple[Path, ...] = ()
    names: tuple[str, ...] = ()
    uniform_bits: int | None = None


class _Scorer:
    """A model whose tensors are changed and restored."""

    def __init__(self, model: str, data: ScoredData, device: str, trust_remote_code: bool):
        self.model = load_linearized(model, trust_remote_code).to(device).eval()
        self.tensors = self.model.state_dict()
        self.original = {name: tensor.cpu().clone() for name, tensor in self.tensors.items()}
        self.data = data

    @torch.no_grad()
    def score(self, changes: Changes) -> dict[str, float]:
        """Return the scores of the changed model; the original is restored."""
        changed = {}
        for file in changes.files:
            changed |= load_file(file)
        for name in changes.names:
            weight = self.original[f"{name}.weight"]
            changed[f"{name}.weight"] = uniform(weight, changes.uniform_bits)
        try:
            for name, tensor in changed.items():
                self.tensors[name].copy_(tensor)
            return self.data.scores(self.model)
        finally:
            for name in changed:
                self.tensors[name].copy_(self.original[name])


@contextmanager
def scorer_pool(
    model: str, data: ScoredData, processes: int, trust_remote_code: bool = False
) -> Iterator[Callable[[Iterable[Changes]], Iterator[dict[str, float]]]]:
    """Give a function that scores changed models and yields their scores in order.

    :param model: folder or Hugging Face id of the original model
    :param data: data that models are scored on
    :param processes: processes that score models at a time
    :param trust_remote_code: whether Python code that comes with the model may run
    """
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    if processes == 1:
        scorer = _Scorer(model, data, devices[0], trust_remote_code)
        yield partial(map, scorer.score)
        return
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for i in range(processes):
        queue.put(devices[i % len(devices)])
    threads = max(1, torch.get_num_threads() // processes)
    settings = (model, data, queue, threads, trust_remote_code)
    with ProcessPoolExecutor(processes, context, _start_worker, settings) as pool:
        yield partial(pool.map, _score_in_worker)


_scorer: _Scorer | None = None  # of a worker process


def _start_worker(
    model: str, data: ScoredData, devices, threads: int, trust_remote_code: bool
) -> None:
    """Load the model of a worker process.

    :param devices: queue of devices, one for every worker
    """
    global _scorer
    torch.set_num_threads(threads)
    _scorer = _Scorer(model, data, devices.get(), trust_remote_code)


def _score_in_worker(changes: Changes) -> dict[str, float]:
    return _scorer.score(changes)


def processes_of(wanted: int, model_bytes: int) -> int:
    """Return the number of processes that memory allows, at least one.

    :param wanted: number of processes at most
    :param model_bytes: bytes of the model's weights
    """
    process_bytes = _COPIES * model_bytes
    # one more process quantizes the weights
    spare = psutil.virtual_memory().available - process_bytes
    allowed = [wanted, int(spare // process_bytes)]
    if torch.cuda.is_available():
        free = [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]
        # a model and its activations; another model is quantized on the first device
        allowed.append(sum(int(memory // (2 * model_bytes)) for memory in free) - 1)
    return max(1, min(allowed))


def load_linearized(model: str, trust_remote_code: bool) -> nn.Module:
    """Return a model with its experts as linear layers.

    :param model: folder or Hugging Face id
    """
    loaded = load_model(model, trust_remote_code)
    linearize_experts(loaded)
    return loaded

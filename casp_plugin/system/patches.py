"""Faults of dependencies that are mended here, and every other place that changes their code.

Functions that are replaced are the records below; ``apply`` installs them. Classes that take the
place of a dependency's own under the same name are subclasses, and stand where they are used:

- ``modifiers/auto_round.py``, ``AutoRoundModifier`` (llmcompressor 0.14.0.1). Upstream looks for
  targets among the names inside a decoder layer, so that whole names, as in every plan, match none
  and all layers are tuned under the first scheme (not reported). It leaves AutoRound's zero points
  out, so that asymmetric weights are clamped to a wrong range (not reported; intel/auto-round#2273
  mended the same in AutoRound's own export). Layers of a float32 model are left in bfloat16, norms
  too (not reported): another modifier that calibrates after it stops at two dtypes.
- ``modifiers/gptq.py``, ``GPTQModifier``: no fault; it has one field more, ``correction``.
- ``checkpoint/load.py``, ``CompressedTensorsConfig`` and ``CaspHfQuantizer`` (transformers 5.17).
  Beside the factors of our own checkpoints they read what upstream leaves out without a word:
  rotations of inputs (huggingface/transformers#42887) and zero points of experts
  (huggingface/transformers#47430); and experts under several schemes, of which upstream takes the
  first (not reported).

``casp_plugin/__init__.py``, ``_import_before``, wraps functions of llm-compressor and transformers
that look up classes, so that they import ours first: no fault, importing us is quick so.

``cli/progress.py``, ``quiet``, replaces ``tqdm.__init__`` and ``tqdm.display`` while a command
runs, and puts llm-compressor's level METRIC of loguru beside INFO, for good: no fault, a choice of
display.

Methods of single objects that are replaced, for a while or for good (``kv_cache/running.py``,
``statistics/derivatives.py``, ``checkpoint/format.py``), change no dependency. Neither does
``runtime/``: it uses vLLM's own registries.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

import torch
from transformers import PreTrainedConfig

__all__ = [
    "CONFIG_ARGUMENTS",
    "PIN_MEMORY",
    "RESTORE_TORCH",
    "TRACE_SUBGRAPHS",
    "Patch",
    "apply",
]


@dataclass
class Patch:
    """A function of a dependency that a function of ours replaces.

    :param owner: module, or ``module:class``, that holds the function
    :param name: name of the function there
    :param seen_in: package and version that have the fault
    :param fault: what is wrong
    :param upstream: issue or pull request of the fault
    :ivar original: the function of the dependency, None before the patch is installed
    """

    owner: str
    name: str
    seen_in: str
    fault: str
    upstream: str
    original: Callable | None = field(default=None, init=False)

    def install(self, replacement: Callable) -> None:
        """Put a function in the place of the original, once."""
        if self.original is None:
            owner = resolve_name(self.owner)
            self.original = getattr(owner, self.name)
            setattr(owner, self.name, replacement)


PIN_MEMORY = Patch(
    owner="llmcompressor.pipelines.cache:IntermediatesCache",
    name="pin_memory",
    seen_in="llmcompressor 0.14.0.1",
    fault="AWQ pins host memory without an accelerator too, where torch raises RuntimeError",
    upstream="not reported; vllm-project/llm-compressor#2813 brought the call",
)

CONFIG_ARGUMENTS = Patch(
    owner="llmcompressor.pipelines.sequential.helpers:SequentialTracer",
    name="create_arg",
    seen_in="llmcompressor 0.14.0.1",
    fault=(
        "a config that a graph makes anew loses its attention implementation: models that make "
        "their mask by such a config (Mixtral, Qwen3-MoE) get the mask of sdpa, None for sequences "
        "without padding, beside eager attention, and are calibrated without causality"
    ),
    upstream="not reported; huggingface/transformers#46273 is about eager attention without a mask",
)

RESTORE_TORCH = Patch(
    owner="llmcompressor.pipelines.sequential.transformers_helpers:HFTracer",
    name="patch_for_tracing",
    seen_in="llmcompressor 0.14.0.1",
    fault="constructors of torch (`torch.arange`) stay replaced where tracing fails",
    upstream="not reported",
)

TRACE_SUBGRAPHS = Patch(
    owner="llmcompressor.pipelines.sequential.pipeline",
    name="trace_subgraphs",
    seen_in="llmcompressor 0.14.0.1",
    fault=(
        "linear layers below code that the tracer wraps (vision towers) belong to no subgraph, run "
        "and are never quantized; subgraphs that fail, or compute something else than the model "
        "(Gemma 4, whose layers share a dict of keys and values), are not noticed"
    ),
    upstream="not reported",
)


def apply(trace_subgraphs: Callable) -> None:
    """Install all patches, once; needs llm-compressor.

    :param trace_subgraphs: ``statistics.tracing.trace``, which needs rooms above this one
    """
    PIN_MEMORY.install(_pin_memory)
    CONFIG_ARGUMENTS.install(_create_arg)
    RESTORE_TORCH.install(_patch_for_tracing)
    TRACE_SUBGRAPHS.install(trace_subgraphs)


def _pin_memory(cache: Any, *args, **kwargs) -> None:
    """Pin host memory where there is an accelerator to copy it to."""
    if torch.accelerator.is_available():
        PIN_MEMORY.original(cache, *args, **kwargs)


def _create_arg(tracer: Any, value: Any) -> Any:
    """Let a graph make configs with the attention implementation of the original."""
    if not isinstance(value, PreTrainedConfig):
        return CONFIG_ARGUMENTS.original(tracer, value)
    values = value.to_dict() | {"attn_implementation": value._attn_implementation}
    arguments = {key: tracer.create_arg(entry) for key, entry in values.items()}
    return tracer.create_node("call_function", type(value), (), arguments)


@contextmanager
def _patch_for_tracing(tracer: Any, root: torch.nn.Module) -> Iterator[None]:
    """Replace constructors of torch while the tracer runs, and restore them if it fails too."""
    steps = RESTORE_TORCH.original.__wrapped__(tracer, root)
    next(steps)
    try:
        yield
    finally:
        next(steps, None)

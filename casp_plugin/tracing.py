"""Models in parts that run one after another, as llm-compressor's sequential pipeline has them.

Vision towers take part in that too: its tracer wraps what it cannot trace, in multimodal models
whatever stands below ``if pixel_values is not None``: the linear layers in there run and are
observed, but belong to no subgraph, so that they are never quantized. Here the first subgraph,
which runs before the language model's layers, has them. Where no such line stands (BLIP-2), what
makes the features of images is wrapped by its name.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from compressed_tensors.quantization.utils import is_module_quantized
from llmcompressor.args import DatasetArguments
from llmcompressor.pipelines.sequential import helpers, pipeline
from llmcompressor.pipelines.sequential.helpers import SequentialTracer, Subgraph, trace_subgraphs
from llmcompressor.pipelines.sequential.transformers_helpers import HFTracer
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from torch import nn
from torch.fx.proxy import Argument
from transformers import PreTrainedConfig, PreTrainedModel

from casp_plugin.models import is_multimodal

__all__ = ["check_traceable", "register", "subgraphs_of"]


@dataclass
class _WithWrapped(Subgraph):
    """A subgraph that also answers for modules inside the functions it calls."""

    wrapped: list[nn.Module] = field(default_factory=list)

    def submodules(self, model: nn.Module, recurse: bool = True) -> list[nn.Module]:
        return super().submodules(model, recurse) + self.wrapped


#: what transformers calls the methods that run a tower and its connector
_FEATURES = ["get_image_features", "get_video_features", "get_audio_features"]


def check_traceable(model: PreTrainedModel, dataloader: Iterable[dict]) -> None:
    """Meet now what llm-compressor would meet after the statistics, by oneshot's defaults.

    :raises ValueError: if a multimodal model cannot be traced
    """
    if is_multimodal(model.config):
        subgraphs_of(model, dataloader)


def subgraphs_of(model: PreTrainedModel, dataloader: Iterable[dict]) -> list[Subgraph]:
    """What runs before the first decoder layer, then each with what follows it, by oneshot's
    defaults; nothing for no data.

    :raises ValueError: if the model cannot be traced
    """
    with torch.random.fork_rng(devices=[]):  # asking for a batch changes nothing that comes after
        sample = next(iter(dataloader), None)
    if sample is None:
        return []
    ignore = DatasetArguments().tracing_ignore
    return _trace(model, sample, infer_sequential_targets(model), ignore)


def _trace(
    model: nn.Module, sample: dict, targets: list[str], ignore: list[str], *args
) -> list[Subgraph]:
    """
    :raises ValueError: if the model cannot be traced
    """
    try:
        subgraphs = trace_subgraphs(model, sample, targets, ignore + _FEATURES, *args)
    except Exception as error:  # whatever its code meets when it runs without values
        why = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ValueError(
            f"{type(model).__name__} cannot be traced ({why}): name the method that cannot in "
            "oneshot(tracing_ignore=[...]), or calibrate the model as a whole by "
            "oneshot(pipeline='basic')"
        ) from error
    held = {module for subgraph in subgraphs for module in subgraph.submodules(model)}
    wrapped = [m for m in model.modules() if is_module_quantized(m) and m not in held]
    if wrapped:
        values = {each.name: getattr(subgraphs[0], each.name) for each in fields(Subgraph)}
        subgraphs[0] = _WithWrapped(**values, wrapped=wrapped)
    return subgraphs


class _Tracer(SequentialTracer):
    """Configs that a graph makes anew keep their attention implementation. llm-compressor 0.14
    leaves it out, so that models which make their mask by such a config (Mixtral, Qwen3-MoE) get
    that of sdpa, none at all for sequences without padding, beside eager attention: they would be
    calibrated without causality."""

    def create_arg(self, a: Any) -> Argument:
        if not isinstance(a, PreTrainedConfig):
            return super().create_arg(a)
        values = a.to_dict() | {"attn_implementation": a._attn_implementation}
        arguments = {key: self.create_arg(value) for key, value in values.items()}
        return self.create_node("call_function", type(a), (), arguments)


_patching = HFTracer.patch_for_tracing.__wrapped__


@contextmanager
def _patch_for_tracing(self: HFTracer, root: nn.Module) -> Iterator[None]:
    """Functions of torch as the tracer wants them; as they were again also where tracing fails,
    which llm-compressor 0.14 leaves out."""
    steps = _patching(self, root)
    next(steps)
    try:
        yield
    finally:
        next(steps, None)


def register() -> None:
    """Let the sequential pipeline of llm-compressor trace by the functions above."""
    pipeline.trace_subgraphs = _trace
    helpers.SequentialTracer = _Tracer
    HFTracer.patch_for_tracing = _patch_for_tracing

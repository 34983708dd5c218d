"""Models in parts that run one after another, as llm-compressor's sequential pipeline has them.

Vision towers take part in that too: its tracer wraps what it cannot trace, in multimodal models
whatever stands below ``if pixel_values is not None``: the linear layers in there run and are
observed, but belong to no subgraph, so that they are never quantized. Here the first subgraph,
which runs before the language model's layers, has them. Where no such line stands (BLIP-2), what
makes the features of images is wrapped by its name.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from compressed_tensors.quantization.utils import is_module_quantized
from llmcompressor.args import DatasetArguments
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.sequential import helpers, pipeline
from llmcompressor.pipelines.sequential.helpers import SequentialTracer, Subgraph, trace_subgraphs
from llmcompressor.pipelines.sequential.transformers_helpers import HFTracer
from llmcompressor.utils.helpers import calibration_forward_context
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from loguru import logger
from torch import nn
from torch.fx import Graph
from torch.fx.proxy import Argument
from transformers import PreTrainedConfig, PreTrainedModel

from casp_plugin.model.load import is_multimodal
from casp_plugin.model.low_rank_linear import named_linears
from casp_plugin.model.units import decoder_layers
from casp_plugin.system.messages import one_line

__all__ = ["check_traceable", "register", "subgraphs_of", "whole_model"]


@dataclass
class _Whole(Subgraph):
    """The model as the only subgraph."""

    def forward(self, model: nn.Module, **batch) -> dict:
        model(**batch)
        return {}

    def submodules(self, model: nn.Module, recurse: bool = True) -> list[nn.Module]:
        return list(model.modules())


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


def whole_model(names: set[str] | None = None) -> Subgraph:
    """Return the model as its only part.

    :param names: arguments that batches hold; None for whatever they hold
    """
    return _Whole(Graph(), names, set())


def _trace(
    model: nn.Module, sample: dict, targets: list[str], ignore: list[str], *args
) -> list[Subgraph]:
    """Parts of a model; the whole of it where it has none, or where they do something else.

    :raises ValueError: if a multimodal model cannot be traced
    """
    try:
        subgraphs = trace_subgraphs(model, sample, targets, ignore + _FEATURES, *args)
    except Exception as error:  # whatever its code meets when it runs without values
        why = (str(error).strip() or type(error).__name__).splitlines()[-1]
        if is_multimodal(model.config):
            raise ValueError(
                f"{type(model).__name__} cannot be traced ({why}): name the method that cannot in "
                "oneshot(tracing_ignore=[...]), or calibrate the model as a whole: --pipeline "
                "basic, oneshot(pipeline='basic')"
            ) from error
        return _whole(model, sample, f"cannot be traced: {why}")
    linears = {module for _, module in named_linears(model)}
    held = {module for subgraph in subgraphs for module in subgraph.submodules(model)}
    wrapped = [m for m in model.modules() if is_module_quantized(m) and m not in held]
    if wrapped:
        values = {each.name: getattr(subgraphs[0], each.name) for each in fields(Subgraph)}
        subgraphs[0] = _WithWrapped(**values, wrapped=wrapped)
    runs = Counter(m for graph in subgraphs for m in {*graph.submodules(model)} & linears)
    if runs and max(runs.values()) > 1:  # quantized after the first, not observed any more
        return _whole(model, sample, "it runs layers more than once")
    if why := _other_result(model, sample, subgraphs):
        return _whole(model, sample, why)
    return subgraphs


def _whole(model: nn.Module, sample: dict, why: str) -> list[Subgraph]:
    logger.warning(f"{type(model).__name__} runs as a whole, not part by part: {why}")
    return [whole_model({*sample})]


def _other_result(model: nn.Module, sample: dict, subgraphs: list[Subgraph]) -> str | None:
    """Why parts, run one after another as the pipeline runs them, do not do what the model does;
    None where they do. A model may change a value that parts get copies of (Gemma 4)."""
    layers = decoder_layers(model)
    if not layers:
        return None
    runs: list[list[torch.Tensor]] = [[]]

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        runs[-1].append(output[0] if isinstance(output, tuple | list) else output)

    device = next(model.parameters()).device
    handle = model.get_submodule(layers[-1]).register_forward_hook(keep)
    try:
        with calibration_forward_context(model), HooksMixin.disable_hooks():
            waiting = IntermediatesCache.from_dataloader([sample], device)
            model(**waiting.fetch(0))
            runs.append([])
            for graph in subgraphs:
                outputs = graph.forward(model, **waiting.fetch(0, graph.input_names))
                if graph is not subgraphs[-1]:
                    waiting.update(0, outputs)
                    waiting.delete(0, graph.consumed_names)
    except Exception as error:  # whatever its code meets when values were copied
        return f"{type(error).__name__}: {one_line(error)[:200]}"
    finally:
        handle.remove()
    whole, parts = runs
    alike = len(whole) == len(parts) and all(
        torch.allclose(one.float(), other.float(), rtol=1e-2, atol=1e-2, equal_nan=True)
        for one, other in zip(whole, parts, strict=True)
    )
    return None if alike else f"{layers[-1]} puts out something else then"


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

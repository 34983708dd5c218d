"""Split a model into subgraphs that run one after another, for llm-compressor's sequential
pipeline.

Its tracer wraps code that it cannot trace; in multimodal models that is all code below
``if pixel_values is not None``. Linear layers in there run and are observed, but belong to no
subgraph, so that they are never quantized. Here they belong to the first subgraph, which runs
before the decoder layers. In models without such a line (BLIP-2), the method that computes the
features of images is wrapped by its name.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from compressed_tensors.quantization.utils import is_module_quantized
from llmcompressor.args import DatasetArguments
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.sequential.helpers import Subgraph, trace_subgraphs
from llmcompressor.utils.helpers import calibration_forward_context
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from loguru import logger
from torch import nn
from torch.fx import Graph
from transformers import PreTrainedModel

from casp_plugin.model.load import is_multimodal
from casp_plugin.model.low_rank_linear import named_linears
from casp_plugin.model.units import decoder_layers
from casp_plugin.system.messages import one_line

__all__ = ["check_traceable", "subgraphs_of", "trace", "whole_model"]


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
    """A subgraph together with the modules below the code that the tracer wraps."""

    wrapped: list[nn.Module] = field(default_factory=list)

    def submodules(self, model: nn.Module, recurse: bool = True) -> list[nn.Module]:
        return super().submodules(model, recurse) + self.wrapped


#: methods of transformers that run a tower and its connector
_FEATURES = ["get_image_features", "get_video_features", "get_audio_features"]


def check_traceable(model: PreTrainedModel, dataloader: Iterable[dict]) -> None:
    """Raise before the statistics the error that llm-compressor would raise after them.

    :raises ValueError: if a multimodal model cannot be traced
    """
    if is_multimodal(model.config):
        subgraphs_of(model, dataloader)


def subgraphs_of(model: PreTrainedModel, dataloader: Iterable[dict]) -> list[Subgraph]:
    """Return the subgraphs that a model has by oneshot's defaults: the code before the first
    decoder layer, then every decoder layer with the code that follows it; none without data.

    :raises ValueError: if a multimodal model cannot be traced
    """
    with torch.random.fork_rng(devices=[]):  # asking for a batch changes nothing that comes after
        sample = next(iter(dataloader), None)
    if sample is None:
        return []
    ignore = DatasetArguments().tracing_ignore
    return trace(model, sample, infer_sequential_targets(model), ignore)


def whole_model(names: set[str] | None = None) -> Subgraph:
    """Return the model as its only subgraph.

    :param names: arguments that batches hold; None for any
    """
    return _Whole(Graph(), names, set())


def trace(
    model: nn.Module, sample: dict, targets: list[str], ignore: list[str], *args
) -> list[Subgraph]:
    """Return the subgraphs of a model; the model as its only one where it cannot be traced, runs
    layers more than once, or computes something else in subgraphs.

    It takes the place of llm-compressor's ``trace_subgraphs``, whose arguments it has, see
    ``system.patches``.

    :raises ValueError: if a multimodal model cannot be traced
    """
    try:
        subgraphs = trace_subgraphs(model, sample, targets, ignore + _FEATURES, *args)
    except Exception as error:  # of the model's code, which runs without values
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
        subgraphs[0] = _WithWrapped(**vars(subgraphs[0]), wrapped=wrapped)
    runs = Counter(m for graph in subgraphs for m in {*graph.submodules(model)} & linears)
    if runs and max(runs.values()) > 1:  # quantized after the first run, not observed in the next
        return _whole(model, sample, "it runs layers more than once")
    if why := _other_result(model, sample, subgraphs):
        return _whole(model, sample, why)
    return subgraphs


def _whole(model: nn.Module, sample: dict, why: str) -> list[Subgraph]:
    logger.warning(f"{type(model).__name__} runs as a whole, not part by part: {why}")
    return [whole_model({*sample})]


def _other_result(model: nn.Module, sample: dict, subgraphs: list[Subgraph]) -> str | None:
    """Return why the subgraphs, run one after another as the pipeline runs them, do not compute the
    result of the model; None where they do. Subgraphs get copies of values, which some models
    change in place (Gemma 4)."""
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
    except Exception as error:  # of the model's code, which runs with copies of values
        return f"{type(error).__name__}: {one_line(error)[:200]}"
    finally:
        handle.remove()
    whole, split = runs
    alike = len(whole) == len(split) and all(
        torch.allclose(expected.float(), output.float(), rtol=1e-2, atol=1e-2, equal_nan=True)
        for expected, output in zip(whole, split, strict=True)
    )
    return None if alike else f"{layers[-1]} puts out something else then"

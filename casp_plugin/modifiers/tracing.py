"""Vision towers take part in llm-compressor's sequential calibration.

Its tracer wraps what it cannot trace, in multimodal models whatever stands below
``if pixel_values is not None``: the linear layers in there run and are observed, but belong to no
subgraph, so that they are never quantized. Here the first subgraph, which runs before the language
model's layers, has them. Where no such line stands (BLIP-2), what makes the features of images is
wrapped by its name.
"""

from dataclasses import dataclass, field, fields

from compressed_tensors.quantization.utils import is_module_quantized
from llmcompressor.pipelines.sequential import pipeline
from llmcompressor.pipelines.sequential.helpers import Subgraph, trace_subgraphs
from torch import nn

__all__ = ["register"]


@dataclass
class _WithWrapped(Subgraph):
    """A subgraph that also answers for modules inside the functions it calls."""

    wrapped: list[nn.Module] = field(default_factory=list)

    def submodules(self, model: nn.Module, recurse: bool = True) -> list[nn.Module]:
        return super().submodules(model, recurse) + self.wrapped


#: what transformers calls the methods that run a tower and its connector
_FEATURES = ["get_image_features", "get_video_features", "get_audio_features"]


def _trace(
    model: nn.Module, sample: dict, targets: list[str], ignore: list[str], *args
) -> list[Subgraph]:
    subgraphs = trace_subgraphs(model, sample, targets, ignore + _FEATURES, *args)
    held = {module for subgraph in subgraphs for module in subgraph.submodules(model)}
    wrapped = [m for m in model.modules() if is_module_quantized(m) and m not in held]
    if wrapped:
        values = {each.name: getattr(subgraphs[0], each.name) for each in fields(Subgraph)}
        subgraphs[0] = _WithWrapped(**values, wrapped=wrapped)
    return subgraphs


def register() -> None:
    """Let the sequential pipeline of llm-compressor trace by the function above."""
    pipeline.trace_subgraphs = _trace

"""Statistics from forward passes over the calibration data, collected layer by layer.

The model runs one decoder layer after the other, each over all the data, like llm-compressor's
sequential pipeline: activations wait off the device, and a layer's sums are handed on before the
next layer runs. ``collector`` has the hooks; the maths on these tensors lives in ``maths.low_rank``
and ``maths.errors``.

Shapes: B sequences of a batch, T tokens of a sequence.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from compressed_tensors.offload import disable_offloading
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.sequential.helpers import Subgraph
from llmcompressor.utils.helpers import (
    disable_cache,
    disable_hf_kernels,
    disable_lm_head,
    eval_context,
    use_eager_attention,
)
from llmcompressor.utils.transformers import get_embeddings
from loguru import logger
from torch import nn
from tqdm import tqdm

from casp_plugin.model.low_rank_linear import named_linears
from casp_plugin.model.units import decoder_layers
from casp_plugin.statistics.attention_maps import AttentionDensities
from casp_plugin.statistics.collector import Collector
from casp_plugin.statistics.derivatives import AttentionDerivatives, LossGradients
from casp_plugin.statistics.hooks import TokenMean, check_tokens, image_mask, token_mask
from casp_plugin.statistics.statistics import Request, Statistics
from casp_plugin.statistics.tracing import whole_model
from casp_plugin.system.distributed import gathered, number_of_ranks
from casp_plugin.system.machine import trim_memory

__all__ = [
    "SectionStatistics",
    "calibrating",
    "collect",
    "collect_derivatives",
    "collect_sections",
    "derivative_parts",
    "tokens_needed",
]

#: least number of sequences, of tokens, and of tokens by column of the widest input
SAMPLES, TOKENS, TOKENS_BY_COLUMN = 16, 8192, 5
#: bytes of sums that complete a section: several layers of a tiny model, one of any other
SECTION_BYTES = 2**23
#: bytes of second moments of gradients that are summed up in one pass
DERIVATIVE_BYTES = 2**33


@dataclass(frozen=True)
class SectionStatistics:
    """Statistics of one section of a model, layers that run one after another.

    :param statistics: of the section's layers
    :param end: number of subgraphs of the model that have run
    :param last: whether the whole model has run
    """

    statistics: Statistics
    end: int
    last: bool


def collect(
    model: nn.Module, dataloader: Iterable[dict], request: Request, subgraphs: list[Subgraph] = ()
) -> Statistics:
    """Return all requested statistics of the whole model; see :func:`collect_sections`."""
    sections = list(collect_sections(model, dataloader, request, subgraphs))
    statistics = collect_derivatives(model, dataloader, request)
    for section in sections:
        statistics |= section.statistics
    return statistics


def collect_derivatives(
    model: nn.Module, dataloader: Iterable[dict], request: Request
) -> Statistics:
    """Collect derivatives and densities of attention maps, in passes over a few sequences.

    :param model: the model, on any device
    :param dataloader: batches, keyword arguments of the model
    :param request: the requested statistics; others are ignored
    """
    asked = request.gradients, request.gradient_moments, request.gradient_tokens
    gradients = LossGradients(*asked)
    attention = AttentionDerivatives(request.attention_moments)
    maps = AttentionDensities(request.attention_maps)
    layers = decoder_layers(model)
    with calibrating(model):
        # first, because a model may fail there and nowhere else
        if request.gradients or request.gradient_moments:
            gradients.collect(model, dataloader, layers)
        if request.attention_moments:
            attention.collect(model, dataloader, layers)
        if request.attention_maps:
            maps.collect(model, dataloader)
            trim_memory()
    return Statistics(
        gradient_squares=_finished(gradients.squares),
        gradient_moments=_finished(gradients.moments),
        attention_moments=_finished(attention.moments),
        attention_densities=maps.densities,
    )


def derivative_parts(model: nn.Module, request: Request) -> list[Request]:
    """Return parts of a request whose second moments of gradients fit in memory together.

    Each takes a pass forward and backward of its own. All else is in the first part.
    """
    linears = dict(named_linears(model))
    groups: list[list[str]] = [[]]
    entries = 0
    for name in linears:  # in the order of the model
        if name in request.gradient_moments:
            entries += linears[name].out_features ** 2
            if 4 * entries > DERIVATIVE_BYTES and groups[-1]:
                groups.append([])
                entries = linears[name].out_features ** 2
            groups[-1].append(name)
    first, *others = map(frozenset, groups)
    tokens = request.gradient_tokens
    parts = (Request(gradient_moments=names, gradient_tokens=tokens) for names in others)
    return [replace(request, gradient_moments=first), *parts]


def collect_sections(
    model: nn.Module,
    dataloader: Iterable[dict],
    request: Request,
    subgraphs: list[Subgraph] = (),
    after: int = 0,
) -> Iterator[SectionStatistics]:
    """Run calibration data through the model, and yield the requested statistics section by
    section.

    Of much data some batches do, evenly spread: see :func:`tokens_needed`. Modules that no token
    reaches (a dead expert) are absent from the result.

    :param model: the model, on any device
    :param dataloader: batches, keyword arguments of the model
    :param request: the requested statistics; derivatives and maps are ignored
    :param subgraphs: subgraphs of the model, in order; none to run it as a whole
    :param after: number of subgraphs that run first without being measured
    :raises ValueError: if the dataloader is empty, on any rank, or values are not finite
    """
    device = next(model.parameters()).device
    batches = _Batches(model, device, request)
    waiting = IntermediatesCache.from_dataloader(batches.chosen(dataloader), device)
    tokens = gathered(batches.tokens)
    if not any(tokens):
        raise ValueError("the calibration dataset is empty: pass at least one sample of text")
    if not all(tokens):
        raise ValueError(
            f"{len(tokens)} processes calibrate together, but {tokens.count(0)} of them got no "
            "data: pass more samples, or start fewer"
        )
    batches.tokens = sum(tokens)
    batches.warn()
    graphs = list(subgraphs) or [whole_model()]
    head = get_embeddings(model)[1]
    head_requested = any(model.get_submodule(name) is head for name in request.linears)
    collector = Collector(request, device)
    for index, graph in enumerate(graphs):
        last = index == len(graphs) - 1
        if last and index < after:
            return
        with ExitStack() as stack:
            stack.enter_context(calibrating(model))
            stack.enter_context(torch.no_grad())
            if subgraphs:  # traced with eager attention
                stack.enter_context(use_eager_attention(model))
            stack.enter_context(nullcontext() if head_requested else disable_lm_head(model))
            stack.enter_context(disable_offloading())  # weights stay until all data has run
            if index >= after:
                stack.enter_context(collector.attached(model))
            action = "Measuring" if index >= after else "Running"
            inputs = waiting.iter(graph.input_names)
            desc = f"({index + 1}/{len(graphs)}): {action}"
            for number, batch in enumerate(tqdm(inputs, desc=desc, total=len(batches.masks))):
                collector.mask, collector.weights = batches.masks[number], batches.weights[number]
                outputs = graph.forward(model, **batch)
                if not last:
                    waiting.update(number, outputs)
                    waiting.delete(number, graph.consumed_names)
        trim_memory()
        if last or max(gathered(collector.bytes)) >= SECTION_BYTES:
            yield SectionStatistics(collector.take(batches.tokens), index + 1, last)


def tokens_needed(model: nn.Module, request: Request) -> int:
    """Return the number of tokens that the requested statistics take, of all ranks together.

    A second moment of C channels settles with the number of tokens by channel.
    """
    columns = [model.get_submodule(name).in_features for name in request.second_moments]
    return max(TOKENS, TOKENS_BY_COLUMN * max(columns, default=0))


class _Batches:
    """Masks and token weights of the batches that run, kept when their token ids are gone.

    :param device: device of masks and weights
    :param request: the requested statistics
    """

    def __init__(self, model: nn.Module, device: torch.device, request: Request):
        self.tokens = 0
        self.masks: list[torch.Tensor | None] = []
        self.weights: list[torch.Tensor | None] = []
        self._model = model
        self._device = device
        self._image_weight = request.image_weight
        self._images = False
        self._needed = tokens_needed(model, request)

    def chosen(self, dataloader: Iterable[dict]) -> Iterator[dict]:
        """Yield batches with enough sequences and tokens, evenly spread over the data, and keep
        their masks and weights.

        All batches are checked and counted: the quantizer will read them. With several ranks, each
        gives its part.
        """
        sequences = 0
        for batch in dataloader:
            check_tokens(batch, self._model)
            self._images = self._images or self._token_weights(batch) is not None
            if "input_ids" in batch:
                mask = token_mask(batch)
                sequences += len(batch["input_ids"])
                self.tokens += batch["input_ids"].numel() if mask is None else int(mask.sum())
        ranks = number_of_ranks()
        wanted = (SAMPLES / ranks / max(sequences, 1), self._needed / ranks / max(self.tokens, 1))
        share = min(1.0, max(wanted))
        for number, batch in enumerate(dataloader):
            if math.floor((number + 1) * share) == math.floor(number * share):
                continue
            mask, weights = token_mask(batch), self._token_weights(batch)
            self.masks.append(mask if mask is None else mask.to(self._device))
            self.weights.append(weights if weights is None else weights.to(self._device))
            yield batch

    def warn(self) -> None:
        """Warn where ``image_weight`` is set and no token stands for an image."""
        if self._image_weight not in (None, 1) and not self._images:
            logger.warning("image_weight changes nothing: no token of the data stands for an image")

    def _token_weights(self, batch: dict) -> torch.Tensor | None:
        """Return the weights of tokens, shape (B, T), float32; None where all are 1."""
        if self._image_weight in (None, 1):
            return None
        images = image_mask(batch, self._model)
        return None if images is None else torch.where(images, self._image_weight, 1.0)


@contextmanager
def calibrating(model: nn.Module):
    """Put a model into the state in which calibration runs it."""
    with disable_cache(model), eval_context(model), disable_hf_kernels(model):
        yield


def _finished(means: dict[str, TokenMean]) -> dict[str, torch.Tensor]:
    """Return the means that have tokens."""
    return {name: mean.finish() for name, mean in means.items() if mean.tokens}

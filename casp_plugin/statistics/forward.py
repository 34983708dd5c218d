"""Collecting statistics from forward passes over the calibration data, layer by layer.

The model runs one decoder layer after the other, each over all the data, as llm-compressor's
sequential pipeline has it: activations wait off the device, and what was summed up in a layer is
handed on before the next one runs. Hooks only; the maths that reads these tensors lives in
``lowrank`` and ``importance``.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from compressed_tensors.offload import disable_offloading
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_linearized_moes
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

from casp_plugin.maths.errors import token_influence
from casp_plugin.model.transforms import rotate
from casp_plugin.model.units import decoder_layers
from casp_plugin.statistics.attention_maps import AttentionDensities
from casp_plugin.statistics.derivatives import AttentionDerivatives, LossGradients
from casp_plugin.statistics.hooks import (
    Hooks,
    TokenMean,
    add_ranks,
    by_token,
    check_tokens,
    image_mask,
    token_mask,
    tokens_of,
)
from casp_plugin.statistics.statistics import Request, Statistics
from casp_plugin.statistics.tracing import whole_model
from casp_plugin.system.distributed import gathered
from casp_plugin.system.machine import trim_memory

__all__ = ["Part", "calibrating", "collect", "collect_derivatives", "collect_parts"]

#: bytes of sums that make a part: several layers of a tiny model, one of any other
PART_BYTES = 2**23


@dataclass(frozen=True)
class Part:
    """Statistics of the layers that run one after another.

    :param end: subgraphs that have run by then
    :param last: whether the model has run as a whole
    """

    statistics: Statistics
    end: int
    last: bool


def collect(
    model: nn.Module, dataloader: Iterable[dict], request: Request, subgraphs: list[Subgraph] = ()
) -> Statistics:
    """All that is requested, of the whole model at once; see :func:`collect_parts`."""
    parts = list(collect_parts(model, dataloader, request, subgraphs))
    found = collect_derivatives(model, dataloader, request)
    for part in parts:
        found |= part.statistics
    return found


def collect_derivatives(
    model: nn.Module, dataloader: Iterable[dict], request: Request
) -> Statistics:
    """What takes passes of its own over a few sequences: derivatives and attention maps.

    :param model: the model, on whatever device it lives
    :param dataloader: batches of model keyword arguments
    :param request: what to measure
    """
    gradients = LossGradients(request.gradients, request.gradient_moments)
    attention = AttentionDerivatives(request.attention_moments)
    maps = AttentionDensities(request.attention_maps)
    layers = decoder_layers(model)
    with calibrating(model):
        if request.attention_maps:
            maps.collect(model, dataloader)
            trim_memory()
        if request.attention_moments:
            attention.collect(model, dataloader, layers)
        if request.gradients or request.gradient_moments:
            gradients.collect(model, dataloader, layers)
    return Statistics(
        gradient_squares=_values(gradients.squares),
        gradient_moments=_values(gradients.moments),
        attention_moments=_values(attention.moments),
        attention_densities=maps.densities,
    )


def collect_parts(
    model: nn.Module,
    dataloader: Iterable[dict],
    request: Request,
    subgraphs: list[Subgraph] = (),
    after: int = 0,
) -> Iterator[Part]:
    """Run the calibration data through the model and measure what was requested of each layer.

    Modules that no token reaches (a dead expert) are absent from the result.

    :param model: the model, on whatever device it lives
    :param dataloader: batches of model keyword arguments
    :param request: what to measure; derivatives and maps are not done here
    :param subgraphs: of the model, in turn; none to run it as a whole
    :param after: subgraphs that run without being measured
    :raises ValueError: if the dataloader is empty
    """
    device = next(model.parameters()).device
    batches = _Batches(model, device, request.image_weight)
    waiting = IntermediatesCache.from_dataloader(batches.watched(dataloader), device)
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
    asked = any(model.get_submodule(name) is head for name in request.linears)
    collector = _Collector(request, device)
    for index, graph in enumerate(graphs):
        last = index == len(graphs) - 1
        if last and index < after:
            return
        with ExitStack() as stack:
            stack.enter_context(calibrating(model))
            stack.enter_context(torch.no_grad())
            if subgraphs:  # were traced so
                stack.enter_context(use_eager_attention(model))
            stack.enter_context(nullcontext() if asked else disable_lm_head(model))
            stack.enter_context(disable_offloading())  # weights stay until all data has run
            if index >= after:
                stack.enter_context(collector.attached(model))
            what = "Measuring" if index >= after else "Running"
            inputs = waiting.iter(graph.input_names)
            desc = f"({index + 1}/{len(graphs)}): {what}"
            for number, batch in enumerate(tqdm(inputs, desc=desc, total=len(batches.masks))):
                collector.mask, collector.weights = batches.masks[number], batches.weights[number]
                outputs = graph.forward(model, **batch)
                if not last:
                    waiting.update(number, outputs)
                    waiting.delete(number, graph.consumed_names)
        trim_memory()
        if last or max(gathered(collector.bytes)) >= PART_BYTES:
            yield Part(collector.take(batches.tokens), index + 1, last)


class _Batches:
    """What must be known of batches after their ids are gone.

    :param device: where it is wanted
    :param image_weight: what a token that stands for an image counts
    """

    def __init__(self, model: nn.Module, device: torch.device, image_weight: float | None):
        self.tokens = 0
        self.masks: list[torch.Tensor | None] = []
        self.weights: list[torch.Tensor | None] = []
        self._model = model
        self._device = device
        self._image_weight = image_weight

    def watched(self, dataloader: Iterable[dict]) -> Iterator[dict]:
        """The batches, as they go by."""
        for batch in dataloader:
            check_tokens(batch, self._model)
            mask, weights = token_mask(batch), self._token_weights(batch)
            if "input_ids" in batch:
                self.tokens += batch["input_ids"].numel() if mask is None else int(mask.sum())
            self.masks.append(mask if mask is None else mask.to(self._device))
            self.weights.append(weights if weights is None else weights.to(self._device))
            yield batch

    def warn(self) -> None:
        if self._image_weight not in (None, 1) and all(each is None for each in self.weights):
            logger.warning("image_weight changes nothing: no token of the data stands for an image")

    def _token_weights(self, batch: dict) -> torch.Tensor | None:
        """Weights of the tokens, (batch, tokens), float32; None where all are 1."""
        if self._image_weight in (None, 1):
            return None
        images = image_mask(batch, self._model)
        return None if images is None else torch.where(images, self._image_weight, 1.0)


class _Collector:
    """Accumulates a request over forward passes, by hooks."""

    def __init__(self, request: Request, device: torch.device):
        self.request = request
        self._device = device
        self.mask: torch.Tensor | None = None
        self.weights: torch.Tensor | None = None
        self._blocks = dict(request.mean_squares)
        self._begin()

    def _begin(self) -> None:
        self.moments: dict[str, TokenMean] = {}
        self.squares: dict[tuple[str, int], TokenMean] = {}
        self.outputs: dict[str, TokenMean] = {}
        self.influences: dict[str, TokenMean] = {}
        self.routed: dict[str, TokenMean] = {}
        # q, k and v read the very same tensor, and so do all experts of a layer: the first of them
        # names it, the first that wants a sum over it makes it
        self._owner: dict[str, str] = {}
        self._summing: dict = {}
        self._inputs: dict[int, tuple[weakref.ref, str]] = {}

    @property
    def bytes(self) -> int:
        """Of the sums so far."""
        means = (*self.moments.values(), *self.squares.values())
        return sum(mean.total.nbytes for mean in means)

    def _reader(self, inputs: torch.Tensor, name: str) -> str:
        """The layer that was the first to read a tensor."""
        alive, first = self._inputs.get(id(inputs), (None, None))
        if alive is not None and alive() is inputs:
            return first
        self._inputs[id(inputs)] = weakref.ref(inputs), name
        return name

    def _sums(self, key, name: str) -> bool:
        """Whether this layer sums something up for all that read the same input."""
        return self._summing.setdefault(key, name) == name

    def _weighted(self, values: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Activations as (tokens, channels), each times the root of its token's weight, and the sum
        of the weights."""
        x = tokens_of(values.detach(), self.mask).float()
        if self.weights is None or not by_token(values, self.weights):  # all count the same
            return x, len(x)
        weights = tokens_of(self.weights[..., None], self.mask)
        return x * weights.sqrt(), weights.sum().item()

    def on_linear(self, name: str):
        def hook(module: nn.Linear, args: tuple, output: torch.Tensor):
            inputs = args[0]
            if name not in self._owner:
                self._owner[name] = self._reader(inputs, name)
            owner = self._owner[name]
            wanted = self.request
            block = self._blocks.get(name)
            moment = name in wanted.second_moments and self._sums(owner, name)
            squares = block is not None and self._sums((owner, block), name)
            if moment or squares:
                x, n = self._weighted(inputs)
                if moment:
                    self.moments.setdefault(owner, TokenMean()).add_products(x, n)
                if squares:
                    mean = self.squares.setdefault((owner, block), TokenMean())
                    mean.add(rotate(x, block).square().sum(0), n)
            if name in wanted.energies:
                output = output if module.bias is None else output.float() - module.bias
                y, n = self._weighted(output)
                self.outputs.setdefault(name, TokenMean()).add(y.square().sum(), n)

        return hook

    def on_layer(self, name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output):
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            values = token_influence(before.detach(), after.detach())[..., None]
            values = tokens_of(values, self.mask)
            self.influences.setdefault(name, TokenMean()).add(values.double().sum(), len(values))

        return hook

    def on_experts(self, name: str):
        def hook(experts: LinearExperts2D, args: tuple, kwargs: dict) -> None:
            chosen = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
            if chosen is None:  # Llama 4 hands every expert its own tokens
                return
            chosen = tokens_of(chosen, self.mask)
            counts = chosen.flatten().bincount(minlength=len(experts))
            self.routed.setdefault(name, TokenMean()).add(counts.double(), len(chosen))

        return hook

    @contextmanager
    def attached(self, model: nn.Module):
        """Watch forward passes."""
        with Hooks(model) as hooks:
            for name, _ in get_linearized_moes(model) if self.request.routed else ():
                hooks.add_before(name, self.on_experts(name))
            for name in self.request.linears:
                hooks.add(name, self.on_linear(name))
            for name in self.request.influences:
                hooks.add(name, self.on_layer(name), with_kwargs=True)
            yield

    def _routed(self) -> dict[str, float]:
        """Share of the tokens that are routed to each linear of an expert."""
        shares = {
            f"{name}.{number}": share
            for name, mean in self.routed.items()
            for number, share in enumerate(mean.finish().tolist())
        }
        owners = ((name, name.rpartition(".")[0]) for name in self.request.routed)
        return {name: shares[expert] for name, expert in owners if expert in shares}

    def _check_finite(self) -> None:
        """
        :raises ValueError: if a layer read or put out NaN or infinite values; the first is named
        """
        sums = [
            *(("input", name, mean.total.diagonal()) for name, mean in self.moments.items()),
            *(("input", name, mean.total) for (name, _), mean in self.squares.items()),
            *(("output", name, mean.total) for name, mean in self.outputs.items()),
        ]
        for what, name, values in sums:
            if not torch.isfinite(values).all():
                raise ValueError(
                    f"the {what} of {name} holds NaN or infinite values on the calibration data: "
                    "run the model in a wider dtype, or leave out the samples that do it"
                )

    def take(self, tokens: int) -> Statistics:
        """What was collected since the last time on all ranks, which is forgotten here.

        :param tokens: that all of them saw
        """
        for found in (self.moments, self.squares, self.outputs, self.influences, self.routed):
            add_ranks(found, self._device)
        for seen in gathered(self._owner):
            self._owner |= seen
        self._check_finite()
        moments, squares = (
            {key: mean.finish() for key, mean in found.items()}
            for found in (self.moments, self.squares)
        )
        seen = self._owner
        found = Statistics(
            second_moments={
                name: moments[seen[name]] for name in self.request.second_moments if name in seen
            },
            mean_squares={
                name: squares[seen[name], block]
                for name, block in self.request.mean_squares
                if name in seen
            },
            output_energies={n: m.finish().item() for n, m in self.outputs.items()},
            influences={n: m.finish().item() for n, m in self.influences.items()},
            routed=self._routed(),
            reached=frozenset(seen),
            tokens=tokens,
        )
        self._begin()
        return found


@contextmanager
def calibrating(model: nn.Module):
    """The model as calibration runs it."""
    with disable_cache(model), eval_context(model), disable_hf_kernels(model):
        yield


def _values(means: dict[str, TokenMean]) -> dict[str, torch.Tensor]:
    """Means of what was seen at all."""
    return {name: mean.finish() for name, mean in means.items() if mean.tokens}

"""Statistics of the calibration data: what enters and leaves the layers of the dense model, and
how much the loss moves with it.

Hooks only; the maths that reads these tensors lives in ``lowrank`` and ``importance``.
"""

from collections.abc import Iterable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields

import torch
from llmcompressor.utils.helpers import (
    disable_cache,
    disable_hf_kernels,
    disable_lm_head,
    eval_context,
)
from loguru import logger
from torch import nn
from tqdm import tqdm

from casp_plugin.attention_maps import AttentionDensities, AttentionDensity
from casp_plugin.derivatives import AttentionDerivatives, LossGradients
from casp_plugin.hooks import (
    Hooks,
    TokenMean,
    by_token,
    image_mask,
    on_device,
    token_mask,
    tokens_of,
)
from casp_plugin.importance import token_influence
from casp_plugin.transforms import rotate
from casp_plugin.units import decoder_layers

__all__ = ["Request", "Statistics", "collect"]


@dataclass(frozen=True)
class Request:
    """What to measure, by module name.

    :param second_moments: linears whose input second moment E[x x^T] is wanted
    :param mean_squares: linears whose E[x^2] per input channel is wanted, each with the size of the
        Hadamard blocks that will rotate its input, 1 for none
    :param energies: linears whose output energy is wanted
    :param influences: decoder layers whose block influence is wanted
    :param gradients: linears for whose outputs the squared gradient of the loss is wanted
    :param gradient_moments: linears for whose outputs E[g g^T] of that gradient is wanted
    :param attention_moments: linears inside attention modules for whose outputs it is wanted how
        much the attention output moves with them
    :param attention_maps: attention modules whose maps' densities are wanted
    :param image_weight: what a token that stands for an image counts in the means over inputs and
        outputs, one of text being 1; None for 1, or for that of the request this one is joined to
    """

    second_moments: frozenset[str] = frozenset()
    mean_squares: frozenset[tuple[str, int]] = frozenset()
    energies: frozenset[str] = frozenset()
    influences: frozenset[str] = frozenset()
    gradients: frozenset[str] = frozenset()
    gradient_moments: frozenset[str] = frozenset()
    attention_moments: frozenset[str] = frozenset()
    attention_maps: frozenset[str] = frozenset()
    image_weight: float | None = None

    def __or__(self, other: "Request") -> "Request":
        merged = {name: getattr(self, name) | getattr(other, name) for name in _MEASURED}
        weight = other.image_weight if self.image_weight is None else self.image_weight
        return Request(**merged, image_weight=weight)

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in _MEASURED)

    @property
    def linears(self) -> frozenset[str]:
        """Every linear that something is measured at on the way forward."""
        return self.second_moments | {name for name, _ in self.mean_squares} | self.energies


_MEASURED = [field.name for field in fields(Request) if field.name != "image_weight"]


@dataclass
class Statistics:
    """What one calibration pass measured. Keys are module names of the model as it was then.

    :param second_moments: E[x x^T], shape (in, in), float32; modules that share one input
        share one tensor
    :param mean_squares: E[x^2] per input channel, shape (in,), float32, of the rotated input where
        a rotation was asked for
    :param output_energies: E||W x||^2, the bias left out
    :param influences: block influence per decoder layer
    :param gradient_squares: g^2 per output channel, g the gradient of the loss, summed over a
        sequence, by what the layer puts out at one token; summed over the layer's tokens, over the
        number of predicted ones; shape (out,), float32
    :param gradient_moments: g g^T likewise, shape (out, out), float32. The labels are drawn from
        the model's own predictions: this is the Fisher information, not the empirical one
    :param attention_moments: E[J^T J], J the derivative of the attention output, relative to the
        size of the hidden state it is added to; shape (out, out), float32
    :param attention_densities: how sparse the maps of attention modules are
    :param tokens: tokens seen, padding left out
    """

    second_moments: dict[str, torch.Tensor] = field(default_factory=dict)
    mean_squares: dict[str, torch.Tensor] = field(default_factory=dict)
    output_energies: dict[str, float] = field(default_factory=dict)
    influences: dict[str, float] = field(default_factory=dict)
    gradient_squares: dict[str, torch.Tensor] = field(default_factory=dict)
    gradient_moments: dict[str, torch.Tensor] = field(default_factory=dict)
    attention_moments: dict[str, torch.Tensor] = field(default_factory=dict)
    attention_densities: dict[str, AttentionDensity] = field(default_factory=dict)
    tokens: int = 0


class _Collector:
    """Accumulates a request over forward passes, by hooks."""

    def __init__(self, request: Request):
        self.request = request
        self.moments: dict[str, TokenMean] = {}
        self.squares: dict[tuple[str, int], TokenMean] = {}
        self.outputs: dict[str, TokenMean] = {}
        self.influences: dict[str, TokenMean] = {}
        self.mask: torch.Tensor | None = None
        self.weights: torch.Tensor | None = None
        self._blocks = dict(request.mean_squares)
        # q, k and v read the very same tensor: the first of them names it, the first that wants a
        # sum over it makes it
        self._owner: dict[str, str] = {}
        self._summing: dict = {}
        self._last: tuple[str, torch.Tensor] | None = None

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
                shared = self._last is not None and self._last[1] is inputs
                self._owner[name] = self._last[0] if shared else name
            owner = self._owner[name]
            self._last = (owner, inputs)
            wanted = self.request
            block = self._blocks.get(name)
            moment = name in wanted.second_moments and self._sums(owner, name)
            squares = block is not None and self._sums((owner, block), name)
            if moment or squares:
                x, n = self._weighted(inputs)
                if moment:
                    self.moments.setdefault(owner, TokenMean()).add(x.T @ x, n)
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

    @contextmanager
    def attached(self, model: nn.Module):
        """Watch forward passes."""
        with Hooks(model) as hooks:
            for name in self.request.linears:
                hooks.add(name, self.on_linear(name))
            for name in self.request.influences:
                hooks.add(name, self.on_layer(name), with_kwargs=True)
            yield

    def result(self, tokens: int) -> Statistics:
        moments, squares = (
            {key: mean.finish() for key, mean in found.items()}
            for found in (self.moments, self.squares)
        )
        seen = self._owner
        return Statistics(
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
            tokens=tokens,
        )


def collect(model: nn.Module, dataloader: Iterable[dict], request: Request) -> Statistics:
    """Run the calibration data through the model and measure what was requested.

    Derivatives, where requested, take further passes over a few sequences. Modules that no token
    reaches (a dead expert) are absent from the result.

    :param model: the model, on whatever device it lives
    :param dataloader: batches of model keyword arguments
    :param request: what to measure
    :raises ValueError: if the dataloader is empty
    """
    collector = _Collector(request)
    gradients = LossGradients(request.gradients, request.gradient_moments)
    attention = AttentionDerivatives(request.attention_moments)
    maps = AttentionDensities(request.attention_maps)
    layers = decoder_layers(model)
    tokens, weighted = 0, request.image_weight in (None, 1)
    with ExitStack() as stack:
        for context in (disable_cache, eval_context, disable_hf_kernels):
            stack.enter_context(context(model))
        head = model.get_output_embeddings()
        asked = any(model.get_submodule(name) is head for name in request.linears)
        logits = nullcontext() if asked else disable_lm_head(model)
        with collector.attached(model), logits, torch.no_grad():
            for batch in tqdm(dataloader, desc="Collecting CASP statistics"):
                batch = on_device(batch, model)
                collector.mask = mask = token_mask(batch)
                collector.weights = _token_weights(batch, model, request.image_weight)
                weighted |= collector.weights is not None
                if "input_ids" in batch:
                    tokens += batch["input_ids"].numel() if mask is None else int(mask.sum())
                model(**batch)
        if not tokens:
            raise ValueError("the calibration dataset is empty: pass at least one sample of text")
        if not weighted:
            logger.warning("image_weight changes nothing: no token of the data stands for an image")
        if request.attention_maps:
            maps.collect(model, dataloader)
        if request.attention_moments:
            attention.collect(model, dataloader, layers)
        if request.gradients or request.gradient_moments:
            gradients.collect(model, dataloader, layers)
    found = collector.result(tokens)
    found.gradient_squares = _values(gradients.squares)
    found.gradient_moments = _values(gradients.moments)
    found.attention_moments = _values(attention.moments)
    found.attention_densities = maps.densities
    return found


def _token_weights(
    batch: dict, model: nn.Module, image_weight: float | None
) -> torch.Tensor | None:
    """Weights of the tokens, (batch, tokens), float32; None where all are 1."""
    images = None if image_weight in (None, 1) else image_mask(batch, model)
    return None if images is None else torch.where(images, image_weight, 1.0)


def _values(means: dict[str, TokenMean]) -> dict[str, torch.Tensor]:
    """Means of what was seen at all."""
    return {name: mean.finish() for name, mean in means.items() if mean.tokens}

"""How much the loss, or the output of an attention module, moves with what linear layers put out.

Second moments of derivatives over tokens: the output metrics of ``lowrank`` and the importances of
``pricing``.
"""

import zlib
from collections.abc import Iterable
from contextlib import contextmanager
from functools import reduce

import torch
from llmcompressor.utils.helpers import disable_lm_head
from torch import nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from casp_plugin.statistics.hooks import (
    Hooks,
    TokenMean,
    add_ranks,
    first_batches,
    image_mask,
    on_device,
    token_mask,
    tokens_of,
)
from casp_plugin.system.distributed import gathered
from casp_plugin.system.machine import trim_memory

__all__ = ["AttentionDerivatives", "LossGradients", "drawn", "weights_read"]

#: sequences and tokens that derivatives are taken from, at least; they settle long before the
#: moments of inputs do
SAMPLES, TOKENS = 16, 8192
#: tokens whose predictions are looked at together
CHUNK = 8


class LossGradients:
    """Gradients of the loss at the outputs of linear layers, for labels drawn from the model's own
    predictions: E[g g^T] is then a block of the Fisher information (K-FAC, arXiv 1503.05671), not
    of the empirical one.

    Parameters get no gradients, and only what enters the decoder layers is kept on the way
    (activation checkpointing): it takes the memory of one layer and the logits beside the model.

    Sums over the tokens that a layer sees are divided by the number of predicted tokens, which is
    that of the layer's own in a plain language model: times the mean squared error of an output
    they give the change of the loss a token, in a vision tower as in a decoder layer.

    :param squares: linears whose g^2 per output is wanted
    :param moments: linears whose g g^T is wanted
    """

    def __init__(self, squares: frozenset[str], moments: frozenset[str]):
        self.squares = {name: TokenMean() for name in squares}
        self.moments = {name: TokenMean() for name in moments}
        self._mask: torch.Tensor | None = None

    def collect(
        self,
        model: nn.Module,
        dataloader: Iterable[dict],
        layers: list[str],
        desc: str = "Collecting gradients",
    ) -> None:
        """
        :param model: the model, ready to be run
        :param dataloader: batches, of which the first are used
        :param layers: names of the decoder layers
        :param desc: of the progress bar
        """
        with _no_parameter_gradients(model), _checkpointed(model, layers), Hooks(model) as hooks:
            for name in self.squares.keys() | self.moments.keys():
                hooks.add(name, self._on_linear(name))
            predicted = 0
            for batch in first_batches(dataloader, SAMPLES, desc, TOKENS):
                batch = on_device(batch, model)
                self._mask = token_mask(batch)
                text = _predicting_text(batch, model, self._mask)
                predicted += _backward(model, batch, text, _generator(batch, self._mask))
                trim_memory()
        predicted = sum(gathered(predicted))
        add_ranks(self.squares, next(model.parameters()).device)
        add_ranks(self.moments, next(model.parameters()).device)
        for name, mean in (*self.squares.items(), *self.moments.items()):
            if mean.total is not None and not torch.isfinite(mean.total).all():
                raise ValueError(
                    f"the gradient of the loss at {name} holds NaN or infinite values: run the "
                    "model in a wider dtype, or use another importance and method than fisher"
                )
            # a vision tower, or an expert, sees more or fewer tokens than are predicted
            mean.tokens = predicted if mean.tokens else 0

    def _on_linear(self, name: str):
        def on_gradient(gradient: torch.Tensor) -> None:
            g = tokens_of(gradient, self._mask).float()
            if name in self.squares:
                self.squares[name].add(g.square().sum(0), len(g))
            if name in self.moments:
                first = self.moments[name].total is None
                self.moments[name].add_products(g, len(g))
                if first:  # what stays lies between what goes, and would keep its pages
                    trim_memory()

        def hook(module: nn.Linear, args: tuple, output: torch.Tensor) -> torch.Tensor:
            if output.requires_grad:
                output.register_hook(on_gradient)
                return output
            # the first on its way: of text, of images, of queries. What follows may change it
            output.requires_grad_().register_hook(on_gradient)
            return output.clone()

        return hook


class AttentionDerivatives:
    """Derivatives of each attention module alone, along random directions of its output, relative
    to the size of the hidden state that the output is added to.

    Backward runs inside one module at a time, so softmax, RoPE, norms and head groups of any
    family are in it and no graph is kept across layers.

    :param linears: linears inside attention modules, whose E[J^T J] is wanted
    """

    def __init__(self, linears: frozenset[str]):
        self.moments = {name: TokenMean() for name in linears}
        self._mask: torch.Tensor | None = None
        self._generator: torch.Generator | None = None
        self._outputs: dict[str, torch.Tensor] = {}
        self._hidden: torch.Tensor | None = None

    def collect(self, model: nn.Module, dataloader: Iterable[dict], layers: list[str]) -> None:
        """
        :param model: the model, ready to be run
        :param dataloader: batches, of which the first are used
        :param layers: names of the decoder layers
        """
        with Hooks(model) as hooks, disable_lm_head(model):
            for layer in layers:
                hooks.add_before(layer, self._on_layer)
            for attention in {name.rpartition(".")[0] for name in self.moments}:
                hooks.add_before(attention, self._on_enter)
                hooks.add(attention, self._on_leave, with_kwargs=True)
            for name in self.moments:
                hooks.add(name, self._on_linear(name))
            for batch in first_batches(dataloader, SAMPLES, "Probing the attention", TOKENS):
                batch = on_device(batch, model)
                self._mask = token_mask(batch)
                self._generator = _generator(batch, self._mask)
                with torch.no_grad():
                    model(**batch)
        add_ranks(self.moments, next(model.parameters()).device)

    def _on_layer(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._hidden = args[0] if args else kwargs["hidden_states"]

    def _on_enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        torch.set_grad_enabled(True)
        self._outputs = {}
        if args:
            return (args[0].detach().requires_grad_(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}

    def _on_linear(self, name: str):
        def hook(module: nn.Linear, args: tuple, output: torch.Tensor) -> torch.Tensor:
            self._outputs[name] = output
            return output.clone()  # what follows may change it in place

        return hook

    def _on_leave(self, module: nn.Module, args: tuple, kwargs: dict, output):
        attended = output[0] if isinstance(output, tuple) else output
        beside = self._hidden  # of the decoder layer, unless this attention is in none
        if beside is None or beside.shape != attended.shape:
            beside = attended.detach()
        size = beside.float().norm(dim=-1, keepdim=True)
        probe = torch.randn(attended.shape, generator=self._generator).to(attended.device) / size
        if self._mask is not None and self._mask.shape == probe.shape[:-1]:
            probe = probe * self._mask[..., None]  # what padding puts out is nobody's
        names = list(self._outputs)
        gradients = torch.autograd.grad(
            attended, [self._outputs[name] for name in names], probe.to(attended.dtype)
        )
        torch.set_grad_enabled(False)
        for name, gradient in zip(names, gradients, strict=True):
            g = tokens_of(gradient, self._mask).float()
            self.moments[name].add_products(g, len(g))
        attended = attended.detach()
        return (attended, *output[1:]) if isinstance(output, tuple) else attended


def weights_read(
    model: nn.Module, batch: dict, layers: list[str], linears: dict[str, nn.Module]
) -> frozenset[str]:
    """Return those of some linears that a model never calls, but whose weights it reads (Mamba's
    `dt_proj`): no hook sees what they do.

    :param batch: one of the calibration data
    :param layers: names of the decoder layers
    """
    weights = {name: each.weight for name, each in linears.items() if hasattr(each, "weight")}
    if not weights:
        return frozenset()
    with _no_parameter_gradients(model), _checkpointed(model, layers), torch.enable_grad():
        for weight in weights.values():
            weight.requires_grad_(True)
        try:
            logits = model(**on_device(batch, model)).logits
            asked = list(weights.values())
            found = [None] * len(asked)
            if logits.requires_grad:
                found = torch.autograd.grad(logits.float().sum(), asked, allow_unused=True)
        finally:
            for weight in weights.values():
                weight.requires_grad_(False)
    return frozenset(n for n, each in zip(weights, found, strict=True) if each is not None)


def _generator(batch: dict, mask: torch.Tensor | None) -> torch.Generator:
    """Chance that hangs on torch's seed and on what the batch holds, not on what ran before: the
    same on whatever rank it runs. Apart from torch's own: asking for derivatives changes nothing
    that comes after."""
    ids = batch.get("input_ids")
    if ids is None:
        ids = next(value for value in batch.values() if torch.is_tensor(value))
    elif mask is not None:
        ids = ids[mask]
    content = zlib.crc32(ids.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return torch.Generator().manual_seed((torch.initial_seed() + content) % 2**63)


def _predicting_text(
    batch: dict, model: nn.Module, mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Tokens whose prediction counts: not those before a token of an image, which no model
    predicts, nor before one that the batch's labels leave out. None where all do."""
    kept = [] if mask is None else [mask]
    images, labels = image_mask(batch, model), batch.get("labels")
    if images is not None:
        kept.append(~pad(images[:, 1:], (0, 1)))
    if labels is not None and (answer := labels != -100).any():
        kept.append(pad(answer[:, 1:], (0, 1)))
    return reduce(torch.logical_and, kept) if kept else None


def _backward(
    model: nn.Module, batch: dict, mask: torch.Tensor | None, generator: torch.Generator
) -> int:
    """Forward, and backward of the summed loss against sampled labels, down to the activations.

    The derivative of the loss by the logits is written down, softmax less one at the label, some
    tokens at a time: logits of a large vocabulary are what takes most memory here.

    :return: number of predicted tokens
    """
    with torch.enable_grad():
        logits = model(**batch).logits
    rows = logits.detach().flatten(0, -2)  # where they were, their derivative will be
    tokens = torch.arange(len(rows), device=rows.device)
    if mask is not None and mask.numel() != len(rows):
        raise ValueError(
            f"{type(model).__name__} puts out logits for {len(rows)} tokens where the data has "
            f"{mask.numel()}: its decoder reads others, which cannot be measured"
        )
    counted = tokens if mask is None else tokens[mask.flatten()]
    for some in counted.split(CHUNK):
        chances = rows[some].float().softmax(-1)
        if not torch.isfinite(chances).all():
            raise ValueError(
                f"{type(model).__name__} puts out NaN or infinite values on the calibration data: "
                "run it in a wider dtype, or leave out the samples that do it"
            )
        labels = drawn(chances, generator)
        slope = chances.scatter_add_(1, labels, chances.new_full(labels.shape, -1))
        rows[some] = slope.to(rows.dtype)
    if mask is not None:
        rows[~mask.flatten()] = 0
    logits.backward(rows.view_as(logits))
    return len(counted)


def drawn(chances: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One draw from each of some distributions: a random number for each, not one for each entry as
    ``torch.multinomial`` takes, which is slow for a vocabulary.

    :param chances: shape (rows, entries), on any device
    :param generator: of the CPU
    :return: indices, shape (rows, 1)
    """
    below = chances.cumsum(-1)
    points = torch.rand(len(chances), 1, generator=generator).to(below) * below[:, -1:]
    return torch.searchsorted(below, points, right=True).clamp_(max=chances.shape[1] - 1)


@contextmanager
def _no_parameter_gradients(model: nn.Module):
    """Gradients of activations only."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _checkpointed(model: nn.Module, layers: list[str]):
    """Decoder layers that keep their inputs only, and run again on the way back."""

    def recomputing(forward):
        return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)

    modules = [model.get_submodule(name) for name in layers]
    before = [vars(module).get("forward") for module in modules]  # an offloading hook's own
    for module in modules:
        module.forward = recomputing(module.forward)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward

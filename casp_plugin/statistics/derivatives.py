"""Derivatives of the loss, or of an attention module's output, by the outputs of linear layers.

Their second moments over tokens are the output metrics of ``low_rank`` and the importances of
``pricing``.

Shapes: B sequences of a batch, T tokens of a sequence, N tokens without padding, V entries of the
vocabulary, out the output channels of a linear.
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

from casp_plugin.model.low_rank_linear import named_linears
from casp_plugin.statistics.hooks import (
    Hooks,
    TokenMean,
    add_ranks,
    first_batches,
    image_mask,
    on_device,
    squared_norms,
    token_mask,
    tokens_of,
)
from casp_plugin.system.distributed import gathered
from casp_plugin.system.machine import free_memory, trim_memory

__all__ = [
    "AttentionDerivatives",
    "LossGradients",
    "activation_bytes",
    "checkpointed",
    "chunk_tokens",
    "derived_length",
    "draw_labels",
    "no_parameter_gradients",
    "predicting_text",
    "runs_again",
    "weights_read",
]

#: least number of sequences and tokens for derivatives, which settle long before moments of inputs
SAMPLES, TOKENS = 16, 8192
#: number of tokens of a text that gradients are taken from, at least; of longer ones the first
#: half. Texts differ more than the parts of one: 16 x 256 tokens are worth 16 x 512, and 8 x 512
#: are not
LEAST_LENGTH = 256
#: largest share of the free memory for activations that are kept from the forward pass
KEPT_SHARE = 0.1
#: bytes of predictions, in float32, that are differentiated together: on a CPU they fit in its
#: cache, on an accelerator few launches matter more
CHUNK_BYTES, ACCELERATOR_CHUNK_BYTES = 2**21, 2**28


class LossGradients:
    """Gradients of the loss at the outputs of linear layers, for labels drawn from the model's own
    predictions.

    With such labels E[g g^T] is a block of the Fisher information (K-FAC, arXiv 1503.05671), not of
    the empirical one.

    Parameters get no gradients. Where the activations of a batch would take too much memory, only
    the inputs of the decoder layers are kept, and the layers run again on the way back (activation
    checkpointing): beside the model that takes the memory of one layer and of the logits.

    Sums over the tokens of a layer are divided by the number of predicted tokens, which in a plain
    language model is the number of the layer's tokens. Times the mean squared error of an output,
    they are the change of the loss per token, in a vision tower as in a decoder layer.

    :param squares: linears whose g^2 per output channel is requested
    :param moments: linears whose g g^T is requested
    :param tokens: least number of tokens to take gradients from; of as many, whole texts are taken
    """

    def __init__(self, squares: frozenset[str], moments: frozenset[str], tokens: int = 0):
        self.tokens = max(tokens, TOKENS)
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
        """Run the first batches forward and backward, and sum up the gradients.

        :param model: the model, in the state in which calibration runs it
        :param dataloader: batches
        :param layers: names of the decoder layers
        :param desc: text of the progress bar
        :raises ValueError: if logits or gradients are not finite, or the decoder reads other tokens
            than the data has
        """
        device = next(model.parameters()).device
        with no_parameter_gradients(model), Hooks(model) as hooks:
            for name in self.squares.keys() | self.moments.keys():
                hooks.add(name, self._on_linear(name))
            predicted = 0
            for batch in first_batches(dataloader, SAMPLES, desc, self.tokens):
                part = _first_half(batch) if self.tokens == TOKENS else batch
                batch = on_device(part, model)
                self._mask = token_mask(batch)
                text = predicting_text(batch, model, self._mask)
                again = runs_again(model, layers, batch["input_ids"].numel(), device)
                with checkpointed(model, layers if again else []):
                    predicted += _backward(model, batch, text, _generator(batch, self._mask))
                trim_memory()
        predicted = sum(gathered(predicted))
        add_ranks(self.squares, next(model.parameters()).device)
        add_ranks(self.moments, next(model.parameters()).device)
        for name, mean in (*self.squares.items(), *self.moments.items()):
            if mean.total is not None and not torch.isfinite(mean.total).all():
                raise ValueError(
                    f"the gradient of the loss at {name} holds NaN or infinite values: run the "
                    "model in a wider dtype, or use another importance, method and output_metric "
                    "than fisher"
                )
            # a vision tower or an expert has more or fewer tokens than are predicted
            mean.tokens = predicted if mean.tokens else 0

    def _on_linear(self, name: str):
        def on_gradient(gradient: torch.Tensor) -> None:
            g = tokens_of(gradient, self._mask).float()  # (N, out)
            if name in self.squares:
                self.squares[name].add(squared_norms(g), len(g))  # (out,)
            if name in self.moments:
                first = self.moments[name].total is None
                self.moments[name].add_products(g, len(g))  # (out, out)
                if first:  # the new sum lies between temporary blocks, whose pages it would pin
                    trim_memory()

        def hook(module: nn.Linear, args: tuple, output: torch.Tensor) -> torch.Tensor:
            if output.requires_grad:
                output.register_hook(on_gradient)
                return output
            # the first layer on its way (of text, images or queries): start the graph here; the
            # clone may be changed in place
            output.requires_grad_().register_hook(on_gradient)
            return output.clone()

        return hook


class AttentionDerivatives:
    """Derivatives of the outputs of attention modules by the outputs of linears inside them.

    They are taken along random directions of the attention output, relative to the size of the
    hidden state that it is added to. Backward runs inside one module at a time, so softmax, RoPE,
    norms and head groups of any family are included, and no graph is kept across layers.

    :param linears: linears inside attention modules whose E[J^T J] is requested
    """

    def __init__(self, linears: frozenset[str]):
        self.moments = {name: TokenMean() for name in linears}
        self._mask: torch.Tensor | None = None
        self._generator: torch.Generator | None = None
        self._outputs: dict[str, torch.Tensor] = {}
        self._hidden: torch.Tensor | None = None

    def collect(self, model: nn.Module, dataloader: Iterable[dict], layers: list[str]) -> None:
        """Run the first batches through a model, and sum up the derivatives.

        :param model: the model, in the state in which calibration runs it
        :param dataloader: batches
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
            return output.clone()  # later code may change it in place

        return hook

    def _on_leave(self, module: nn.Module, args: tuple, kwargs: dict, output):
        attended = output[0] if isinstance(output, tuple) else output  # (B, T, hidden)
        residual = self._hidden  # input of the decoder layer, unless the attention is in none
        if residual is None or residual.shape != attended.shape:
            residual = attended.detach()
        size = residual.float().norm(dim=-1, keepdim=True)  # (B, T, 1)
        # (B, T, hidden)
        probe = torch.randn(attended.shape, generator=self._generator).to(attended.device) / size
        if self._mask is not None and self._mask.shape == probe.shape[:-1]:
            probe = probe * self._mask[..., None]  # no derivative of the outputs at padding
        names = list(self._outputs)
        gradients = torch.autograd.grad(
            attended, [self._outputs[name] for name in names], probe.to(attended.dtype)
        )
        torch.set_grad_enabled(False)
        for name, gradient in zip(names, gradients, strict=True):
            g = tokens_of(gradient, self._mask).float()  # (N, out)
            self.moments[name].add_products(g, len(g))  # (out, out)
        attended = attended.detach()
        return (attended, *output[1:]) if isinstance(output, tuple) else attended


def derived_length(tokens: int) -> int:
    """Return the number of tokens of a text that gradients are taken from."""
    return min(tokens, max(LEAST_LENGTH, -(-tokens // 2)))


def activation_bytes(model: nn.Module, layers: list[str], tokens: int) -> int:
    """Return the bytes that decoder layers keep of tokens for the way back, roughly: four times the
    outputs of their linears."""
    inside = (named_linears(model.get_submodule(layer)) for layer in layers)
    outputs = sum(linear.out_features for linears in inside for _, linear in linears)
    return 4 * outputs * tokens * next(model.parameters()).element_size()


def runs_again(model: nn.Module, layers: list[str], tokens: int, device: torch.device) -> bool:
    """Tell whether the decoder layers run a second time for the way back, to save memory.

    :param tokens: number of tokens of a batch
    :param device: device of the activations
    """
    return activation_bytes(model, layers, tokens) > KEPT_SHARE * free_memory(device)


def weights_read(
    model: nn.Module, batch: dict, layers: list[str], linears: dict[str, nn.Module]
) -> frozenset[str]:
    """Return the names of linears whose weights the logits depend on.

    Given linears that a model never calls, these are the ones whose weights it reads all the same
    (Mamba's `dt_proj`), out of sight of any hook.

    :param batch: a batch of the calibration data
    :param layers: names of the decoder layers
    :param linears: linears by name
    """
    weights = {name: m.weight for name, m in linears.items() if hasattr(m, "weight")}
    if not weights:
        return frozenset()
    with no_parameter_gradients(model), checkpointed(model, layers), torch.enable_grad():
        for weight in weights.values():
            weight.requires_grad_(True)
        try:
            logits = model(**on_device(batch, model)).logits
            parameters = list(weights.values())
            gradients = [None] * len(parameters)
            if logits.requires_grad:
                gradients = torch.autograd.grad(logits.float().sum(), parameters, allow_unused=True)
        finally:
            for weight in weights.values():
                weight.requires_grad_(False)
    return frozenset(n for n, g in zip(weights, gradients, strict=True) if g is not None)


def _first_half(batch: dict) -> dict:
    """Return the beginnings of texts; other batches, and padded ones, as they are."""
    if not batch.keys() <= {"input_ids", "attention_mask"} or token_mask(batch) is not None:
        return batch
    length = derived_length(batch["input_ids"].shape[1])
    return {name: values[:, :length] for name, values in batch.items()}


def _generator(batch: dict, mask: torch.Tensor | None) -> torch.Generator:
    """Return a generator seeded by torch's seed and the content of a batch.

    It gives the same numbers on any rank, whatever ran before, and leaves torch's own generator
    alone, so that requesting derivatives changes no later draw.
    """
    ids = batch.get("input_ids")
    if ids is None:
        ids = next(value for value in batch.values() if torch.is_tensor(value))
    elif mask is not None:
        ids = ids[mask]
    content = zlib.crc32(ids.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return torch.Generator().manual_seed((torch.initial_seed() + content) % 2**63)


def predicting_text(
    batch: dict, model: nn.Module, mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the tokens whose prediction counts, shape (B, T), bool; None where all count.

    Not counted are padding, tokens before a token of an image, which no model predicts, and tokens
    before one that the batch's labels leave out.
    """
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
    """Run forward, and backward from the summed loss against sampled labels to the activations.

    The derivative of the loss by the logits, softmax minus one at the label, overwrites the logits
    some tokens at a time: logits of a large vocabulary dominate the memory here.

    :param mask: tokens whose prediction counts, shape (B, T), bool; None for all
    :param generator: draws the labels
    :return: number of predicted tokens
    """
    with torch.enable_grad():
        logits = model(**batch).logits  # (B, T, V)
    rows = logits.detach().flatten(0, -2)  # (B * T, V), a view: logits, then their derivative
    tokens = torch.arange(len(rows), device=rows.device)  # (B * T,)
    if mask is not None and mask.numel() != len(rows):
        raise ValueError(
            f"{type(model).__name__} puts out logits for {len(rows)} tokens where the data has "
            f"{mask.numel()}: its decoder reads others, which cannot be measured"
        )
    counted = tokens if mask is None else tokens[mask.flatten()]
    points = torch.rand(len(counted), 1, generator=generator).to(rows.device)  # one transfer
    finite = torch.ones((), dtype=torch.bool, device=rows.device)  # read once: that waits
    size = chunk_tokens(rows.shape[-1], rows.device)
    for chunk, chunk_points in zip(counted.split(size), points.split(size), strict=True):
        probabilities = rows[chunk].float().softmax(-1)  # (N, V)
        finite &= torch.isfinite(probabilities).all()
        labels = draw_labels(probabilities, chunk_points)  # (N, 1)
        minus_one = probabilities.new_full(labels.shape, -1)
        slope = probabilities.scatter_add_(1, labels, minus_one)  # (N, V)
        rows[chunk] = slope.to(rows.dtype)
    if not finite:
        raise ValueError(
            f"{type(model).__name__} puts out NaN or infinite values on the calibration data: run "
            "it in a wider dtype, or leave out the samples that do it"
        )
    if mask is not None:
        rows[~mask.flatten()] = 0
    logits.backward(rows.view_as(logits))
    return len(counted)


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """Return the number of tokens whose predictions are differentiated together."""
    limit = CHUNK_BYTES if device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
    return max(1, limit // (4 * vocabulary))


def draw_labels(probabilities: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Draw one label from every distribution, with one random number per row.

    ``torch.multinomial`` takes one per entry, which is slow for a vocabulary.

    :param probabilities: shape (N, V)
    :param points: random numbers in [0, 1), shape (N, 1)
    :return: indices, shape (N, 1)
    """
    below = probabilities.cumsum(-1)  # (N, V)
    labels = torch.searchsorted(below, points * below[:, -1:], right=True)
    return labels.clamp_(max=probabilities.shape[1] - 1)


@contextmanager
def no_parameter_gradients(model: nn.Module):
    """Let parameters take no gradients; activations still do."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def checkpointed(model: nn.Module, layers: list[str]):
    """Let decoder layers keep their inputs only, and run again in the backward pass."""

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

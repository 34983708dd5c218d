"""Statistics of the calibration data: what enters and leaves the layers of the dense model, and
how much the loss moves with it.

Hooks only; the maths that reads these tensors lives in ``lowrank`` and ``importance``.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields

import torch
from llmcompressor.utils.helpers import (
    disable_cache,
    disable_hf_kernels,
    disable_lm_head,
    eval_context,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from casp_plugin.importance import token_influence
from casp_plugin.transforms import rotate
from casp_plugin.units import decoder_layers

__all__ = ["Request", "Statistics", "collect"]

#: sequences that gradients are taken from; they settle long before the second moments do
GRADIENT_SAMPLES = 16


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
    """

    second_moments: frozenset[str] = frozenset()
    mean_squares: frozenset[tuple[str, int]] = frozenset()
    energies: frozenset[str] = frozenset()
    influences: frozenset[str] = frozenset()
    gradients: frozenset[str] = frozenset()
    gradient_moments: frozenset[str] = frozenset()
    attention_moments: frozenset[str] = frozenset()

    def __or__(self, other: "Request") -> "Request":
        names = (field.name for field in fields(self))
        return Request(**{name: getattr(self, name) | getattr(other, name) for name in names})

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self))

    @property
    def linears(self) -> frozenset[str]:
        """Every linear that something is measured at on the way forward."""
        return self.second_moments | {name for name, _ in self.mean_squares} | self.energies

    @property
    def differentiated(self) -> frozenset[str]:
        """Every linear that the gradient of the loss is wanted for."""
        return self.gradients | self.gradient_moments


@dataclass
class Statistics:
    """What one calibration pass measured. Keys are module names of the model as it was then.

    :param second_moments: E[x x^T], shape (in, in), float32; modules that share one input
        share one tensor
    :param mean_squares: E[x^2] per input channel, shape (in,), float32, of the rotated input where
        a rotation was asked for
    :param output_energies: E||W x||^2, the bias left out
    :param influences: block influence per decoder layer
    :param gradient_squares: E[g^2] per output channel, g the gradient of the loss, summed over a
        sequence, by what the layer puts out at one token; shape (out,), float32
    :param gradient_moments: E[g g^T], shape (out, out), float32. The labels are drawn from the
        model's own predictions: this is the Fisher information, not the empirical one
    :param attention_moments: E[J^T J], J the derivative of the attention output, relative to the
        size of the hidden state it is added to; shape (out, out), float32
    :param tokens: tokens seen, padding left out
    """

    second_moments: dict[str, torch.Tensor] = field(default_factory=dict)
    mean_squares: dict[str, torch.Tensor] = field(default_factory=dict)
    output_energies: dict[str, float] = field(default_factory=dict)
    influences: dict[str, float] = field(default_factory=dict)
    gradient_squares: dict[str, torch.Tensor] = field(default_factory=dict)
    gradient_moments: dict[str, torch.Tensor] = field(default_factory=dict)
    attention_moments: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: int = 0


class _Mean:
    """Running mean of per-token values, weighted by the number of tokens."""

    def __init__(self):
        self.total = None
        self.tokens = 0

    def add(self, summed: torch.Tensor, tokens: int):
        self.total = summed if self.total is None else self.total.add_(summed)
        self.tokens += tokens

    @property
    def value(self) -> torch.Tensor:
        return self.total / self.tokens


class _Hooks:
    """Forward hooks that go away together."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.handles = []

    def __enter__(self) -> "_Hooks":
        return self

    def __exit__(self, *exc) -> None:
        for handle in self.handles:
            handle.remove()

    def add(self, name: str, hook: Callable, **options) -> None:
        module = self.model.get_submodule(name)
        self.handles.append(module.register_forward_hook(hook, **options))

    def add_before(self, name: str, hook: Callable) -> None:
        module = self.model.get_submodule(name)
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))


class _AttentionProbe:
    """Derivatives of each attention module alone, along random directions of its output.

    Backward runs inside one module at a time, so softmax, RoPE, norms and head groups of any
    family are in it and no graph is kept across layers.
    """

    def __init__(self, linears: frozenset[str], tokens_of: Callable[[torch.Tensor], torch.Tensor]):
        self.linears = linears
        self.tokens_of = tokens_of
        self.moments: dict[str, _Mean] = {}
        self._generator = torch.Generator().manual_seed(torch.initial_seed())
        self._outputs: dict[str, torch.Tensor] = {}
        self._hidden: torch.Tensor | None = None

    @contextmanager
    def probing(self, model: nn.Module, layers: list[str]):
        with _Hooks(model) as hooks:
            for layer in layers:
                hooks.add_before(layer, self._on_layer)
            for attention in {name.rpartition(".")[0] for name in self.linears}:
                hooks.add_before(attention, self._on_enter)
                hooks.add(attention, self._on_leave, with_kwargs=True)
            for name in self.linears:
                hooks.add(name, self._on_linear(name))
            yield

    def _on_layer(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._hidden = args[0] if args else kwargs["hidden_states"]

    def _on_enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        torch.set_grad_enabled(True)
        self._outputs = {}
        if args:
            return (args[0].detach().requires_grad_(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}

    def _on_linear(self, name: str):
        def hook(module: nn.Linear, args: tuple, output: torch.Tensor) -> None:
            self._outputs[name] = output

        return hook

    def _on_leave(self, module: nn.Module, args: tuple, kwargs: dict, output):
        attended = output[0] if isinstance(output, tuple) else output
        size = self._hidden.float().norm(dim=-1, keepdim=True)
        probe = torch.randn(attended.shape, generator=self._generator).to(attended.device) / size
        names = list(self._outputs)
        gradients = torch.autograd.grad(
            attended, [self._outputs[name] for name in names], probe.to(attended.dtype)
        )
        torch.set_grad_enabled(False)
        for name, gradient in zip(names, gradients, strict=True):
            g = self.tokens_of(gradient).float()
            self.moments.setdefault(name, _Mean()).add(g.T @ g, len(g))
        attended = attended.detach()
        return (attended, *output[1:]) if isinstance(output, tuple) else attended


class _Collector:
    """Accumulates a request over forward passes, by hooks."""

    def __init__(self, request: Request):
        self.request = request
        self.moments: dict[str, _Mean] = {}
        self.squares: dict[tuple[str, int], _Mean] = {}
        self.outputs: dict[str, _Mean] = {}
        self.influences: dict[str, _Mean] = {}
        self.gradients: dict[str, _Mean] = {}
        self.gradient_moments: dict[str, _Mean] = {}
        self.attention = _AttentionProbe(request.attention_moments, self.tokens_of)
        self.mask: torch.Tensor | None = None
        self._blocks = dict(request.mean_squares)
        # q, k and v read the very same tensor: the first of them names it, the first that wants a
        # sum over it makes it
        self._owner: dict[str, str] = {}
        self._summing: dict = {}
        self._last: tuple[str, torch.Tensor] | None = None

    def tokens_of(self, values: torch.Tensor) -> torch.Tensor:
        """Activations as (tokens, channels), padding dropped where the mask fits."""
        if self.mask is not None and values.shape[:-1] == self.mask.shape:
            return values[self.mask]
        return values.reshape(-1, values.shape[-1])

    def _sums(self, key, name: str) -> bool:
        """Whether this layer sums something up for all that read the same input."""
        return self._summing.setdefault(key, name) == name

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
                x = self.tokens_of(inputs.detach()).float()
                if moment:
                    self.moments.setdefault(owner, _Mean()).add(x.T @ x, len(x))
                if squares:
                    mean = self.squares.setdefault((owner, block), _Mean())
                    mean.add(rotate(x, block).square().sum(0), len(x))
            if name in wanted.energies:
                y = self.tokens_of(output.detach()).float()
                y = y if module.bias is None else y - module.bias.float()
                self.outputs.setdefault(name, _Mean()).add(y.square().sum(), len(y))

        return hook

    def on_differentiated(self, name: str):
        def hook(module: nn.Linear, args: tuple, output: torch.Tensor):
            output.register_hook(self.on_gradient(name))

        return hook

    def on_gradient(self, name: str):
        def hook(gradient: torch.Tensor):
            g = self.tokens_of(gradient).float()
            if name in self.request.gradients:
                self.gradients.setdefault(name, _Mean()).add(g.square().sum(0), len(g))
            if name in self.request.gradient_moments:
                self.gradient_moments.setdefault(name, _Mean()).add(g.T @ g, len(g))

        return hook

    def on_layer(self, name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output):
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            values = token_influence(before.detach(), after.detach())[..., None]
            values = self.tokens_of(values)
            self.influences.setdefault(name, _Mean()).add(values.double().sum(), len(values))

        return hook

    @contextmanager
    def attached(self, model: nn.Module):
        """Watch forward passes."""
        with _Hooks(model) as hooks:
            for name in self.request.linears:
                hooks.add(name, self.on_linear(name))
            for name in self.request.influences:
                hooks.add(name, self.on_layer(name), with_kwargs=True)
            yield

    @contextmanager
    def differentiating(self, model: nn.Module):
        """Watch backward passes."""
        with _Hooks(model) as hooks:
            for name in self.request.differentiated:
                hooks.add(name, self.on_differentiated(name))
            yield

    def result(self, tokens: int) -> Statistics:
        moments, squares = (
            {key: mean.value for key, mean in found.items()}
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
            output_energies={n: m.value.item() for n, m in self.outputs.items()},
            influences={n: m.value.item() for n, m in self.influences.items()},
            gradient_squares={n: m.value for n, m in self.gradients.items()},
            gradient_moments={n: m.value for n, m in self.gradient_moments.items()},
            attention_moments={n: m.value for n, m in self.attention.moments.items()},
            tokens=tokens,
        )


def collect(model: nn.Module, dataloader: Iterable[dict], request: Request) -> Statistics:
    """Run the calibration data through the model and measure what was requested.

    Gradients, where requested, take a second pass over ``GRADIENT_SAMPLES`` sequences, forward
    and backward, with labels drawn from the model's own predictions. Only what enters the decoder
    layers is kept on the way (activation checkpointing), so that it takes the memory of one
    layer and the logits beside the model. Modules that no token reaches (a dead expert) are
    absent from the result.

    :param model: the model, on whatever device it lives
    :param dataloader: batches of model keyword arguments
    :param request: what to measure
    :raises ValueError: if the dataloader is empty
    """
    collector = _Collector(request)
    layers = decoder_layers(model)
    tokens = 0
    with ExitStack() as stack:
        for context in (disable_cache, eval_context, disable_hf_kernels):
            stack.enter_context(context(model))
        with collector.attached(model), disable_lm_head(model), torch.no_grad():
            for batch in tqdm(dataloader, desc="Collecting CASP statistics"):
                batch = _on_device(batch, model)
                collector.mask = _mask(batch)
                if "input_ids" in batch:
                    mask = collector.mask
                    tokens += batch["input_ids"].numel() if mask is None else int(mask.sum())
                model(**batch)
        if not tokens:
            raise ValueError("the calibration dataset is empty: pass at least one sample of text")
        if request.attention_moments:
            with collector.attention.probing(model, layers), disable_lm_head(model):
                for batch in _first(dataloader, "Probing the attention"):
                    batch = _on_device(batch, model)
                    collector.mask = _mask(batch)
                    with torch.no_grad():
                        model(**batch)
        if request.differentiated:
            # drawn apart from torch's own generator, so that asking for gradients changes
            # nothing that comes after
            generator = torch.Generator().manual_seed(torch.initial_seed())
            stack.enter_context(_requires_no_grad(model))
            stack.enter_context(_checkpointed(model, layers))
            stack.enter_context(collector.differentiating(model))
            for batch in _first(dataloader, "Collecting gradients"):
                batch = _on_device(batch, model)
                collector.mask = _mask(batch)
                _backward(model, batch, collector.mask, generator)
    return collector.result(tokens)


def _backward(
    model: nn.Module, batch: dict, mask: torch.Tensor | None, generator: torch.Generator
) -> None:
    """Forward, and backward of the summed loss against sampled labels, down to the activations."""
    # images begin a path of their own: what they pass through has gradients too
    batch = {
        k: v.detach().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in batch.items()
    }
    with torch.enable_grad():
        logits = model(**batch).logits.float()
        scores = logits.log_softmax(-1)
        with torch.no_grad():
            chances = scores.exp().flatten(0, -2).cpu()
            labels = torch.multinomial(chances, 1, generator=generator).to(scores.device)
        loss = -scores.flatten(0, -2).gather(1, labels).view(logits.shape[:-1])
        loss = loss if mask is None else loss[mask]
        loss.sum().backward()


def _on_device(batch: dict, model: nn.Module) -> dict:
    device = next(model.parameters()).device
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


def _mask(batch: dict) -> torch.Tensor | None:
    """Which tokens count, (batch, tokens); None where all do: picking rows is slow."""
    mask = batch.get("attention_mask")
    mask = mask.bool() if mask is not None and mask.ndim == 2 else None
    return None if mask is None or mask.all() else mask


def _first(dataloader: Iterable[dict], desc: str) -> Iterator[dict]:
    """The batches that hold the first ``GRADIENT_SAMPLES`` sequences."""
    with tqdm(desc=desc, total=GRADIENT_SAMPLES) as bar:
        for batch in dataloader:
            yield batch
            bar.update(len(next(v for v in batch.values() if torch.is_tensor(v))))
            if bar.n >= GRADIENT_SAMPLES:
                return


@contextmanager
def _requires_no_grad(model: nn.Module):
    """Gradients of activations only; what enters the layers is made to have one."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    model.enable_input_require_grads()
    try:
        yield
    finally:
        model.disable_input_require_grads()
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

"""Statistics of one calibration pass: what enters and leaves the layers of the dense model.

Hooks only; the maths that reads these tensors lives in ``lowrank`` and ``importance``.
"""

from collections.abc import Iterable
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
from tqdm import tqdm

from casp_plugin.importance import token_influence

__all__ = ["Request", "Statistics", "collect"]

#: batches that gradients are taken from; they rank layers well before the rest is known
GRADIENT_BATCHES = 4


@dataclass(frozen=True)
class Request:
    """What to measure, by module name.

    :param second_moments: linears whose input second moment E[x x^T] is wanted
    :param mean_squares: linears whose E[x^2] per input channel is wanted
    :param energies: linears whose output energy is wanted
    :param influences: decoder layers whose block influence is wanted
    :param gradients: linears for whose outputs the squared gradient of the loss is wanted
    """

    second_moments: frozenset[str] = frozenset()
    mean_squares: frozenset[str] = frozenset()
    energies: frozenset[str] = frozenset()
    influences: frozenset[str] = frozenset()
    gradients: frozenset[str] = frozenset()

    def __or__(self, other: "Request") -> "Request":
        names = (field.name for field in fields(self))
        return Request(**{name: getattr(self, name) | getattr(other, name) for name in names})

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self))

    @property
    def linears(self) -> frozenset[str]:
        """Every linear that something is measured at."""
        return self.second_moments | self.mean_squares | self.energies | self.gradients


@dataclass
class Statistics:
    """What one calibration pass measured. Keys are module names of the model as it was then.

    :param second_moments: E[x x^T], shape (in, in), float32; modules that share one input
        share one tensor
    :param mean_squares: E[x^2] per input channel, shape (in,), float32
    :param output_energies: E||W x||^2, the bias left out
    :param influences: block influence per decoder layer
    :param gradient_squares: E[(dL/dy)^2] per output channel, L the summed loss of a sample,
        shape (out,), float32: the diagonal of the empirical Fisher information
    :param tokens: tokens seen, padding left out
    """

    second_moments: dict[str, torch.Tensor] = field(default_factory=dict)
    mean_squares: dict[str, torch.Tensor] = field(default_factory=dict)
    output_energies: dict[str, float] = field(default_factory=dict)
    influences: dict[str, float] = field(default_factory=dict)
    gradient_squares: dict[str, torch.Tensor] = field(default_factory=dict)
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


class _Collector:
    """Accumulates a request over forward passes, by hooks."""

    def __init__(self, request: Request):
        self.request = request
        self.moments: dict[str, _Mean] = {}
        self.squares: dict[str, _Mean] = {}
        self.outputs: dict[str, _Mean] = {}
        self.influences: dict[str, _Mean] = {}
        self.gradients: dict[str, _Mean] = {}
        self.mask: torch.Tensor | None = None
        # q, k and v read the very same tensor: one of them accumulates for all
        self._owner: dict[str, str] = {}
        self._last: tuple[str, torch.Tensor] | None = None

    def tokens_of(self, values: torch.Tensor) -> torch.Tensor:
        """Activations as (tokens, channels), padding dropped where the mask fits."""
        if self.mask is not None and values.shape[:-1] == self.mask.shape:
            return values[self.mask]
        return values.reshape(-1, values.shape[-1])

    def on_linear(self, name: str):
        def hook(module: nn.Linear, args: tuple, output: torch.Tensor):
            inputs = args[0]
            if output.requires_grad and name in self.request.gradients:
                output.register_hook(self.on_gradient(name))
            if name not in self._owner:
                shared = self._last is not None and self._last[1] is inputs
                self._owner[name] = self._last[0] if shared else name
            owner = self._owner[name]
            self._last = (owner, inputs)
            wanted = self.request
            moment, squares = (
                name in names and (owner == name or owner not in names)
                for names in (wanted.second_moments, wanted.mean_squares)
            )
            if moment or squares:
                x = self.tokens_of(inputs.detach()).float()
                if moment:
                    self.moments.setdefault(name, _Mean()).add(x.T @ x, len(x))
                if squares:
                    self.squares.setdefault(name, _Mean()).add(x.square().sum(0), len(x))
            if name in wanted.energies:
                y = self.tokens_of(output.detach()).float()
                y = y if module.bias is None else y - module.bias.float()
                self.outputs.setdefault(name, _Mean()).add(y.square().sum(), len(y))

        return hook

    def on_gradient(self, name: str):
        def hook(gradient: torch.Tensor):
            g = self.tokens_of(gradient).float()
            self.gradients.setdefault(name, _Mean()).add(g.square().sum(0), len(g))

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
        handles = []
        for name in self.request.linears:
            module = model.get_submodule(name)
            handles.append(module.register_forward_hook(self.on_linear(name)))
        for name in self.request.influences:
            module = model.get_submodule(name)
            handles.append(module.register_forward_hook(self.on_layer(name), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def result(self, tokens: int) -> Statistics:
        def shared(found: dict[str, _Mean], wanted: Iterable[str]) -> dict[str, torch.Tensor]:
            means = {name: mean.value for name, mean in found.items()}
            owners = {name: name if name in means else self._owner.get(name) for name in wanted}
            return {name: means[owner] for name, owner in owners.items() if owner in means}

        return Statistics(
            second_moments=shared(self.moments, self.request.second_moments),
            mean_squares=shared(self.squares, self.request.mean_squares),
            output_energies={n: m.value.item() for n, m in self.outputs.items()},
            influences={n: m.value.item() for n, m in self.influences.items()},
            gradient_squares={n: m.value for n, m in self.gradients.items()},
            tokens=tokens,
        )


def collect(model: nn.Module, dataloader: Iterable[dict], request: Request) -> Statistics:
    """Run the calibration data through the model once and measure what was requested.

    Gradients, where requested, come from a backward pass on the first
    ``GRADIENT_BATCHES`` batches. Modules that no token reaches (a dead expert) are absent
    from the result.

    :param model: the model, on whatever device it lives
    :param dataloader: batches of model keyword arguments
    :param request: what to measure
    :raises ValueError: if the dataloader is empty
    """
    collector = _Collector(request)
    device = next(model.parameters()).device
    tokens = 0
    with ExitStack() as stack:
        for context in (disable_cache, eval_context, disable_hf_kernels):
            stack.enter_context(context(model))
        stack.enter_context(collector.attached(model))
        for index, batch in enumerate(tqdm(dataloader, desc="Collecting CASP statistics")):
            batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
            mask = batch.get("attention_mask")
            mask = mask.bool() if mask is not None and mask.ndim == 2 else None
            collector.mask = None if mask is None or mask.all() else mask  # picking rows is slow
            if "input_ids" in batch:
                tokens += batch["input_ids"].numel() if mask is None else int(mask.sum())
            if request.gradients and index < GRADIENT_BATCHES:
                _backward(model, batch, collector.mask)
            else:
                with torch.no_grad(), disable_lm_head(model):
                    model(**batch)
    if not tokens:
        raise ValueError("the calibration dataset is empty: pass at least one sample of text")
    return collector.result(tokens)


def _backward(model: nn.Module, batch: dict, mask: torch.Tensor | None) -> None:
    """Forward and backward of the summed next-token loss, down to the activations only."""
    labels = batch["input_ids"]
    labels = labels if mask is None else labels.masked_fill(~mask, -100)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with _requires_grad(trained, False), torch.enable_grad():
        model.enable_input_require_grads()
        try:
            loss = model(**{**batch, "labels": labels}).loss
            (loss * (labels[:, 1:] != -100).sum()).backward()
        finally:
            model.disable_input_require_grads()


@contextmanager
def _requires_grad(parameters: list[nn.Parameter], value: bool):
    for parameter in parameters:
        parameter.requires_grad_(value)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(not value)

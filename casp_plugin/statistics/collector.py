"""Sums over forward passes: moments of inputs, energies of outputs, block influences, routing.

Shapes: B sequences of a batch, T tokens of a sequence, N tokens without padding; in and out are the
channels of a linear, C either of them, E the experts of a layer.
"""

import weakref
from contextlib import contextmanager

import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_linearized_moes
from torch import nn

from casp_plugin.maths.errors import token_influence
from casp_plugin.maths.hadamard import rotate
from casp_plugin.statistics.hooks import (
    Hooks,
    TokenMean,
    add_ranks,
    by_token,
    squared_norms,
    tokens_of,
)
from casp_plugin.statistics.statistics import Request, Statistics
from casp_plugin.system.distributed import gathered

__all__ = ["Collector"]


class Collector:
    """Sums of the requested statistics over forward passes, by hooks.

    ``mask`` (tokens that are no padding, bool) and ``weights`` (of tokens, float32) belong to the
    batch that runs, shape (B, T) or None: set both before every batch.

    :param request: the requested statistics
    :param device: device of sums that only other ranks have
    """

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
        # q, k and v read the same tensor, and so do all experts of a layer: the first layer to read
        # a tensor owns it, the first that needs a sum over it makes the sum for all
        self._owner: dict[str, str] = {}
        self._summing: dict = {}
        self._inputs: dict[int, tuple[weakref.ref, str]] = {}

    @property
    def bytes(self) -> int:
        """Return the bytes of the sums over inputs."""
        means = (*self.moments.values(), *self.squares.values())
        return sum(mean.total.nbytes for mean in means)

    def _reader(self, inputs: torch.Tensor, name: str) -> str:
        """Return the name of the first layer that read a tensor."""
        alive, first = self._inputs.get(id(inputs), (None, None))
        if alive is not None and alive() is inputs:
            return first
        self._inputs[id(inputs)] = weakref.ref(inputs), name
        return name

    def _sums(self, key, name: str) -> bool:
        """Tell whether this layer makes a sum for all layers that read the same input."""
        return self._summing.setdefault(key, name) == name

    def _weighted(self, values: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return activations times the root of their token's weight, and the sum of the weights.

        :param values: shape (B, T, C)
        :return: rows of shape (N, C), and N without weights
        """
        x = tokens_of(values.detach(), self.mask).float()  # (N, C)
        if self.weights is None or not by_token(values, self.weights):  # all weigh 1
            return x, len(x)
        weights = tokens_of(self.weights[..., None], self.mask)  # (N, 1)
        return x * weights.sqrt(), weights.sum().item()

    def on_linear(self, name: str):
        """Return a hook that sums up inputs and outputs of a linear."""

        def hook(module: nn.Linear, args: tuple, output: torch.Tensor):
            inputs = args[0]  # (B, T, in)
            if name not in self._owner:
                self._owner[name] = self._reader(inputs, name)
            owner = self._owner[name]
            block = self._blocks.get(name)
            moment = name in self.request.second_moments and self._sums(owner, name)
            squares = block is not None and self._sums((owner, block), name)
            if moment or squares:
                x, n = self._weighted(inputs)  # (N, in)
                if moment:  # (in, N) @ (N, in)
                    self.moments.setdefault(owner, TokenMean()).add_products(x, n)
                if squares:
                    mean = self.squares.setdefault((owner, block), TokenMean())
                    mean.add(squared_norms(rotate(x, block)), n)  # (in,)
            if name in self.request.energies:
                output = output if module.bias is None else output.float() - module.bias
                y, n = self._weighted(output)  # (N, out)
                self.outputs.setdefault(name, TokenMean()).add(squared_norms(y).sum(), n)

        return hook

    def on_layer(self, name: str):
        """Return a hook that sums up the block influence of a decoder layer."""

        def hook(module: nn.Module, args: tuple, kwargs: dict, output):
            before = args[0] if args else kwargs["hidden_states"]  # (B, T, hidden)
            after = output[0] if isinstance(output, tuple) else output  # (B, T, hidden)
            values = token_influence(before.detach(), after.detach())[..., None]  # (B, T, 1)
            values = tokens_of(values, self.mask)  # (N, 1)
            self.influences.setdefault(name, TokenMean()).add(values.double().sum(), len(values))

        return hook

    def on_experts(self, name: str):
        """Return a hook that counts the tokens that are routed to every expert."""

        def hook(experts: LinearExperts2D, args: tuple, kwargs: dict) -> None:
            chosen = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
            if chosen is None:  # Llama 4 hands every expert its own tokens
                return
            chosen = tokens_of(chosen, self.mask)  # (N, experts per token)
            counts = chosen.flatten().bincount(minlength=len(experts))  # (E,)
            self.routed.setdefault(name, TokenMean()).add(counts.double(), len(chosen))

        return hook

    @contextmanager
    def attached(self, model: nn.Module):
        """Sum up all forward passes inside a ``with`` block."""
        with Hooks(model) as hooks:
            for name, _ in get_linearized_moes(model) if self.request.routed else ():
                hooks.add_before(name, self.on_experts(name))
            for name in self.request.linears:
                hooks.add(name, self.on_linear(name))
            for name in self.request.influences:
                hooks.add(name, self.on_layer(name), with_kwargs=True)
            yield

    def _routed_shares(self) -> dict[str, float]:
        """Return the share of tokens that is routed to the expert of a linear, by linear."""
        shares = {
            f"{name}.{number}": share
            for name, mean in self.routed.items()
            for number, share in enumerate(mean.finish().tolist())
        }
        owners = ((name, name.rpartition(".")[0]) for name in self.request.routed)
        return {name: shares[expert] for name, expert in owners if expert in shares}

    def _check_finite(self) -> None:
        """Check that all sums are finite.

        :raises ValueError: if a layer read or put out NaN or infinite values; the first is named
        """
        sums = [
            *(("input", name, mean.total.diagonal()) for name, mean in self.moments.items()),
            *(("input", name, mean.total) for (name, _), mean in self.squares.items()),
            *(("output", name, mean.total) for name, mean in self.outputs.items()),
        ]
        for side, name, values in sums:
            if not torch.isfinite(values).all():
                raise ValueError(
                    f"the {side} of {name} holds NaN or infinite values on the calibration data: "
                    "run the model in a wider dtype, or leave out the samples that do it"
                )

    def take(self, tokens: int) -> Statistics:
        """Return the statistics of all ranks since the last call, and begin anew.

        :param tokens: number of calibration tokens of all ranks
        """
        for means in (self.moments, self.squares, self.outputs, self.influences, self.routed):
            add_ranks(means, self._device)
        for owner in gathered(self._owner):
            self._owner |= owner
        self._check_finite()
        moments, squares = (
            {key: mean.finish() for key, mean in means.items()}
            for means in (self.moments, self.squares)
        )
        owner = self._owner
        statistics = Statistics(
            second_moments={
                name: moments[owner[name]] for name in self.request.second_moments if name in owner
            },
            mean_squares={
                name: squares[owner[name], block]
                for name, block in self.request.mean_squares
                if name in owner
            },
            output_energies={n: m.finish().item() for n, m in self.outputs.items()},
            influences={n: m.finish().item() for n, m in self.influences.items()},
            routed=self._routed_shares(),
            reached=frozenset(owner),
            tokens=tokens,
        )
        self._begin()
        return statistics

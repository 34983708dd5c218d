"""Statistics of the calibration data: moments of inputs and outputs of the dense model's layers,
and derivatives of the loss by the outputs. ``forward`` and ``derivatives`` collect them.
"""

from collections.abc import Container
from dataclasses import dataclass, field, fields

import torch

__all__ = ["AttentionDensity", "Request", "Statistics"]


@dataclass(frozen=True)
class Request:
    """Names of the modules to measure, by statistic; fields correspond to those of ``Statistics``.

    :param second_moments: linears, for E[x x^T] of the input
    :param mean_squares: linears, for E[x^2] per input channel, with the size of the Hadamard blocks
        that will rotate the input, 1 for no rotation
    :param energies: linears, for the output energy
    :param influences: decoder layers, for the block influence
    :param gradients: linears, for the squared gradient of the loss by the output
    :param gradient_moments: linears, for E[g g^T] of that gradient
    :param gradient_tokens: least number of tokens that gradients are taken from, as far as there
        are so many; 0 for what squares and moments of few channels need
    :param attention_moments: linears inside attention modules, for E[J^T J] of the attention output
    :param attention_maps: attention modules, for the densities of their maps
    :param reached: linears, only for whether a token reaches them
    :param routed: linears of experts, for the share of tokens that is routed to the expert
    :param image_weight: weight of a token that stands for an image in the means over inputs and
        outputs, where a text token weighs 1; None for 1, and to take the other request's in ``|``
    """

    second_moments: frozenset[str] = frozenset()
    mean_squares: frozenset[tuple[str, int]] = frozenset()
    energies: frozenset[str] = frozenset()
    influences: frozenset[str] = frozenset()
    gradients: frozenset[str] = frozenset()
    gradient_moments: frozenset[str] = frozenset()
    gradient_tokens: int = 0
    attention_moments: frozenset[str] = frozenset()
    attention_maps: frozenset[str] = frozenset()
    reached: frozenset[str] = frozenset()
    routed: frozenset[str] = frozenset()
    image_weight: float | None = None

    def __or__(self, other: "Request") -> "Request":
        merged = {name: getattr(self, name) | getattr(other, name) for name in _BY_REQUEST}
        weight = other.image_weight if self.image_weight is None else self.image_weight
        tokens = max(self.gradient_tokens, other.gradient_tokens)
        return Request(**merged, gradient_tokens=tokens, image_weight=weight)

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in _BY_REQUEST)

    @property
    def forward(self) -> bool:
        """Tell whether a pass over all the data is needed, layer by layer."""
        return bool(self.linears or self.influences or self.routed)

    @property
    def linears(self) -> frozenset[str]:
        """Return the linears that are measured in the forward pass."""
        squares = {name for name, _ in self.mean_squares}
        return self.second_moments | squares | self.energies | self.reached


_BY_REQUEST = [field.name for field in fields(Request) if "frozenset" in str(field.type)]


@dataclass(frozen=True)
class AttentionDensity:
    """Densities of the maps of one attention module, means over sequences.

    :param heads: share of entries above a threshold, by head
    :param entropy: keys effectively looked at over visible keys, by head
    :param image: ``heads`` over keys that stand for images; None without images
    :param text: ``heads`` over the other keys; None without images
    """

    heads: list[float]
    entropy: list[float]
    image: list[float] | None = None
    text: list[float] | None = None


@dataclass
class Statistics:
    """Results of one pass over the calibration data, by name of a module of the dense model.

    :param second_moments: E[x x^T], shape (in, in), float32; modules that read one input share one
        tensor
    :param mean_squares: E[x^2] per input channel, shape (in,), float32, of the rotated input where
        a rotation was requested
    :param output_energies: E||W x||^2, without the bias
    :param influences: block influence of a decoder layer
    :param gradient_squares: g^2 per output channel, g the gradient of the loss of a sequence by the
        layer's output at one token; summed over the layer's tokens and divided by the number of
        predicted tokens; shape (out,), float32
    :param gradient_moments: g g^T likewise, shape (out, out), float32. Labels are drawn from the
        model's own predictions: this is the Fisher information, not the empirical one
    :param attention_moments: E[J^T J], J the derivative of the attention output by the linear's
        output, relative to the size of the hidden state that the attention output is added to;
        shape (out, out), float32
    :param attention_densities: densities of attention maps
    :param routed: share of tokens that the router sends to a linear's expert; llm-compressor runs
        all tokens through every expert, so other statistics do not show it
    :param reached: linears that a token reached
    :param tokens: number of tokens of the calibration data, without padding
    """

    second_moments: dict[str, torch.Tensor] = field(default_factory=dict)
    mean_squares: dict[str, torch.Tensor] = field(default_factory=dict)
    output_energies: dict[str, float] = field(default_factory=dict)
    influences: dict[str, float] = field(default_factory=dict)
    gradient_squares: dict[str, torch.Tensor] = field(default_factory=dict)
    gradient_moments: dict[str, torch.Tensor] = field(default_factory=dict)
    attention_moments: dict[str, torch.Tensor] = field(default_factory=dict)
    attention_densities: dict[str, AttentionDensity] = field(default_factory=dict)
    routed: dict[str, float] = field(default_factory=dict)
    reached: frozenset[str] = frozenset()
    tokens: int = 0

    def __or__(self, other: "Statistics") -> "Statistics":
        """Return the statistics of the modules of both, with the larger number of tokens."""
        by_module = {
            name: getattr(self, name) | getattr(other, name) for name in (*_BY_MODULE, "reached")
        }
        return Statistics(**by_module, tokens=max(self.tokens, other.tokens))

    def of(self, modules: Container[str]) -> "Statistics":
        """Return the statistics of some modules only."""
        kept = {}
        for name in _BY_MODULE:
            values = getattr(self, name).items()
            kept[name] = {module: value for module, value in values if module in modules}
        reached = frozenset(name for name in self.reached if name in modules)
        return Statistics(**kept, reached=reached, tokens=self.tokens)


_BY_MODULE = [field.name for field in fields(Statistics) if field.name not in ("reached", "tokens")]

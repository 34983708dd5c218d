"""Statistics of the calibration data: what enters and leaves the layers of the dense model, and
how much the loss moves with it. ``collection`` measures them.
"""

from collections.abc import Container
from dataclasses import dataclass, field, fields

import torch

from casp_plugin.statistics.attention_maps import AttentionDensity

__all__ = ["Request", "Statistics"]


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
    :param reached: linears of which it is wanted only whether a token reaches them
    :param routed: linears of which it is wanted what share of the tokens is routed to their expert
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
    reached: frozenset[str] = frozenset()
    routed: frozenset[str] = frozenset()
    image_weight: float | None = None

    def __or__(self, other: "Request") -> "Request":
        merged = {name: getattr(self, name) | getattr(other, name) for name in _MEASURED}
        weight = other.image_weight if self.image_weight is None else self.image_weight
        return Request(**merged, image_weight=weight)

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in _MEASURED)

    @property
    def linears(self) -> frozenset[str]:
        """Every linear that is looked at on the way forward."""
        squares = {name for name, _ in self.mean_squares}
        return self.second_moments | squares | self.energies | self.reached


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
    :param reached: linears that a token reached
    :param routed: share of the tokens that the router sends to a linear's expert; only linears of
        experts are in it, and llm-compressor runs all tokens through each of them
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
    routed: dict[str, float] = field(default_factory=dict)
    reached: frozenset[str] = frozenset()
    tokens: int = 0

    def __or__(self, other: "Statistics") -> "Statistics":
        """Of the modules of both; tokens are those of the one that saw more."""
        named = {name: getattr(self, name) | getattr(other, name) for name in (*_NAMED, "reached")}
        return Statistics(**named, tokens=max(self.tokens, other.tokens))

    def of(self, modules: Container[str]) -> "Statistics":
        """Of some modules only."""
        found = {}
        for name in _NAMED:
            values = getattr(self, name).items()
            found[name] = {module: value for module, value in values if module in modules}
        reached = frozenset(name for name in self.reached if name in modules)
        return Statistics(**found, reached=reached, tokens=self.tokens)


_NAMED = [each.name for each in fields(Statistics) if each.name not in ("reached", "tokens")]

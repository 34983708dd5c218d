"""Output errors of coding weights by a codebook, known before anything is encoded.

BlockLDLQ leaves ``D(K) * variance * tr(D)`` in a row's output, with D(K) the codec's distortion of
Gaussian numbers of variance one and tr(D) of the block LDL decomposition of the rotated input: the
rotations make weights Gaussian, and spread the errors of a Hadamard block evenly over its rows
(QuIP#, arXiv 2402.04396, section 4).

Shapes: in and out are the channels of a linear, r the rank of its factors.
"""

from dataclasses import dataclass

import torch
from torch import nn

from casp_plugin.maths.hadamard import largest_block
from casp_plugin.maths.incoherence import block_scales
from casp_plugin.model.codebook_schemes import CodebookScheme
from casp_plugin.model.low_rank_linear import LowRankLinear

__all__ = ["CodebookErrors"]

#: dampening of second moments, as codebook modifiers have by default
DAMPING = 0.01


@dataclass(frozen=True)
class _Known:
    """An output error.

    :param value: as in ``rounding_error.WeightedError``
    """

    value: float


class CodebookErrors:
    """Output errors of layers under codebook schemes; what ``RoundingErrors`` is for others."""

    def __init__(self):
        self._spread: dict[tuple, tuple[torch.Tensor, float]] = {}

    @torch.no_grad()
    def of(
        self,
        module: nn.Linear | LowRankLinear,
        scheme: CodebookScheme,
        moment: torch.Tensor,
        row_weights: torch.Tensor,
        latent: torch.Tensor | None = None,
        block: int = 1,
    ) -> _Known:
        """Return the weighted output error of a linear under a scheme: ``sum_o w_o E[(dW x)_o^2]``.

        Of a factored layer both factors are coded: the error of ``down`` passes through ``up``.

        :param module: the layer, dense or factored
        :param scheme: of its weight, or of both its factors
        :param moment: E[x x^T], shape (in, in), of the layer's input
        :param row_weights: w, shape (out,)
        :param latent: moment of the latent, shape (r, r); None for a dense layer
        :param block: 1, since the scheme rotates by itself
        """
        distortion = scheme.distortion
        if not isinstance(module, LowRankLinear):
            return _Known(distortion * self._error(module, scheme, moment, row_weights))
        up = module.up.weight.float()  # (out, r)
        through = up.square().T @ row_weights.to(up)  # (r, out) @ (out,)
        error = self._error(module.up, scheme, latent, row_weights)
        error += self._error(module.latent, scheme, moment, through)
        return _Known(distortion * error)

    def finish(self) -> None:
        """Forget the inputs."""
        self._spread.clear()

    def _error(
        self,
        linear: nn.Linear,
        scheme: CodebookScheme,
        moment: torch.Tensor,
        row_weights: torch.Tensor,
    ) -> float:
        """Return the error for a distortion of one."""
        weight = linear.weight.float()
        scheme = scheme.fitting(tuple(weight.shape))
        block = largest_block(len(weight), scheme.block)
        variances = block_scales(weight, block).square()  # (out,)
        key = id(moment), scheme.block, scheme.tile
        if key not in self._spread:  # with the moment, so that no other one takes its id
            input = scheme.input(moment.float(), 0, DAMPING)
            self._spread[key] = moment, input.spread
        weights = row_weights.to(weight).unflatten(0, (-1, block)).mean(1)
        weights = weights.repeat_interleave(block)  # the rotation spreads errors over the block
        return (variances @ weights).item() * self._spread[key][1]

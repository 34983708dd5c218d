"""Output errors of coding weights by a codebook, known before anything is encoded.

BlockLDLQ leaves ``D(K) * variance * tr(D)`` in a row's output, with D(K) the codec's distortion of
Gaussian numbers of variance one and tr(D) of the block LDL decomposition of the rotated input: the
rotations make weights Gaussian, and spread the errors of a Hadamard block evenly over its rows
(QuIP#, arXiv 2402.04396, section 4).

Of factors, which are coded one after the other, the error is that of a trial with noise in the
place of codes, since the second one is fitted to what has become of the first.

Shapes: in and out are the channels of a linear, r the rank of its factors.
"""

from dataclasses import dataclass

import torch
from torch import nn

from casp_plugin.maths.hadamard import largest_block
from casp_plugin.maths.incoherence import block_scales, coding_noise
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


@dataclass(frozen=True)
class _CodedLatent:
    """Second moments of a latent ``z = D x``, and of what noise in D adds to it, ``e = N x``.

    :param moment: E[z z^T], shape (r, r)
    :param cross: E[z e^T]
    :param noise: E[e e^T]
    """

    moment: torch.Tensor
    cross: torch.Tensor
    noise: torch.Tensor


class CodebookErrors:
    """Output errors of layers under codebook schemes; what ``RoundingErrors`` is for others."""

    def __init__(self):
        self._spread: dict[tuple, tuple[torch.Tensor, float]] = {}
        self._latents: dict[tuple, tuple[nn.Module, _CodedLatent]] = {}

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

        Of a factored layer both factors are coded, and ``up`` is fitted to the coded ``down``, as
        codebook modifiers do.

        :param module: the layer, dense or factored
        :param scheme: of its weight, or of both its factors
        :param moment: E[x x^T], shape (in, in), of the layer's input
        :param row_weights: w, shape (out,)
        :param latent: not read: the moment of the latent is that of the coded ``down``
        :param block: 1, since the scheme rotates by itself
        """
        distortion = scheme.distortion
        if not isinstance(module, LowRankLinear):
            return _Known(distortion * self._error(module, scheme, moment, row_weights))
        size = distortion**0.5
        known = self._latent(module.latent, scheme, moment)
        # E[z z'^T] and E[z' z'^T] of the latent z and what it becomes, z'
        kept = known.moment + size * known.cross  # (r, r)
        coded = kept + size * known.cross.T + distortion * known.noise
        dense = module.up.weight.float()  # (out, r)
        scheme = scheme.fitting(tuple(dense.shape))
        input = scheme.input(coded, 0, DAMPING)
        up = torch.linalg.solve(input.moment, (dense @ kept).T).T
        up = up + size * coding_noise(up, input, scheme.block, 1)
        # of every row of U z - U' z'
        squares = (dense @ known.moment * dense).sum(1) - 2 * (dense @ kept * up).sum(1)
        squares += (up @ coded * up).sum(1)
        return _Known((squares.clamp_min(0) @ row_weights.to(squares)).item())

    def finish(self) -> None:
        """Forget the inputs."""
        self._spread.clear()
        self._latents.clear()

    def _latent(
        self, down: nn.Linear, scheme: CodebookScheme, moment: torch.Tensor
    ) -> "_CodedLatent":
        """Return what a code of distortion one makes of a first factor, once for all its readers
        and widths."""
        weight = down.weight.float()  # (r, in)
        scheme = scheme.fitting(tuple(weight.shape))
        key = id(down), scheme.block, scheme.tile
        if key not in self._latents:
            moment = moment.float()
            noise = coding_noise(weight, scheme.input(moment, 0, DAMPING), scheme.block, 0)
            seen = torch.cat([weight, noise]) @ moment  # (2 r, in)
            products = seen @ torch.cat([weight, noise]).T
            (own, cross), (_, other) = (
                rows.tensor_split(2, 1) for rows in products.tensor_split(2)
            )
            self._latents[key] = down, _CodedLatent(own, cross, other)
        return self._latents[key][1]

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

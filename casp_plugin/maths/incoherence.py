"""Random Hadamard rotations of both sides of a weight, which make its entries almost Gaussian.

``W = diag(r) H_o V H_i diag(s)``: V holds values of variance one, s the random signs of the inputs,
H are orthonormal Hadamard matrices in blocks, and r scales the outputs, with random signs of their
own (QuIP#, arXiv 2402.04396, section 3). Scales by block of outputs pass through H_o, so one number
an output row holds the signs, the scale of the block, and what a row needs beside.

Shapes: out and in are those of a weight.
"""

from dataclasses import dataclass

import torch

from casp_plugin.maths.block_ldl import (
    BlockLDL,
    block_ldl,
    corrected,
    dampened,
    round_by_blocks,
    round_by_tiles,
)
from casp_plugin.maths.codecs.lattice import LatticeCodec
from casp_plugin.maths.codecs.trellis import TrellisCodec
from casp_plugin.maths.hadamard import largest_block, rotate, rotate_moment

__all__ = [
    "CodedWeight",
    "Input",
    "block_scales",
    "code_weights",
    "coding_noise",
    "decoded_weight",
    "random_signs",
]


#: targets vary more than weights, by what blocks of columns feed back; 1.01 to 1.04 leave the least
#: error on SmolLM2
_FEEDBACK = 1.02
#: rows of a tile at least where outputs have a metric
_TILE_ROWS = 16


def random_signs(count: int, seed: int) -> torch.Tensor:
    """Return random signs, shape (count,), float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (count,), generator=generator).float() * 2 - 1


@dataclass(frozen=True)
class CodedWeight:
    """A weight as a checkpoint stores it.

    :param codes: of V, in the shape of the codec
    :param scale: r, shape (out,)
    """

    codes: torch.Tensor
    scale: torch.Tensor


class Input:
    """An input that weights read, rotated and decomposed.

    :param moment: H = E[x x^T], shape (in, in), float32
    :param signs: s, shape (in,)
    :param most: size of the Hadamard blocks at most
    :param columns: columns of the blocks that are coded together
    :param damping: share of the mean diagonal that is added to the diagonal
    """

    def __init__(
        self, moment: torch.Tensor, signs: torch.Tensor, most: int, columns: int, damping: float
    ):
        self.signs = signs
        self.block = largest_block(len(moment), most)  # 1 for no rotation
        self.moment = dampened(moment, damping)
        self._dampening = damping * moment.diagonal().mean().item()
        rotated = rotate_moment(self.moment * signs * signs[:, None], self.block)
        self.ldl: BlockLDL = block_ldl(rotated, columns)

    @property
    def spread(self) -> float:
        """Return the output energy of a row that is coded with errors of variance one."""
        return self.ldl.spread(self._dampening)

    def corrected(
        self, weight: torch.Tensor, change: torch.Tensor | None, share: float
    ) -> torch.Tensor:
        """Return the weight that makes up for a share of a change, see ``block_ldl.corrected``; the
        weight itself where the change is None."""
        if change is None or not share:
            return weight
        return corrected(weight, self.moment, change, share)

    def rotate(self, weight: torch.Tensor) -> torch.Tensor:
        """Return ``W diag(s) H_i``, its own inverse up to the order of the two."""
        return rotate(weight * self.signs, self.block)


def block_scales(weight: torch.Tensor, block: int) -> torch.Tensor:
    """Return the root mean square of the weights of each row's Hadamard block, shape (out,).

    :param weight: shape (out, in)
    :param block: rows of a block
    """
    squares = weight.square().mean(1).unflatten(0, (-1, block)).mean(1)
    return squares.sqrt().repeat_interleave(block)


def code_weights(
    weights: list[torch.Tensor],
    input: Input,
    codec: TrellisCodec | LatticeCodec,
    most: int,
    seed: int,
    change: torch.Tensor | None = None,
    share: float = 0.0,
    metrics: list[torch.Tensor] | None = None,
) -> list[CodedWeight]:
    """Return the codes of weights that read one input, by BlockLDLQ on both-sided rotations.

    Afterwards rows are scaled by least squares in the metrics of input and outputs.

    :param weights: W, shape (out, in) each, float32
    :param input: what they read
    :param codec: of all of them
    :param most: size of the Hadamard blocks of outputs at most
    :param seed: of the signs of outputs
    :param change: C = E[(x_dense - x) x^T], shape (in, in), see ``block_ldl.corrected``
    :param share: of the change that targets make up for
    :param metrics: G of the outputs of every weight, positive definite, shape (out, out); None for
        identities
    """
    rotated, signs, blocks = [], [], []
    for weight in weights:
        target = input.corrected(weight, change, share)
        out = len(weight)
        blocks.append(largest_block(out, most))
        signs.append(random_signs(out, seed + out).to(weight))
        turned = rotate((input.rotate(target) * signs[-1][:, None]).T, blocks[-1]).T
        rotated.append(turned)
    heights = [len(weight) for weight in weights]
    gain = _FEEDBACK * codec.gain
    scales = [gain * block_scales(own, block) for own, block in zip(rotated, blocks, strict=True)]
    scale = torch.cat(scales)[:, None].clamp_min(torch.finfo(torch.float32).tiny)
    if metrics is None:
        rounded, codes = _rounded(torch.cat(rotated), scale, input.ldl, None, codec)
    else:
        parts = []
        for own, by_row, metric, sign, block in zip(
            rotated, scale.split(heights), metrics, signs, blocks, strict=True
        ):
            height = max(codec.rows, largest_block(len(own), _TILE_ROWS))
            rows = block_ldl(rotate_moment(metric * sign * sign[:, None], block), height)
            parts.append(_rounded(own, by_row, input.ldl, rows, codec))
        rounded, codes = map(torch.cat, zip(*parts, strict=True))
    coded = []
    # E[x' x^T], x' the input that the targets are for
    seen = input.moment if change is None else input.moment + share * change
    parts = zip(
        weights,
        rounded.split(heights),
        codes.split([height // codec.rows for height in heights]),
        scales,
        signs,
        blocks,
        strict=True,
    )
    for weight, values, own, row_scale, sign, block in parts:
        # in the basis of the weight, with the scale of its block and its signs
        plain = rotate((values * row_scale[:, None]).T, block).T * sign[:, None]
        plain = rotate(plain, input.block) * input.signs
        wanted, found = weight @ seen, plain @ input.moment
        if metrics is None:
            fit = (wanted * plain).sum(1) / (found * plain).sum(1)  # (out,)
        else:
            fit = _scales(wanted, found, plain, metrics[len(coded)])
        fit = torch.where(fit.isfinite(), fit, 0)
        coded.append(CodedWeight(own.contiguous(), fit * row_scale * sign))
    return coded


def _rounded(
    weight: torch.Tensor,
    scale: torch.Tensor,
    columns: BlockLDL,
    rows: BlockLDL | None,
    codec: TrellisCodec | LatticeCodec,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values, of variance one, and the codes of a weight.

    :param weight: shape (out, in)
    :param scale: that values are multiplied by, shape (out, 1)
    :param rows: of the metric of outputs; None for the identity
    """
    if rows is None:
        bands = {}

        def encode_band(target: torch.Tensor, index: int) -> torch.Tensor:
            bands[index], values = codec.encode(target)
            return values

        rounded = round_by_blocks(weight / scale, columns, encode_band)
        return rounded, torch.stack([bands[index] for index in range(len(bands))], 1)
    height = rows.blocks.shape[1]
    by_tile = scale.unflatten(0, (-1, height))  # (rows, a, 1)
    parts = height // codec.rows  # of a tile, each with a code of its own
    codes = []

    def encode(target: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        own, values = codec.encode((target / by_tile[row]).flatten(0, 1))
        codes.append((row, column, own.unflatten(0, (-1, parts))))
        return values.view_as(target) * by_tile[row]

    rounded = round_by_tiles(weight, rows, columns, encode) / scale
    row, column, own = (torch.cat(values) for values in zip(*codes, strict=True))
    shape = len(by_tile), len(columns.blocks), *own.shape[1:]
    placed = own.new_empty(shape).index_put_((row, column), own)  # (., ., parts, ...)
    return rounded, placed.transpose(1, 2).flatten(0, 1)


def _scales(
    wanted: torch.Tensor, found: torch.Tensor, values: torch.Tensor, metric: torch.Tensor
) -> torch.Tensor:
    """Return the scales f of rows that leave the least E[e^T G e], e = W x' - diag(f) V x.

    :param wanted: W E[x' x^T], shape (out, in)
    :param found: V E[x x^T]
    :param values: V
    :param metric: G, shape (out, out)
    """
    system = metric * (found @ values.T)
    regular = system.diagonal().mean() * 1e-6 + (system.diagonal() == 0)
    right = (metric * (values @ wanted.T)).sum(1)
    return torch.linalg.solve(system + regular.diag_embed(), right)


def coding_noise(weight: torch.Tensor, input: Input, most: int, seed: int) -> torch.Tensor:
    """Return an error like that of coding a weight by a code of distortion one, shape (out, in).

    Gaussian noise stands for what the code does: BlockLDLQ leaves it times L^-1.

    :param weight: shape (out, in)
    :param input: what it reads
    :param most: size of the Hadamard blocks of outputs at most
    :param seed: of the noise
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(weight.shape, generator=generator).to(weight)
    noise *= block_scales(weight, largest_block(len(weight), most))[:, None]
    error = input.ldl.weight_error(noise)
    return rotate(error, input.block) * input.signs


def decoded_weight(
    values: torch.Tensor, scale: torch.Tensor, signs: torch.Tensor, most: int
) -> torch.Tensor:
    """Return ``diag(r) H_o V H_i diag(s)``.

    :param values: V, shape (out, in)
    :param scale: r, shape (out,)
    :param signs: s, shape (in,)
    :param most: size of the Hadamard blocks at most, on both sides
    """
    out, columns = values.shape
    turned = rotate(values.T, largest_block(out, most)).T
    return rotate(turned, largest_block(columns, most)) * signs * scale[:, None]

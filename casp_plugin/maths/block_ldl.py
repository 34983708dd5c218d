"""Rounding of a weight block of columns by block of columns, later errors fed back (BlockLDLQ).

With H = L D L^T, L unit lower triangular in blocks and D block-diagonal, the output error of a
weight error E is ``tr(E H E^T) = sum_b tr((E L)_b D_b (E L)_b^T)``. Blocks are rounded from the
last to the first, each at a target that holds what the blocks behind it have lost, so that
``(E L)_b`` is the block's own rounding error and nothing more (QuIP#, arXiv 2402.04396, section
4.2; GPTQ, arXiv 2210.17323, is the case of single columns).

With a metric G = M B M^T of the outputs as well, the loss ``tr(G E H E^T)`` is the sum over tiles
of rows and columns of the same in ``M^T E L`` (YAQA, arXiv 2505.22988, section 4): a tile is
rounded at a target that holds what the tiles below it, behind it, and both have lost.

The order of blocks is free: the ones of the least energy come first, so that they are rounded last,
when none is left to make up for their errors (as GPTQ's activation order has it).

Shapes: out and in are those of a weight, a rows and b columns of a block.
"""

from collections.abc import Callable

import torch

__all__ = [
    "BlockLDL",
    "block_ldl",
    "corrected",
    "dampened",
    "round_by_blocks",
    "round_by_tiles",
]

#: columns whose feedback is applied at once, as GPTQ does
_PANEL = 128
#: random vectors that estimate a norm
_PROBES = 32


def dampened(moment: torch.Tensor, fraction: float) -> torch.Tensor:
    """Return a second moment with a share of its mean diagonal added to the diagonal.

    :param moment: H, shape (in, in)
    :param fraction: share of the mean of the diagonal; channels that are always zero count 1 more
    """
    diagonal = moment.diagonal()
    moment = moment.clone()
    moment.diagonal().add_(fraction * diagonal.mean() + (diagonal == 0).to(moment.dtype))
    return moment


class BlockLDL:
    """H = L D L^T in blocks of b columns, taken in an order of their own.

    :ivar lower: L, shape (in, in), in that order; its diagonal blocks are identities
    :ivar blocks: D, shape (in / b, b, b), in the order of H
    :ivar order: the blocks of H in the order of L, shape (in / b,)
    """

    def __init__(self, lower: torch.Tensor, blocks: torch.Tensor, order: torch.Tensor):
        self.lower = lower
        self.blocks = blocks
        self.order = order

    @property
    def columns(self) -> torch.Tensor:
        """Return the columns of H in the order of L, shape (in,)."""
        return _columns(self.order, self.blocks.shape[1])

    def weight_error(self, rounding: torch.Tensor) -> torch.Tensor:
        """Return the error of a weight whose blocks are rounded with given errors, which is these
        times L^-1.

        :param rounding: shape (out, in), in the order of L
        :return: shape (out, in), in the order of H
        """
        error = torch.empty_like(rounding)
        error[:, self.columns] = torch.linalg.solve_triangular(
            self.lower, rounding, upper=False, left=False, unitriangular=True
        )
        return error

    def spread(self, dampening: float) -> float:
        """Return the output energy of a row whose blocks are rounded with errors of variance one.

        That is tr(D), and without the dampening d that H contains ``tr(D) - d |L^-1|^2``, the norm
        estimated by random vectors.

        :param dampening: d
        """
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(_PROBES, len(self.lower), generator=generator).to(self.lower)
        lost = self.weight_error(probes)
        trace = self.blocks.diagonal(dim1=1, dim2=2).sum()
        return (trace - dampening * lost.square().sum() / _PROBES).item()


def block_ldl(moment: torch.Tensor, size: int) -> BlockLDL:
    """Return the block LDL decomposition of a positive definite second moment, blocks in the order
    of their energy.

    L = C blockdiag(C_bb)^-1, with C the lower Cholesky factor of H in this order.

    :param moment: H, shape (in, in)
    :param size: b, which divides the columns
    :raises torch.linalg.LinAlgError: if H is not positive definite
    """
    order = moment.diagonal().unflatten(0, (-1, size)).sum(1).argsort(stable=True)
    columns = _columns(order, size)
    factor = torch.linalg.cholesky(moment[columns[:, None], columns])  # C
    count = len(order)
    tall = factor.unflatten(1, (count, size)).transpose(0, 1)  # (blocks, in, b)
    own = torch.stack([tall[b, b * size : (b + 1) * size] for b in range(count)])  # C_bb
    lower = torch.linalg.solve_triangular(own, tall, upper=False, left=False)  # X C_bb = tall
    blocks = torch.empty_like(own)
    blocks[order] = own @ own.mT
    return BlockLDL(lower.transpose(0, 1).flatten(1), blocks, order)


def _columns(order: torch.Tensor, size: int) -> torch.Tensor:
    """Return the columns of blocks, shape (blocks * size,)."""
    return (order[:, None] * size + torch.arange(size, device=order.device)).flatten()


def round_by_blocks(
    weight: torch.Tensor, ldl: BlockLDL, encode: Callable[[torch.Tensor, int], torch.Tensor]
) -> torch.Tensor:
    """Return the rounded weight, block after block from the last to the first.

    :param weight: W, shape (out, in)
    :param ldl: of the second moment of its input
    :param encode: returns the rounded values of a target, shape (out, b), given the index of the
        block
    :return: shape (out, in)
    """
    size, columns = ldl.blocks.shape[1], weight.shape[1]
    panel = max(_PANEL // size, 1) * size
    order = ldl.order.tolist()
    weight = weight[:, ldl.columns]
    target = weight.clone()  # takes up the feedback of the panels behind
    rounded = torch.empty_like(weight)
    error = torch.empty_like(weight)
    for end in range(columns, 0, -panel):
        start = max(end - panel, 0)
        for first in range(end - size, start - 1, -size):
            own, later = slice(first, first + size), slice(first + size, end)
            moved = target[:, own] + error[:, later] @ ldl.lower[later, own]
            rounded[:, own] = encode(moved, order[first // size])
            error[:, own] = weight[:, own] - rounded[:, own]
        if start:  # (out, panel) @ (panel, start)
            target[:, :start] += error[:, start:end] @ ldl.lower[start:end, :start]
    return torch.empty_like(rounded).index_copy_(1, ldl.columns, rounded)


def round_by_tiles(
    weight: torch.Tensor,
    rows: BlockLDL,
    columns: BlockLDL,
    encode: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return the rounded weight, tile after tile from the last row and column to the first.

    Tiles on a diagonal from below left to above right wait for none of each other, and are rounded
    together, in one panel of columns after the other: a product takes the errors of a whole panel
    to the columns before it.

    :param weight: W, shape (out, in)
    :param rows: of the metric of its outputs, in blocks of a
    :param columns: of the second moment of their input
    :param encode: returns the rounded values of targets, shape (n, a, b), given the indices of
        their tiles among rows and among columns, shape (n,)
    :return: shape (out, in)
    """
    height, width = rows.blocks.shape[1], columns.blocks.shape[1]
    tall, wide = len(rows.blocks), len(columns.blocks)
    # from here on rows count from the last one up, so that a diagonal is a slice of both
    upwards = torch.arange(len(weight), device=weight.device).view(tall, height).flip(0).flatten()
    places = rows.columns[upwards][:, None], columns.columns
    row_order = rows.order.flip(0)
    target = weight[places].view(tall, height, wide, width)
    rounded = torch.empty_like(target)
    fed_back = torch.zeros_like(target)  # E L of the panels behind
    below = _without_diagonal(rows.lower.T[upwards][:, upwards], height)  # (tall, a, out)
    panel = max(_PANEL // width, tall)
    for stop in range(wide, 0, -panel):
        start = max(stop - panel, 0)
        count, own = stop - start, slice(start * width, stop * width)
        behind = _without_diagonal(columns.lower.T[own, own], width).mT.contiguous()  # (., P, b)
        error = weight.new_zeros(tall, height, count, width)  # E
        carried = weight.new_zeros(count, tall, height, width)  # E L
        for wave in range(tall + count - 1):
            first, end = max(wave - count + 1, 0), min(wave + 1, tall)
            row = torch.arange(first, end, device=weight.device)
            inside = row + (count - 1 - wave)  # column in the panel
            column, left = inside + start, first + count - 1 - wave
            across = slice(left, left + end - first)
            # (n, a, P) @ (n, P, b), (n, a, done) @ (n, done, b)
            lost = torch.bmm(error[first:end].flatten(2), behind[across])
            lost += fed_back[row, :, column]
            done = carried[across, :end].flatten(1, 2)
            moved = target[row, :, column] + lost
            moved += torch.bmm(below[first:end, :, : end * height], done)
            values = encode(moved, row_order[first:end], columns.order[column])
            rounded[row, :, column] = values
            error[row, :, inside] = target[row, :, column] - values
            carried[inside, row] = error[row, :, inside] + lost
        if start:
            before = columns.lower[own, : start * width]
            update = error.flatten(2).flatten(0, 1) @ before  # (out, P) @ (P, before)
            fed_back[:, :, :start] += update.view(tall, height, start, width)
    return torch.empty_like(weight).index_put_(places, rounded.flatten(2).flatten(0, 1))


def _without_diagonal(square: torch.Tensor, size: int) -> torch.Tensor:
    """Return a matrix by blocks of rows, shape (n, size, n * size), zero in its diagonal blocks."""
    blocks = square.clone().unflatten(0, (-1, size))
    for place, rows in enumerate(blocks):
        rows[:, place * size : (place + 1) * size] = 0
    return blocks


def corrected(
    weight: torch.Tensor, moment: torch.Tensor, change: torch.Tensor, share: float
) -> torch.Tensor:
    """Return the weight that makes up for inputs that earlier layers have changed.

    ``W (I + a C H^-1)``, with C = E[(x_dense - x) x^T], is for a = 1 the least-squares fit of
    ``W x_dense`` by a function of x; less than that keeps it from fitting the calibration data
    (as in GPTAQ, arXiv 2504.02692, without its order of columns).

    :param weight: W, shape (out, in)
    :param moment: H = E[x x^T], positive definite, shape (in, in)
    :param change: C, shape (in, in)
    :param share: a
    """
    return weight + share * torch.linalg.solve(moment, (weight @ change).mT).mT

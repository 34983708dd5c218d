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
    together.

    :param weight: W, shape (out, in)
    :param rows: of the metric of its outputs, in blocks of a
    :param columns: of the second moment of their input
    :param encode: returns the rounded values of targets, shape (n, a, b), given the indices of
        their tiles among rows and among columns, shape (n,)
    :return: shape (out, in)
    """
    height, width = rows.blocks.shape[1], columns.blocks.shape[1]
    tall, wide = len(rows.blocks), len(columns.blocks)
    # M^T and L by tile, without the identities of the diagonal
    below = rows.lower.T.clone().unflatten(0, (tall, height))  # (rows, a, out)
    behind = columns.lower.clone().unflatten(1, (wide, width)).transpose(0, 1)  # (., in, b)
    for tile in range(tall):
        below[tile, :, tile * height : (tile + 1) * height] = 0
    for tile in range(wide):
        behind[tile, tile * width : (tile + 1) * width] = 0
    target = weight[rows.columns[:, None], columns.columns].view(tall, height, wide, width)
    rounded = torch.empty_like(target)
    error = torch.zeros_like(target)  # E
    carried = weight.new_zeros(wide, tall, height, width)  # E L
    for wave in range(tall + wide - 1):
        first, end = max(wave - wide + 1, 0), min(wave + 1, tall)
        place = torch.arange(first, end, device=weight.device)  # from the last row
        row, column = tall - 1 - place, wide - 1 - wave + place
        # (n, a, in) @ (n, in, b), (n, a, out) @ (n, out, b)
        lost = torch.bmm(error[row].flatten(2), behind[column])
        moved = target[row, :, column] + lost + below[row] @ carried[column].flatten(1, 2)
        values = encode(moved, rows.order[row], columns.order[column])
        rounded[row, :, column] = values
        own = target[row, :, column] - values
        error[row, :, column] = own
        carried[column, row] = own + lost
    placed = torch.empty_like(weight)
    placed[rows.columns[:, None], columns.columns] = rounded.flatten(2).flatten(0, 1)
    return placed


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

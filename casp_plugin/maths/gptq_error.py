"""Error that GPTQ leaves in the output of a layer, without a pass through all its columns.

GPTQ (arXiv 2210.17323) rounds column after column, and moves the columns behind so that they make
up for it. With the columns in its order and H = R R^T, R upper triangular, the weight error e that
is left costs ``e H e^T = sum_j (R_jj r_j)^2``, with r_j the rounding error of column j as it is by
then (LDLQ, QuIP, arXiv 2307.13304, eq. 7). To first order, r_j is the rounding error of the weight
as it was, and all columns are rounded at once.

Two corrections make that hold for real layers:

- A few channels carry most of the energy of an input (massive activations, arXiv 2402.17762), and
  what they move into other columns may leave the range of the codes. They come first in the order,
  so the leading columns are rounded one after another and the others are moved before they are
  rounded.
- GPTQ adds a dampening d to the diagonal of H, which R contains. The error on the data is without
  ``d |e|^2``.

Shapes: in are the columns of a weight, K leading and F following ones; s rows.
"""

from dataclasses import dataclass

import torch

__all__ = ["ColumnCosts", "column_costs"]

#: number of columns that are rounded one after another
LEADING = 32
#: number of random vectors that estimate how far an error spreads
PROBES = 32


@dataclass(frozen=True)
class ColumnCosts:
    """Costs of rounding the columns of a weight that reads one input.

    :param order: the columns in the order of GPTQ, shape (in,)
    :param leading: R of the leading columns, shape (K, K)
    :param moved: change of the following columns by errors of the leading ones, shape (K, F)
    :param following: energy of the output by squared rounding error of a following column, shape
        (F,); with the dampening, but without what spreads from column to column
    :param dampening: d
    """

    order: torch.Tensor
    leading: torch.Tensor
    moved: torch.Tensor
    following: torch.Tensor
    dampening: float

    @property
    def leading_moment(self) -> torch.Tensor:
        """Return the moment by which GPTQ rounds the leading columns as it does among all, shape
        (K, K): that of what the following channels do not explain."""
        return self.leading @ self.leading.T

    def error(
        self, leading: torch.Tensor, following: torch.Tensor, rounded: torch.Tensor
    ) -> torch.Tensor:
        """Return the error of a weight's rows, ``e H e^T`` without the dampening, shape (s,).

        :param leading: rounding error of the leading columns, in order, shape (s, K)
        :param following: change of the following columns, rounded and moved, shape (s, F)
        :param rounded: rounding error alone of the moved columns, shape (s, F)
        """
        error = (leading @ self.leading).square().sum(1) + rounded.square() @ self.following
        changed = leading.square().sum(1) + following.square().sum(1)
        return (error - self.dampening * changed).clamp_min(0)


def column_costs(second_moment: torch.Tensor, dampening_frac: float = 0.01) -> ColumnCosts:
    """Return the costs of rounding columns by GPTQ in descending order of energy (``actorder:
    static``).

    :param second_moment: H = E[x x^T], shape (in, in)
    :param dampening_frac: share of the mean diagonal that is added to it, as GPTQ does
    :return: float32; of rounding to nearest where H is not positive definite, as GPTQ then does
    """
    moment = second_moment.float()
    energy = moment.diagonal()
    order = energy.argsort(descending=True)
    count = min(LEADING, len(order))  # K
    dampening = dampening_frac * energy.mean()
    backwards = order.flip(0)
    ordered = moment[backwards][:, backwards]  # (in, in), a copy
    ordered.diagonal().add_(dampening)
    lower, failed = torch.linalg.cholesky_ex(ordered)
    if failed:
        first, last = energy[order].tensor_split([count])
        moved = moment.new_zeros(count, len(last))
        return ColumnCosts(order, first.sqrt().diag(), moved, last, 0.0)
    root = lower.flip(0, 1)  # R, upper triangular: H = R R^T in the order of GPTQ
    following = root[count:, count:]  # (F, F)
    # R_KF R_FF^-1: (K, F) @ (F, F)
    moved = -torch.linalg.solve_triangular(following, root[:count, count:], upper=True, left=False)
    variances = following.diagonal().square()  # E[x_j^2 given the channels behind], (F,)
    # r_j changes all columns by r_j R_jj (R^-1)_j, and |(R^-1)_j|^2 is the mean of (R^-1 z)_j^2
    # over random signs z
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (len(variances), PROBES), generator=generator) * 2 - 1
    # (F, F) @ (F, probes)
    spread = torch.linalg.solve_triangular(following, signs.to(following), upper=True)
    others = variances * spread.square().mean(1) - 1  # changes beside r_j itself, (F,)
    costs = variances - dampening * others.clamp_min(0)
    return ColumnCosts(order, root[:count, :count], moved, costs.clamp_min(0), dampening.item())

"""Bits of every unit within a budget: pure functions on numbers.

Both methods end in one multiple-choice knapsack over integer bytes, solved exactly, so that the
average meets the budget. They differ in the cost that the knapsack minimises: the measured cost of
a candidate, or its distance from the paper's closed form.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

__all__ = [
    "BudgetError",
    "choose",
    "closed_form_bits",
    "distance_costs",
    "pareto",
    "reachable_bytes",
]

#: the solver stops once the cost is provably this close to the best
RELATIVE_GAP = 1e-9
#: costs this many times smaller than the largest are solved for again without it
_COARSE = 100


class BudgetError(ValueError):
    """Raised where no choice of candidates meets the budget."""


def closed_form_bits(
    importances: Sequence[float], average_bits: float, sizes: Sequence[float]
) -> np.ndarray:
    """Return the bits that minimise ``sum n_l s_l 4^(-b_l)`` under ``sum n_l b_l = B sum n_l``.

    ``b_l = B + 1/2 log2(s_l / geometric mean of s)`` (CASP, arXiv 2503.05936, eq. 12), with the
    mean weighted by the sizes; equal sizes give the paper's formula.

    :param importances: s_l > 0, length L
    :param average_bits: B
    :param sizes: number of weights of every unit, n_l > 0, length L
    :return: real-valued bits, shape (L,), float64
    :raises ValueError: if an importance or a size is not positive and finite
    """
    s = np.asarray(importances, dtype=np.float64)
    n = np.asarray(sizes, dtype=np.float64)
    for name, values in (("importances", s), ("sizes", n)):
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise ValueError(f"{name} must be positive and finite, got {values.tolist()}")
    log_s = np.log2(s)
    return average_bits + 0.5 * (log_s - np.average(log_s, weights=n))


def distance_costs(
    bits: Sequence[float], candidates: Sequence[Sequence[float]], sizes: Sequence[float]
) -> list[list[float]]:
    """Return the cost of every candidate: its squared distance from the wished real-valued bits.

    ``n_l (b - b_l)^2`` with b_l clipped to the candidates' range: :func:`choose` on these
    costs rounds the closed form and repairs the budget in one step.

    :param bits: wished bits, length L
    :param candidates: bit widths on offer for every unit, L lists
    :param sizes: number of weights of every unit, length L
    """
    return [
        [size * (b - min(max(wish, min(row)), max(row))) ** 2 for b in row]
        for wish, row, size in zip(bits, candidates, sizes, strict=True)
    ]


def reachable_bytes(bytes_: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return the smallest and the largest total of bytes that the candidates allow."""
    return sum(min(row) for row in bytes_), sum(max(row) for row in bytes_)


def choose(
    costs: Sequence[Sequence[float]],
    bytes_: Sequence[Sequence[int]],
    budget_bytes: int,
    slack: int = 0,
) -> list[int]:
    """Pick one candidate per unit, at the least total cost within the budget.

    A multiple-choice knapsack, solved to optimality by HiGHS (scipy ``milp``). The budget is spent:
    the total lies within ``slack`` bytes of it, or, where no choice lands there, within ``slack``
    bytes of the largest total that fits.

    :param costs: cost of every candidate, L lists
    :param bytes_: bytes of every candidate, same shape
    :param budget_bytes: bytes available in all
    :param slack: bytes that may be left over
    :return: index of the chosen candidate of every unit, length L
    :raises BudgetError: if even the smallest candidates exceed the budget
    """
    least, most = reachable_bytes(bytes_)
    if budget_bytes < least:
        raise BudgetError(f"budget of {budget_bytes} bytes is below the least reachable {least}")
    budget_bytes = min(budget_bytes, most)
    chosen = _knapsack(costs, bytes_, budget_bytes - slack, budget_bytes)
    if chosen is None:
        fullest = _knapsack([[-b for b in row] for row in bytes_], bytes_, least, budget_bytes)
        total = sum(row[i] for row, i in zip(bytes_, fullest, strict=True))
        chosen = _knapsack(costs, bytes_, total - slack, budget_bytes)
    return chosen


def pareto(
    costs: Sequence[Sequence[float]], bytes_: Sequence[Sequence[int]], points: int
) -> list[tuple[int, float]]:
    """Return the least cost at budgets spread evenly from the least to the largest total.

    :param costs: cost of every candidate, L lists
    :param bytes_: bytes of every candidate, same shape
    :param points: number of budgets, at least two
    :return: (bytes taken, total cost) by rising budget, both monotone
    """
    least, most = reachable_bytes(bytes_)
    curve = []
    for budget_bytes in np.linspace(least, most, points).astype(int).tolist():
        chosen = choose(costs, bytes_, budget_bytes, slack=budget_bytes)
        curve.append(
            (
                sum(row[i] for row, i in zip(bytes_, chosen, strict=True)),
                sum(row[i] for row, i in zip(costs, chosen, strict=True)),
            )
        )
    return curve


def _knapsack(
    costs: Sequence[Sequence[float]], bytes_: Sequence[Sequence[int]], low: int, high: int
) -> list[int] | None:
    """Return the least-cost choice whose bytes lie in [low, high]; None if there is none."""
    base = sum(min(row) for row in bytes_)
    extra = [[b - min(row) for b in row] for row in bytes_]
    # small integers keep the solver's tolerances far below one step
    step = math.gcd(*(b for row in extra for b in row)) or 1
    low_steps, high_steps = max(0, -(-(low - base) // step)), (high - base) // step
    if low_steps > high_steps:
        return None

    flat = np.array([c for row in costs for c in row], dtype=np.float64)
    unit = np.repeat(np.arange(len(costs)), [len(row) for row in costs])
    one_each = csr_array((np.ones(len(unit)), (unit, np.arange(len(unit)))))
    weights = np.array([b // step for row in extra for b in row], dtype=np.float64)
    least = np.array([min(row) for row in costs])
    allowed = np.ones_like(flat)
    while True:
        scale = np.abs(flat * allowed).max()
        result = milp(
            flat * allowed / scale if scale > 0 else flat,
            integrality=np.ones_like(flat),
            bounds=Bounds(0, allowed),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(weights[None], low_steps, high_steps),
            ],
            options={"mip_rel_gap": RELATIVE_GAP},
        )
        if result.x is None:
            return None
        picked = np.flatnonzero(result.x > 0.5)
        # the solver's absolute tolerance is a share of the largest cost: candidates too dear for
        # any choice as good as this one are taken out, and the rest is solved again
        spare = flat[picked].sum() - least.sum()
        allowed = (flat - least[unit] <= spare * (1 + 1e-9)).astype(np.float64)
        allowed[picked] = 1
        if np.abs(flat * allowed).max() >= scale / _COARSE:
            break
    starts = np.searchsorted(unit, np.arange(len(costs)))
    return (picked - starts).tolist()

"""Bits of every unit where the losses of groups do not add up: pure functions on numbers.

With ``e_g`` the cost of a group divided by its largest cost, this value is minimised ::

    sum_g a_g e_g + sum_{g<h} b_gh e_g e_h        (a, b >= 0, summing to 1)

It grows with every e_g, so at its minimum every group lies on its own frontier of cost against
bytes: combinations of points of the frontiers are compared, then every group is solved exactly at
its share of the bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from casp_plugin.maths.knapsack import BudgetError, choose, reachable_bytes

__all__ = ["Coupled", "Frontier", "choose_coupled", "frontier_of"]

#: limits on the points of a frontier and on the combinations that are compared; longer frontiers
#: are thinned out, evenly over their bytes
MOST_POINTS, MOST_COMBINATIONS = 2**14, 2**22


class Frontier:
    """Frontier of a group of units: the least cost at every number of bytes.

    :param bytes: rising, shape (points,), int64
    :param costs: falling, shape (points,), float64
    """

    def __init__(self, bytes_: np.ndarray, costs: np.ndarray, steps: list):
        self.bytes, self.costs, self._steps = bytes_, costs, steps

    def choice(self, point: int) -> list[int]:
        """Return the candidate of every unit at a point."""
        chosen = []
        for before, candidate in reversed(self._steps):
            chosen.append(int(candidate[point]))
            point = before[point]
        return chosen[::-1]


def frontier_of(costs: Sequence[Sequence[float]], bytes_: Sequence[Sequence[int]]) -> Frontier:
    """Return the choices, one candidate per unit, that no other beats in both bytes and cost.

    :param costs: cost of every candidate, one list per unit
    :param bytes_: bytes of every candidate, same shape
    """
    grain = max(1, sum(max(row) - min(row) for row in bytes_) // MOST_POINTS)
    taken, spent, steps = np.zeros(1, np.int64), np.zeros(1), []
    for byte_row, cost_row in zip(bytes_, costs, strict=True):
        sizes = np.add.outer(taken, np.array(byte_row, np.int64)).ravel()
        totals = np.add.outer(spent, np.array(cost_row, float)).ravel()
        order = np.lexsort((totals, sizes))
        least = np.minimum.accumulate(totals[order])
        order = order[np.r_[True, least[1:] < least[:-1]]]
        if len(order) > MOST_POINTS:
            last = np.r_[np.diff(sizes[order] // grain) > 0, True]  # the last of every grain
            last[0] = True
            order = order[last]
        steps.append(np.divmod(order, len(byte_row)))
        taken, spent = sizes[order], totals[order]
    return Frontier(taken, spent, steps)


def choose_coupled(
    frontiers: Mapping[str, Frontier],
    parts: Mapping[str, float],
    pairs: Mapping[str, float],
    budget_bytes: int,
) -> tuple[dict[str, int], float]:
    """Return the points of the groups' frontiers with the least value within a budget.

    :param frontiers: by group
    :param parts: a_g, by group
    :param pairs: b_gh, by ``g x h``
    :param budget_bytes: bytes of all groups together
    :return: point by group, and the value
    :raises BudgetError: if even the smallest points exceed the budget
    """
    *small, large = sorted(frontiers, key=lambda group: len(frontiers[group].bytes))
    sizes = frontiers[large].bytes
    least = sum(int(frontier.bytes[0]) for frontier in frontiers.values())
    if budget_bytes < least:
        raise BudgetError(f"budget of {budget_bytes} bytes is below the least reachable {least}")
    # combinations of all groups but the one with most points, which takes the bytes they leave
    points_each = int(MOST_COMBINATIONS ** (1 / max(len(small), 1)))
    kept = [_spread(len(frontiers[group].bytes), points_each) for group in small]
    grids = np.meshgrid(*kept, indexing="ij")
    points = {group: grid.ravel() for group, grid in zip(small, grids, strict=True)}
    left = budget_bytes - sum((frontiers[g].bytes[points[g]] for g in small), np.zeros(1, np.int64))
    fits = left >= sizes[0]
    points = {group: grid[fits] for group, grid in points.items()}
    points[large] = np.searchsorted(sizes, left[fits], side="right") - 1
    errors = {group: _relative(frontiers[group])[points[group]] for group in frontiers}
    value = sum(parts[group] * errors[group] for group in frontiers)
    for pair, share in pairs.items():
        first, second = pair.split(" x ")
        value = value + share * errors[first] * errors[second]
    best = int(value.argmin())
    return {group: int(points[group][best]) for group in frontiers}, float(value[best])


def _spread(count: int, most: int) -> np.ndarray:
    """Return at most ``most`` indices, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))


def _relative(frontier: Frontier) -> np.ndarray:
    """Return costs relative to the cost at the fewest bytes."""
    largest = frontier.costs[0]
    return frontier.costs / largest if largest > 0 else np.zeros_like(frontier.costs)


def _bytes_at(frontiers: Mapping[str, Frontier], points: Mapping[str, int]) -> int:
    return sum(int(frontiers[group].bytes[point]) for group, point in points.items())


@dataclass(frozen=True)
class Coupled:
    """Units in groups whose costs are weighted as a sensitivity study measured.

    :param groups: group of each unit
    :param parts: a_g, by group
    :param pairs: b_gh, by ``g x h``
    """

    groups: Sequence[str]
    parts: Mapping[str, float]
    pairs: Mapping[str, float]

    def solve(
        self,
        costs: Sequence[Sequence[float]],
        bytes_: Sequence[Sequence[int]],
        budget_bytes: int,
        points: int,
    ) -> tuple[list[tuple[int, float]], list[int]]:
        """Choose a candidate for every unit, and the best values at other budgets.

        :param costs: cost of every candidate, one list per unit
        :param bytes_: bytes of every candidate, same shape
        :param budget_bytes: bytes available in all
        :param points: number of other budgets, spread evenly over the reachable bytes
        :return: (bytes taken, value) at the other budgets; candidate of every unit at
            ``budget_bytes``
        :raises BudgetError: if even the smallest candidates exceed the budget
        """
        members: dict[str, list[int]] = {}
        for index, group in enumerate(self.groups):
            members.setdefault(group, []).append(index)
        frontiers = {
            group: frontier_of([costs[i] for i in inside], [bytes_[i] for i in inside])
            for group, inside in members.items()
        }

        def best(available_bytes: int) -> tuple[dict[str, int], float]:
            return choose_coupled(frontiers, self.parts, self.pairs, available_bytes)

        curve = []
        for other_bytes in np.linspace(*reachable_bytes(bytes_), points).astype(int).tolist():
            chosen_points, value = best(other_bytes)
            taken = _bytes_at(frontiers, chosen_points)
            curve.append((taken, value))
        chosen_points, _ = best(budget_bytes)
        errors = {g: _relative(frontiers[g])[point] for g, point in chosen_points.items()}
        slope = self._slopes(errors)
        left = budget_bytes - _bytes_at(frontiers, chosen_points)
        chosen = {}
        for group in sorted(members, key=slope.get, reverse=True):  # the steepest takes the rest
            inside = members[group]
            own_costs, own_bytes = [costs[i] for i in inside], [bytes_[i] for i in inside]
            share = int(frontiers[group].bytes[chosen_points[group]]) + left
            picked = choose(own_costs, own_bytes, share, slack=share)
            left = share - sum(row[i] for row, i in zip(own_bytes, picked, strict=True))
            chosen |= dict(zip(inside, picked, strict=True))
        return curve, [chosen[index] for index in range(len(costs))]

    def _slopes(self, errors: Mapping[str, float]) -> dict[str, float]:
        """Return the derivative of the value by the error of every group."""
        slopes = {group: self.parts[group] for group in errors}
        for pair, share in self.pairs.items():
            first, second = pair.split(" x ")
            slopes[first] += share * errors[second]
            slopes[second] += share * errors[first]
        return slopes

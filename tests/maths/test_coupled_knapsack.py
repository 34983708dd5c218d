from itertools import product

import numpy as np
import pytest

from casp_plugin.maths import coupled_knapsack
from casp_plugin.maths.coupled_knapsack import Coupled, choose_coupled, frontier_of
from casp_plugin.maths.knapsack import BudgetError, choose
from casp_plugin.plan.sensitivity_file import Shares


def drawn(seed, sizes=(3, 2, 4)):
    """Costs that fall with bytes, of units in groups; shares of groups and pairs."""
    rng = np.random.default_rng(seed)
    groups = [group for group, size in zip("abc", sizes, strict=True) for _ in range(size)]
    costs = [sorted(rng.random(3), reverse=True) for _ in groups]
    bytes_ = [(rng.integers(1, 9) * np.array([2, 3, 4])).tolist() for _ in groups]
    values = rng.dirichlet(np.ones(6))
    parts = dict(zip("abc", values[:3], strict=True))
    pairs = dict(zip(("a x b", "a x c", "b x c"), values[3:], strict=True))
    return groups, costs, bytes_, Shares(parts=parts, pairs=pairs)


def value(groups, costs, shares, chosen):
    """What is minimised, from its formula; costs at the fewest bytes are the largest."""
    errors = {}
    for group in dict.fromkeys(groups):
        inside = [i for i, each in enumerate(groups) if each == group]
        now = sum(costs[i][chosen[i]] for i in inside)
        errors[group] = now / sum(costs[i][0] for i in inside)
    found = sum(share * errors[group] for group, share in shares.parts.items())
    for pair, share in shares.pairs.items():
        one, other = pair.split(" x ")
        found += share * errors[one] * errors[other]
    return found


def brute_force(groups, costs, bytes_, shares, budget_bytes):
    return min(
        value(groups, costs, shares, chosen)
        for chosen in product(range(3), repeat=len(groups))
        if sum(row[i] for row, i in zip(bytes_, chosen, strict=True)) <= budget_bytes
    )


@pytest.mark.parametrize("seed", range(6))
def test_no_choice_is_better(seed):
    groups, costs, bytes_, shares = drawn(seed)
    least, most = (sum(pick(row) for row in bytes_) for pick in (min, max))
    for budget_bytes in np.linspace(least, most, 4).astype(int).tolist():
        curve, chosen = Coupled(groups, shares.parts, shares.pairs).solve(
            costs, bytes_, budget_bytes, points=3
        )
        assert sum(row[i] for row, i in zip(bytes_, chosen, strict=True)) <= budget_bytes
        best = brute_force(groups, costs, bytes_, shares, budget_bytes)
        assert value(groups, costs, shares, chosen) == pytest.approx(best, rel=1e-9)
    assert [taken for taken, _ in curve] == sorted(taken for taken, _ in curve)
    assert curve[0][1] == pytest.approx(1)


def test_one_group_is_the_knapsack():
    _, costs, bytes_, _ = drawn(0)
    shares = Shares(parts={"a": 1.0}, pairs={})
    budget_bytes = sum(map(min, bytes_)) + 20
    _, chosen = Coupled("a" * len(costs), shares.parts, shares.pairs).solve(
        costs, bytes_, budget_bytes, points=2
    )
    expected = choose(costs, bytes_, budget_bytes, slack=budget_bytes)

    def spent(picked):
        return sum(row[i] for row, i in zip(costs, picked, strict=True))

    assert spent(chosen) == pytest.approx(spent(expected))


def test_a_frontier_holds_what_nothing_beats():
    _, costs, bytes_, _ = drawn(1, (4, 1, 1))
    found = frontier_of(costs, bytes_)
    assert (np.diff(found.bytes) > 0).all()
    assert (np.diff(found.costs) < 0).all()
    for point in range(len(found.bytes)):
        chosen = found.choice(point)
        assert sum(r[i] for r, i in zip(bytes_, chosen, strict=True)) == found.bytes[point]
        assert sum(r[i] for r, i in zip(costs, chosen, strict=True)) == pytest.approx(
            found.costs[point]
        )
    for chosen in product(range(3), repeat=len(costs)):
        taken = sum(r[i] for r, i in zip(bytes_, chosen, strict=True))
        spent = sum(r[i] for r, i in zip(costs, chosen, strict=True))
        assert found.costs[found.bytes <= taken].min() <= spent + 1e-12


def test_long_frontiers_are_thinned(monkeypatch):
    """And what that costs inside a group is made good by the knapsack."""
    groups, costs, bytes_, shares = drawn(2, (6, 2, 1))
    whole = frontier_of(costs, bytes_)
    monkeypatch.setattr(coupled_knapsack, "MOST_POINTS", 8)
    thin = frontier_of(costs, bytes_)
    assert len(thin.bytes) <= 10 < len(whole.bytes)
    assert thin.bytes[0] == whole.bytes[0]
    assert thin.costs[-1] == pytest.approx(whole.costs[-1])
    budget_bytes = sum(map(min, bytes_)) + 25
    _, chosen = Coupled(groups, shares.parts, shares.pairs).solve(
        costs, bytes_, budget_bytes, points=2
    )
    best = brute_force(groups, costs, bytes_, shares, budget_bytes)
    assert value(groups, costs, shares, chosen) <= 1.02 * best


def test_four_groups_fit_in_memory():
    rng = np.random.default_rng(0)
    groups = [group for group in "abcd" for _ in range(40)]
    costs = np.sort(rng.random((160, 3)))[:, ::-1].tolist()
    bytes_ = (rng.integers(1000, 9000, (160, 1)) * np.array([2, 3, 4])).tolist()
    shares = Shares(parts=dict.fromkeys("abcd", 0.2), pairs={"a x b": 0.1, "c x d": 0.1})
    budget_bytes = sum(min(row) + max(row) for row in bytes_) // 2
    _, chosen = Coupled(groups, shares.parts, shares.pairs).solve(
        costs, bytes_, budget_bytes, points=2
    )
    taken = sum(row[i] for row, i in zip(bytes_, chosen, strict=True))
    assert 0.999 * budget_bytes < taken <= budget_bytes


def test_what_is_granted_is_spent():
    """On a group without a share too."""
    groups, costs, bytes_, _ = drawn(3, (3, 2, 1))
    shares = Shares(parts={"a": 1.0, "b": 0.0, "c": 0.0}, pairs={})
    _, chosen = Coupled(groups, shares.parts, shares.pairs).solve(
        costs, bytes_, sum(map(max, bytes_)), points=2
    )
    assert chosen == [2] * 6


def test_a_group_without_errors_takes_nothing():
    frontiers = {"a": frontier_of([[0.0, 0.0]], [[2, 4]]), "b": frontier_of([[3.0, 1.0]], [[2, 4]])}
    points, least = choose_coupled(frontiers, {"a": 0.5, "b": 0.5}, {"a x b": 0.0}, 6)
    assert {group: int(frontiers[group].bytes[i]) for group, i in points.items()} == {
        "a": 2,
        "b": 4,
    }
    assert least == pytest.approx(0.5 / 3)
    with pytest.raises(BudgetError, match="3 bytes is below the least reachable 4"):
        choose_coupled(frontiers, {"a": 0.5, "b": 0.5}, {}, 3)

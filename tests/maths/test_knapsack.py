"""The solver against brute force, the closed form against its own definition."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from casp_plugin.maths.knapsack import (
    BudgetError,
    choose,
    closed_form_bits,
    distance_costs,
    pareto,
)

costs_and_bytes = st.lists(
    st.lists(
        st.tuples(st.floats(0, 10, allow_subnormal=False), st.integers(1, 60)),
        min_size=1,
        max_size=4,
    ),
    min_size=1,
    max_size=5,
)


def brute_force(costs, bytes_, budget_bytes, slack):
    """Least cost over all choices that the docstring of ``choose`` admits."""
    choices = list(itertools.product(*(range(len(row)) for row in costs)))
    total = {c: sum(bytes_[i][k] for i, k in enumerate(c)) for c in choices}
    budget_bytes = min(budget_bytes, max(total.values()))
    window = [c for c in choices if budget_bytes - slack <= total[c] <= budget_bytes]
    if not window:
        fullest = max(t for t in total.values() if t <= budget_bytes)
        window = [c for c in choices if fullest - slack <= total[c] <= budget_bytes]
    return min(sum(costs[i][k] for i, k in enumerate(c)) for c in window)


@settings(max_examples=150, deadline=None)
@given(
    units=costs_and_bytes,
    share=st.floats(0, 1.2),
    slack=st.integers(0, 20),
    scale=st.sampled_from([1, 4096]),
)
def test_choose_is_optimal(units, share, slack, scale):
    costs = [[cost for cost, _ in row] for row in units]
    bytes_ = [[size * scale for _, size in row] for row in units]
    least = sum(map(min, bytes_))
    most = sum(map(max, bytes_))
    budget_bytes = int(least + share * (most - least))
    slack *= scale
    chosen = choose(costs, bytes_, budget_bytes, slack)
    total = sum(row[k] for row, k in zip(bytes_, chosen, strict=True))
    assert total <= budget_bytes
    cost = sum(row[k] for row, k in zip(costs, chosen, strict=True))
    assert cost == pytest.approx(brute_force(costs, bytes_, budget_bytes, slack), abs=1e-6)


@pytest.mark.parametrize("dear", [1e3, 1e6, 1e9])
def test_one_candidate_that_costs_more_than_all_others(dear):
    """It must not blur what they cost."""
    rng = np.random.default_rng(1)
    costs = np.sort(rng.exponential(0.01, (8, 3)))[:, ::-1].tolist()
    bytes_ = [[10, 15, 20]] * 8
    costs[0][0] = dear
    for budget_bytes in (100, 120, 140):
        chosen = choose(costs, bytes_, budget_bytes, slack=20)
        cost = sum(row[k] for row, k in zip(costs, chosen, strict=True))
        assert cost == pytest.approx(brute_force(costs, bytes_, budget_bytes, 20), rel=1e-9)


def test_spends_what_was_granted():
    # the second candidate is no better, but the budget asks for it
    assert choose([[1.0, 1.0]], [[10, 20]], budget_bytes=20, slack=0) == [1]
    assert choose([[1.0, 1.5]], [[10, 20]], budget_bytes=20, slack=10) == [0]


def test_budget_below_the_least():
    with pytest.raises(BudgetError, match="below the least reachable 30"):
        choose([[0], [0]], [[10], [20]], budget_bytes=29)


def test_ties_and_order_are_deterministic():
    rng = np.random.default_rng(0)
    costs = rng.random((40, 3)).tolist()
    bytes_ = [[2, 3, 4]] * 40
    assert choose(costs, bytes_, 100, 1) == choose(costs, bytes_, 100, 1)


@given(
    importances=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=6),
    average=st.floats(2, 6),
)
@settings(max_examples=30, deadline=None)
def test_closed_form_is_the_papers_equation(importances, average):
    s = np.array(importances)
    bits = closed_form_bits(importances, average, [1] * len(s))
    expected = average + 0.5 * np.log2(s / np.exp(np.log(s).mean()))
    np.testing.assert_allclose(bits, expected, atol=1e-9)
    assert bits.mean() == pytest.approx(average)


def test_closed_form_minimises_the_weighted_distortion():
    s, n = np.array([0.1, 1.0, 5.0, 0.3]), np.array([1.0, 2.0, 1.0, 3.0])
    bits = closed_form_bits(s, 3.0, n)
    found = minimize(
        lambda b: (n * s * 4.0**-b).sum(),
        np.full(4, 3.0),
        constraints={"type": "eq", "fun": lambda b: (n * b).sum() - 3.0 * n.sum()},
        tol=1e-14,
    )
    np.testing.assert_allclose(bits, found.x, atol=1e-4)


def test_closed_form_refuses_zero_importance():
    with pytest.raises(ValueError, match="importances must be positive"):
        closed_form_bits([0.0, 1.0], 3, [1, 1])


def test_distance_costs_clip_to_the_candidates():
    costs = distance_costs([9.0, 2.4], [[2, 3, 4], [2, 3, 4]], [1, 10])
    assert costs[0] == [4, 1, 0]
    assert costs[1] == pytest.approx([1.6, 3.6, 25.6])


def test_pareto_is_the_best_choice_at_each_budget():
    costs, sizes = [[9.0, 4.0, 1.0], [5.0, 2.0, 1.5]], [[2, 3, 5], [1, 2, 4]]
    found = pareto(costs, sizes, 7)
    pairs = list(itertools.product(range(3), repeat=2))
    for budget_bytes, (taken, cost) in zip(range(3, 10), found, strict=True):
        fitting = [(i, j) for i, j in pairs if sizes[0][i] + sizes[1][j] <= budget_bytes]
        assert taken <= budget_bytes
        assert cost == min(costs[0][i] + costs[1][j] for i, j in fitting)

"""What GPTQ leaves, against GPTQ column by column in float64."""

import pytest
import torch

from casp_plugin.maths import gptq_error
from casp_plugin.maths.gptq_error import column_costs

STEP = 0.25


def nearest(values):
    """Codes from -2 to 2, as those of few bits: what is moved may leave their range."""
    return (values / STEP).round().clamp(-2, 2) * STEP


def gptq(weight, moment, dampening_frac=0.01):
    """The textbook: round a column, and move those behind by least squares."""
    moment = moment + dampening_frac * moment.diagonal().mean() * torch.eye(len(moment))
    order = moment.diagonal().argsort(descending=True)
    weight, left = weight.clone(), order.tolist()
    while left:
        column = left.pop(0)
        rounded = nearest(weight[:, column])
        error = rounded - weight[:, column]
        weight[:, column] = rounded
        if left:
            inner = moment[left][:, left]
            weight[:, left] -= torch.outer(error, torch.linalg.solve(inner, moment[left, column]))
    return weight


def estimate(weight, moment, costs):
    """The error by ``ColumnCosts``, with its leading columns rounded by the textbook."""
    count = len(costs.leading)
    first, last = costs.order[:count], costs.order[count:]
    leading = gptq(weight[:, first], costs.leading_moment.double(), 0) - weight[:, first]
    moved = weight[:, last] + leading @ costs.moved.double()
    rounded = nearest(moved)
    arguments = (leading, rounded - weight[:, last], rounded - moved)
    return costs.error(*(argument.float() for argument in arguments))


def inputs(columns, massive=0.0, seed=0):
    """Second moment of correlated inputs; three channels may carry most of the energy."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(1000, columns, generator=generator, dtype=torch.float64) @ mix
    common = torch.randn(1000, 1, generator=generator, dtype=torch.float64)
    x[:, :3] += massive * common * torch.tensor([8.0, 3.0, 1.0])
    return x.T @ x / len(x)


def weights(rows, columns):
    generator = torch.Generator().manual_seed(1)
    return 0.2 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def left_by(weight, moment):
    delta = gptq(weight, moment) - weight
    return ((delta @ moment) * delta).sum(1)


def test_few_columns_are_exact():
    """All of them are leading."""
    weight, moment = weights(20, 24), inputs(24, massive=30)
    found = estimate(weight, moment, column_costs(moment))
    torch.testing.assert_close(found.double(), left_by(weight, moment), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("massive", [0, 30])
def test_near_gptq_of_many_columns(massive):
    weight, moment = weights(200, 96), inputs(96, massive)
    costs = column_costs(moment)
    expected = left_by(weight, moment)
    found = estimate(weight, moment, costs)
    assert found.sum().item() == pytest.approx(expected.sum().item(), rel=0.1)
    assert (found / expected - 1).abs().mean() < 0.2  # row by row


def test_leading_columns_are_rounded_as_among_all(monkeypatch):
    monkeypatch.setattr(gptq_error, "LEADING", 5)
    weight, moment = weights(20, 24), inputs(24, massive=30)
    costs = column_costs(moment)
    first = costs.order[:5]
    alone = gptq(weight[:, first], costs.leading_moment.double(), 0)
    torch.testing.assert_close(alone, gptq(weight, moment)[:, first])


def test_what_moves_is_the_least_squares_solution(monkeypatch):
    monkeypatch.setattr(gptq_error, "LEADING", 5)
    moment = inputs(24)
    costs = column_costs(moment)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(24)
    first, last = costs.order[:5], costs.order[5:]
    expected = -damped[first][:, last] @ torch.linalg.inv(damped[last][:, last])
    torch.testing.assert_close(costs.moved.double(), expected, rtol=1e-3, atol=1e-4)


def test_dead_channels_cost_nothing(monkeypatch):
    monkeypatch.setattr(gptq_error, "LEADING", 5)
    moment = inputs(24)
    moment[20:] = moment[:, 20:] = 0
    costs = column_costs(moment)
    zero = torch.zeros(1, 5)
    change = torch.zeros(1, 19)
    change[:, -4:] = 1  # the last in order
    assert costs.error(zero, change, change).item() == pytest.approx(0, abs=1e-4)


def test_without_a_root_columns_count_by_themselves():
    """GPTQ rounds to nearest then."""
    moment = torch.diag(torch.arange(1.0, 41))
    moment[0, 1] = moment[1, 0] = 100
    costs = column_costs(moment)
    delta = torch.ones(1, 40)[:, costs.order]
    error = costs.error(delta[:, :32], delta[:, 32:], delta[:, 32:])
    assert error.item() == pytest.approx(moment.diagonal().sum().item())
    assert costs.moved.abs().max() == 0

"""Descent that stops where held-out data gains nothing."""

import pytest
import torch

from casp_plugin.maths.descent import descend, held_out


def quadratic(leaf, targets):
    """Squared distance to the target of an item, its gradient added."""

    def loss(place):
        value = (leaf - targets[place]).square().mean()
        if torch.is_grad_enabled():
            value.backward()
        return value.detach()

    return loss


@pytest.mark.parametrize("count", [1, 2, 5, 20, 33])
def test_items_are_trained_on_or_held_out(count):
    train, held = held_out(count)
    assert held
    assert train
    if count > 1:
        assert sorted(train + held) == list(range(count))
        assert len(held) == max(count // 10, 1)


def test_descends_to_what_all_items_want():
    leaf = torch.zeros(4, requires_grad=True)
    targets = torch.full((20, 4), 0.5)
    found = descend([leaf], quadratic(leaf, targets), 20, 10, [0.05], 0)
    assert found.before == pytest.approx(0.25)
    assert found.after < 0.01
    torch.testing.assert_close(leaf.detach(), targets[0], atol=0.1, rtol=0)


def test_nothing_changes_where_held_out_items_gain_nothing():
    leaf = torch.zeros(4, requires_grad=True)
    targets = torch.ones(20, 4)
    targets[held_out(20)[1]] = -1.0
    found = descend([leaf], quadratic(leaf, targets), 20, 5, [0.05], 0)
    assert (found.epoch, found.after) == (0, found.before)
    assert not leaf.any()


def test_leaves_are_those_of_the_best_epoch():
    """Past the optimum of the held-out items the others pull further."""
    leaf = torch.zeros(1, requires_grad=True)
    targets = torch.ones(20, 1)
    targets[held_out(20)[1]] = 0.3
    loss = quadratic(leaf, targets)
    found = descend([leaf], loss, 20, 20, [0.02], 0)
    assert 0 < found.epoch < 20
    with torch.no_grad():
        assert torch.stack([loss(p) for p in held_out(20)[1]]).mean() == pytest.approx(found.after)


def test_same_seed_same_path():
    ends = []
    for seed in (0, 0, 1):
        leaf = torch.zeros(3, requires_grad=True)
        targets = torch.randn(20, 3, generator=torch.Generator().manual_seed(2)) + 1
        descend([leaf], quadratic(leaf, targets), 20, 2, [0.05], seed)
        ends.append(leaf.detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_descent_ends_where_the_loss_is_not_finite():
    leaf = torch.zeros(1, requires_grad=True)

    def loss(place):
        value = (leaf - 1).square().mean() / (leaf.detach() < 0.5).float().mean()
        if torch.is_grad_enabled():
            value.backward()
        return value.detach()

    found = descend([leaf], loss, 20, 30, [0.005], 0)
    assert found.after < found.before
    assert 0 < leaf.item() < 0.5


def test_a_loss_that_is_not_finite_is_refused():
    leaf = torch.zeros(1, requires_grad=True)
    targets = torch.full((4, 1), torch.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        descend([leaf], quadratic(leaf, targets), 4, 1, [0.1], 0)

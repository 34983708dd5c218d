"""Descent on few real numbers, stopped where data that is held out gains nothing."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Descent", "descend", "held_out"]


@dataclass(frozen=True)
class Descent:
    """What a descent has brought.

    :param before: mean loss of the data held out
    :param after: the same at the end; ``before`` if nothing was better, and nothing has changed
    :param epoch: the epoch after which the loss was least, 0 for none
    """

    before: float
    after: float
    epoch: int


def held_out(count: int, share: float = 0.1) -> tuple[list[int], list[int]]:
    """Return the places of the items that are descended on, and of those held out, evenly spread.

    A single item is both.

    :param count: number of items
    :param share: of the items that are held out; at least one
    """
    step = max(round(1 / share), 2)
    held = list(range(min(step, count) - 1, count, step))
    return [place for place in range(count) if place not in held] or held, held


def descend(
    leaves: Sequence[torch.Tensor],
    loss: Callable[[int], torch.Tensor],
    items: int,
    epochs: int,
    rates: Sequence[float],
    seed: int,
    over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda mean: mean,
) -> Descent:
    """Move leaves by Adam to where the loss of held-out items is least.

    The rate falls to zero along a cosine. Leaves end at the epoch with the least held-out loss, and
    where they were if no epoch is better.

    :param leaves: float32, that require gradients; changed in place
    :param loss: returns the loss of an item, a scalar; where gradients are enabled it also adds
        them to those of the leaves
    :param items: number of items, of which every tenth is held out
    :param epochs: passes over the others
    :param rates: learning rate of every leaf
    :param seed: of the order of items
    :param over_ranks: returns the mean of a tensor over processes that descend together
    :raises ValueError: if the loss is not finite to begin with; where it is later, descent ends
    """
    train, held = held_out(items)
    generator = torch.Generator().manual_seed(seed)
    groups = [{"params": [own], "lr": rate} for own, rate in zip(leaves, rates, strict=True)]
    optimizer = torch.optim.Adam(groups)
    steps = max(epochs * len(train), 1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def held_loss() -> float:
        with torch.no_grad():
            mean = torch.stack([loss(place).detach().float() for place in held]).mean()
        return over_ranks(mean).item()

    before = least = held_loss()
    if not math.isfinite(before):
        raise ValueError("the loss is NaN or infinite before anything is tuned")
    best, kept = 0, [own.detach().clone() for own in leaves]
    for epoch in range(1, epochs + 1):
        for place in torch.randperm(len(train), generator=generator).tolist():
            optimizer.zero_grad()
            with torch.enable_grad():
                loss(train[place])
            for own in leaves:
                if own.grad is None:
                    own.grad = torch.zeros_like(own)
                own.grad = over_ranks(own.grad)
            optimizer.step()
            schedule.step()
        now = held_loss()
        if not math.isfinite(now):
            break
        if now < least:
            least, best, kept = now, epoch, [own.detach().clone() for own in leaves]
    with torch.no_grad():
        for own, value in zip(leaves, kept, strict=True):
            own.copy_(value)
    return Descent(before, least, best)

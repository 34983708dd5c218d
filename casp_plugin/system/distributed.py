"""Processes of `torchrun` that calibrate together, each on its share of the data.

Every rank calls these functions, in the same order; a single process passes through.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from compressed_tensors.distributed import (
    get_source_rank,
    greedy_bin_packing,
    init_dist,
    is_distributed,
    is_source_process,
)

__all__ = [
    "barrier",
    "gathered",
    "is_source_process",
    "join_torchrun",
    "leave_torchrun",
    "number_of_ranks",
    "own_share",
    "rank",
    "shared",
    "sum_over_ranks",
]

Value = TypeVar("Value")


def join_torchrun() -> None:
    """Join the other processes where `torchrun` started this one.

    On GPUs by llm-compressor's own ``init_dist``, on CPUs by gloo.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or is_distributed():
        return
    if torch.accelerator.is_available():
        init_dist()
    else:
        dist.init_process_group("gloo")


def leave_torchrun() -> bool:
    """Part from the other processes once all are here, and return whether this one goes on alone.

    Loading a compressed model counts on every process to take part.
    """
    goes_on = is_source_process()
    if is_distributed():
        barrier()
        dist.destroy_process_group()
    return goes_on


def rank() -> int:
    """Return this process' rank, 0 for a single process."""
    return dist.get_rank() if is_distributed() else 0


def number_of_ranks() -> int:
    """Return how many processes calibrate together."""
    return dist.get_world_size() if is_distributed() else 1


def barrier() -> None:
    """Wait until every rank is here."""
    if is_distributed():
        dist.barrier()


def gathered(value: Value) -> list[Value]:
    """Return the values of all ranks, in the order of the ranks."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * number_of_ranks()
    dist.all_gather_object(values, value)
    return values


def shared(value: Value) -> Value:
    """Return the source rank's value, on every rank."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, get_source_rank())
    return box[0]


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, in place, and return it."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def own_share(items: Iterable[Value], weight: Callable[[Value], float]) -> list[Value]:
    """Return this rank's share of the items; shares of all ranks weigh about the same.

    :param items: the same on all ranks
    :param weight: weight of an item, in any unit
    """
    _, shares, _ = greedy_bin_packing(list(items), number_of_ranks(), item_weight_fn=weight)
    return shares[rank()]

"""Processes of `torchrun` that calibrate together, each on its share of the data.

Everything here is for all ranks at once, in the same order; a process alone passes through.
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
    "number_of_ranks",
    "own_share",
    "rank",
    "shared",
    "sum_over_ranks",
]

Value = TypeVar("Value")


def join_torchrun() -> None:
    """Where `torchrun` started this process, meet the others: on GPUs as llm-compressor's own
    ``init_dist``, on CPUs by gloo."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or is_distributed():
        return
    if torch.accelerator.is_available():
        init_dist()
    else:
        dist.init_process_group("gloo")


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def number_of_ranks() -> int:
    return dist.get_world_size() if is_distributed() else 1


def barrier() -> None:
    """Wait for all."""
    if is_distributed():
        dist.barrier()


def gathered(value: Value) -> list[Value]:
    """What all ranks have, in their order."""
    if not is_distributed():
        return [value]
    found: list[Any] = [None] * number_of_ranks()
    dist.all_gather_object(found, value)
    return found


def shared(value: Value) -> Value:
    """What the source rank has."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, get_source_rank())
    return box[0]


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, summed in place."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def own_share(items: Iterable[Value], weight: Callable[[Value], float]) -> list[Value]:
    """Of work to be spread, what is for this rank: about as heavy as the others'."""
    _, shares, _ = greedy_bin_packing(list(items), number_of_ranks(), item_weight_fn=weight)
    return shares[rank()]

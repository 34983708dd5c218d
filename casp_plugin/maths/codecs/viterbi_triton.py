"""Viterbi's algorithm for GPUs, a program a tile; ``viterbi`` tells how.

A state is (oldest K bits, the middle, newest K bits). So the costs of all states are a tensor of
three dimensions: the costs of the overlaps before, which are (oldest, middle), and the errors of
the states. The least over the oldest bits are the costs of the next overlaps, (middle, newest).
That takes states of at least 2 K bits.

Shapes: T tiles of N numbers, S = 2^L states, G = 2^(L - K) overlaps, F = 2^K symbols.
"""

import torch
import triton
import triton.language as tl

__all__ = ["encode"]

#: bytes for the ways back of the tiles that are encoded together
_BACK_BYTES = 2**28
#: states of a thread, more where a program has no more threads: L = 16 spills registers
_STATES = 16


def encode(
    tiles: torch.Tensor, values: torch.Tensor, bits: int, around: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return symbols and values of the nearest circular paths, see ``viterbi.encode_tiles``.

    :param tiles: float32, shape (T, N)
    :param values: float32, shape (S,)
    :param bits: K, at most half of the bits of a state
    :param around: steps on each side of the seam that find its overlap
    """
    count, steps = tiles.shape
    overlaps = len(values) >> bits
    together = min(count, max(_BACK_BYTES // (steps * overlaps), 1))
    back = torch.empty(together, steps, overlaps, dtype=torch.uint8, device=tiles.device)
    states = torch.empty(count, steps, dtype=torch.int32, device=tiles.device)
    seams = torch.cat([tiles[:, -around:], tiles[:, :around]], 1)
    warps = min(max(len(values) // (32 * _STATES), 1), 32)
    for part, seam, path in zip(
        tiles.split(together), seams.split(together), states.split(together), strict=True
    ):
        _encode[(len(part),)](
            part.contiguous(),
            seam.contiguous(),
            values,
            back,
            path,
            steps,
            around,
            SYMBOLS=1 << bits,
            OVERLAPS=overlaps,
            BITS=bits,
            num_warps=warps,
        )
    return (states & (1 << bits) - 1).to(torch.uint8), values[states]


@triton.jit
def _encode(
    tiles,
    seams,
    values,
    back,
    states,
    steps,
    around,
    SYMBOLS: tl.constexpr,
    OVERLAPS: tl.constexpr,
    BITS: tl.constexpr,
):
    """Write the states of the path of a tile."""
    tile = tl.program_id(0).to(tl.int64)
    own_back = back + tile * steps * OVERLAPS
    every = tl.arange(0, OVERLAPS)
    state_values = tl.reshape(
        tl.load(values + tl.arange(0, SYMBOLS * OVERLAPS)), (SYMBOLS, OVERLAPS // SYMBOLS, SYMBOLS)
    )
    free = tl.zeros((OVERLAPS,), tl.float32)
    near = seams + tile * 2 * around
    least = _costs(near, state_values, own_back, free, 2 * around, SYMBOLS, OVERLAPS)
    own = tl.argmin(least, axis=0)
    for step in range(around):
        oldest = tl.load(own_back + (2 * around - 1 - step) * OVERLAPS + own).to(tl.int32)
        own = (oldest * OVERLAPS + own) >> BITS
    tl.debug_barrier()
    from_seam = tl.where(every == own, 0.0, 1e30)
    numbers = tiles + tile * steps
    _costs(numbers, state_values, own_back, from_seam, steps, SYMBOLS, OVERLAPS)
    for step in range(steps):
        last = steps - 1 - step
        oldest = tl.load(own_back + last * OVERLAPS + own).to(tl.int32)
        state = oldest * OVERLAPS + own
        tl.store(states + tile * steps + last, state)
        own = state >> BITS


@triton.jit
def _costs(
    numbers,
    state_values,
    back,
    least,
    steps,
    SYMBOLS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Return the costs of all overlaps after some numbers, shape (G,), and write the way back."""
    every = tl.arange(0, OVERLAPS)
    for step in range(steps):
        error = state_values - tl.load(numbers + step)  # (F, G / F, F)
        before = tl.reshape(least, (SYMBOLS, OVERLAPS // SYMBOLS))
        cost = before[:, :, None] + error * error
        best, oldest = tl.min(cost, axis=0, return_indices=True)  # (G / F, F)
        least = tl.reshape(best, (OVERLAPS,))
        tl.store(back + step * OVERLAPS + every, tl.reshape(oldest, (OVERLAPS,)).to(tl.uint8))
    tl.debug_barrier()  # what other threads have written is read next
    return least

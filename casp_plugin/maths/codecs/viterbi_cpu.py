"""Viterbi's algorithm for CPUs, compiled by numba when it is first called; ``viterbi`` tells how.

The loops are written so that the compiler turns them into vector instructions: the costs of
overlaps are copied to all states that follow, and then everything of a step lies side by side.

Shapes: T tiles of N numbers, S = 2^L states, G = 2^(L - K) overlaps.
"""

import numba
import numpy as np

__all__ = ["encode"]

_FAR = np.float32(1e30)


@numba.njit(nogil=True, fastmath=True, cache=True)
def _spread(least, spread, bits):
    """Copy the cost of every overlap to the states that follow it."""
    if bits == 1:
        for own in range(len(least)):
            for symbol in range(2):
                spread[2 * own + symbol] = least[own]
    elif bits == 2:
        for own in range(len(least)):
            for symbol in range(4):
                spread[4 * own + symbol] = least[own]
    elif bits == 3:
        for own in range(len(least)):
            for symbol in range(8):
                spread[8 * own + symbol] = least[own]
    else:
        for first in range(0, len(spread), 16):
            cost = least[first >> bits]
            for state in range(first, first + 16):
                spread[state] = cost


@numba.njit(nogil=True, fastmath=True, cache=True)
def _least_of_two(spread, values, number, least, oldest):
    """Write the least cost of every overlap over two symbols, and which one has it."""
    overlaps = len(least)
    spread_0, spread_1 = spread[:overlaps], spread[overlaps:]
    values_0, values_1 = values[:overlaps], values[overlaps:]
    for own in range(overlaps):
        error_0, error_1 = values_0[own] - number, values_1[own] - number
        cost_0 = spread_0[own] + error_0 * error_0
        cost_1 = spread_1[own] + error_1 * error_1
        least[own] = min(cost_0, cost_1)
        oldest[own] = np.uint8(cost_1 < cost_0)


@numba.njit(nogil=True, fastmath=True, cache=True)
def _least_of_four(spread, values, number, least, oldest, first):
    """Write the least cost of every overlap over four symbols, and which one has it.

    :param spread: costs of the states of the four symbols, shape (4 G,)
    :param values: likewise
    :param first: the first of the symbols; those before it are in ``least`` and ``oldest`` already
    """
    overlaps = len(least)
    spread_0, spread_1 = spread[:overlaps], spread[overlaps : 2 * overlaps]
    spread_2, spread_3 = spread[2 * overlaps : 3 * overlaps], spread[3 * overlaps :]
    values_0, values_1 = values[:overlaps], values[overlaps : 2 * overlaps]
    values_2, values_3 = values[2 * overlaps : 3 * overlaps], values[3 * overlaps :]
    for own in range(overlaps):
        error_0, error_1 = values_0[own] - number, values_1[own] - number
        error_2, error_3 = values_2[own] - number, values_3[own] - number
        cost_0 = spread_0[own] + error_0 * error_0
        cost_1 = spread_1[own] + error_1 * error_1
        cost_2 = spread_2[own] + error_2 * error_2
        cost_3 = spread_3[own] + error_3 * error_3
        low, high = min(cost_0, cost_1), min(cost_2, cost_3)
        at_low = np.int32(1) if cost_1 < cost_0 else np.int32(0)
        at_high = np.int32(3) if cost_3 < cost_2 else np.int32(2)
        best, at = min(low, high), at_high if high < low else at_low
        if first:
            at = np.int32(first) + at if best < least[own] else np.int32(oldest[own])
            best = min(best, least[own])
        least[own] = best
        oldest[own] = np.uint8(at)


@numba.njit(nogil=True, cache=True)
def _path(numbers, values, bits, seam, least, spread, oldest, states):
    """Write the states of the path of a tile.

    :param numbers: shape (N,)
    :param values: of the states, shape (S,)
    :param seam: overlap of both ends; negative to leave them free
    :param least: for the costs of overlaps, shape (G,)
    :param spread: for the costs of states, shape (S,)
    :param oldest: for the oldest bits of states, uint8, shape (N, G)
    :param states: written, shape (N,)
    """
    steps, overlaps = len(numbers), len(least)
    if seam < 0:
        least[:] = 0
    else:
        least[:] = _FAR
        least[seam] = 0
    for step in range(steps):
        _spread(least, spread, bits)
        if bits == 1:
            _least_of_two(spread, values, numbers[step], least, oldest[step])
        else:
            for first in range(0, 1 << bits, 4):
                part = slice(first * overlaps, (first + 4) * overlaps)
                _least_of_four(
                    spread[part], values[part], numbers[step], least, oldest[step], first
                )
    own = seam if seam >= 0 else least.argmin()
    for step in range(steps - 1, -1, -1):
        state = np.int64(oldest[step, own]) * overlaps + own
        states[step] = state
        own = state >> bits


@numba.njit(nogil=True, parallel=True, cache=True)
def encode(tiles, values, bits, around):
    """Return symbols and values of the nearest circular paths, see ``viterbi.encode_tiles``.

    :param tiles: float32, shape (T, N)
    :param values: float32, shape (S,)
    :param bits: K
    :param around: steps on each side of the seam that find its overlap
    """
    count, steps = tiles.shape
    overlaps = len(values) >> bits
    symbols = np.empty((count, steps), np.uint8)
    nearest = np.empty((count, steps), np.float32)
    for tile in numba.prange(count):
        least, spread = np.empty(overlaps, np.float32), np.empty(len(values), np.float32)
        oldest, states = np.empty((steps, overlaps), np.uint8), np.empty(steps, np.int64)
        near_seam = np.concatenate((tiles[tile, steps - around :], tiles[tile, :around]))
        _path(near_seam, values, bits, -1, least, spread, oldest, states)
        seam = states[around - 1] & (overlaps - 1)
        _path(tiles[tile], values, bits, seam, least, spread, oldest, states)
        for step in range(steps):
            symbols[tile, step] = states[step] & ((1 << bits) - 1)
            nearest[tile, step] = values[states[step]]
    return symbols, nearest

"""The trellis code: its values bit by bit, its streams, and the nearest path by brute force."""

import itertools

import numpy as np
import pytest
import torch

from casp_plugin.maths.codecs import viterbi as viterbi_module
from casp_plugin.maths.codecs.trellis import (
    TILE,
    TrellisCodec,
    pack_symbols,
    state_values,
    window_states,
)
from casp_plugin.maths.codecs.viterbi import encode_tiles, viterbi


@pytest.mark.parametrize("code", ["mul1", "3inst"])
def test_values_of_all_states(code):
    """One state after the other, by the integers of the definition."""
    values = state_values(code, 16).numpy()
    for x in range(1 << 16):
        if code == "mul1":
            total = sum((0x83DCD12D * x % 2**32).to_bytes(4, "little"))
            expected = np.float32(total + 1024) * np.float32(0.0067673) - np.float32(10.3828)
        else:
            r = (89226354 * x + 64248484) % 2**32 & 0x8FFF8FFF ^ 0x3B603B60
            high, low = np.array([r >> 16, r & 0xFFFF], np.uint16).view(np.float16)
            expected = np.float32(high + low)
        assert values[x] == expected


@pytest.mark.parametrize(("code", "rms"), [("mul1", 1.0003), ("3inst", 1.2437)])
def test_values_have_the_published_size(code, rms):
    assert state_values(code, 16).square().mean().sqrt().item() == pytest.approx(rms, abs=1e-4)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("state_bits", [10, 16])
def test_windows_of_a_stream(bits, state_bits):
    """Weight i reads the L bits that end at bit (i + 1) K of the circle."""
    generator = torch.Generator().manual_seed(bits)
    symbols = torch.randint(0, 1 << bits, (3, TILE), generator=generator).to(torch.uint8)
    codes = pack_symbols(symbols, bits)
    assert codes.shape == (3, 8 * bits)
    states = window_states(codes, bits, state_bits)
    for tile, row in zip(symbols.tolist(), states.tolist(), strict=True):
        stream = "".join(f"{symbol:0{bits}b}" for symbol in tile)
        for weight, state in enumerate(row):
            end = (weight + 1) * bits
            window = (stream * 2)[TILE * bits + end - state_bits : TILE * bits + end]
            assert state == int(window, 2)


def cost(states, values, numbers):
    return (values[states] - numbers).square().sum().item()


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("closed", [False, True])
def test_path_is_the_nearest_of_all(bits, closed):
    """Against every path of a trellis of 16 states."""
    state_bits, steps = 4, 6 // bits
    generator = torch.Generator().manual_seed(bits)
    values = torch.randn(1 << state_bits, generator=generator, dtype=torch.float64)
    numbers = torch.randn(steps, generator=generator, dtype=torch.float64)
    mask = (1 << state_bits - bits) - 1
    overlap = 3 & mask
    paths = []
    for first in range(1 << state_bits):
        for symbols in itertools.product(range(1 << bits), repeat=steps - 1):
            states = [first]
            for symbol in symbols:
                states.append((states[-1] & mask) << bits | symbol)
            if not closed or (first >> bits == overlap and states[-1] & mask == overlap):
                paths.append(states)
    best = min(cost(torch.tensor(path), values, numbers) for path in paths)
    given = torch.tensor([overlap]) if closed else None
    found = viterbi(numbers[None], values, bits, given)[0]
    assert cost(found, values, numbers) == pytest.approx(best)
    assert found.tolist() in paths


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_cpu_and_device_paths_are_one(bits):
    generator = torch.Generator().manual_seed(0)
    tiles, values = torch.randn(3, TILE, generator=generator), state_values("mul1", 10)
    symbols, nearest = encode_tiles(tiles, values, bits)
    around = min(-(-50 // bits), TILE // 2)
    other_symbols, other = viterbi_module._by_torch(tiles, values, bits, around)
    assert torch.equal(symbols, other_symbols)
    assert torch.equal(nearest, other)


@pytest.mark.parametrize("columns", [4, 16])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_bands_decode_to_their_values(columns, bits):
    codec = TrellisCodec(bits, 10, columns=columns)
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(2 * codec.rows, 3 * columns, generator=generator)
    codes, values = zip(*map(codec.encode, target.split(columns, 1)), strict=True)
    assert torch.equal(codec.decode(torch.stack(codes, 1)), torch.cat(values, 1))


@pytest.mark.parametrize(
    ("bits", "state_bits", "published"), [(2, 12, 0.0731), (2, 16, 0.0691), (3, 12, 0.0192)]
)
def test_distortion_of_gaussian_numbers(bits, state_bits, published):
    """Of 16,384 numbers, so within a few per cent; the bound is 2^(-2 K)."""
    distortion = TrellisCodec(bits, state_bits).distortion
    assert distortion == pytest.approx(published, rel=0.05)
    assert distortion > 4.0**-bits


@pytest.mark.parametrize("code", ["mul1", "3inst"])
@pytest.mark.parametrize("bits", [1, 2, 4, 6])
def test_values_have_the_scale_of_the_least_error(bits, code):
    codec = TrellisCodec(bits, 12, code)
    tiles = torch.randn(48, TILE, generator=torch.Generator().manual_seed(0))

    def error(scale):
        _, values = encode_tiles(tiles / scale, codec.values, bits)
        return (tiles - values * scale).square().mean().item()

    least = min(error(codec.gain * step) for step in (0.85, 0.9, 0.95, 1.05, 1.1, 1.15))
    assert error(codec.gain) < 1.03 * least


def test_tail_biting_costs_little():
    """The seam from a short free path, against the best of all overlaps."""
    generator = torch.Generator().manual_seed(0)
    tiles, values = torch.randn(8, TILE, generator=generator), state_values("mul1", 10)
    _, nearest = encode_tiles(tiles, values, 4)
    errors = (tiles - nearest).square().sum(1)
    for tile, error in zip(tiles, errors, strict=True):
        every = tile.expand(64, -1)
        states = viterbi(every, values, 4, torch.arange(64))
        best = (values[states] - every).square().sum(1).min()
        assert error <= 1.02 * best

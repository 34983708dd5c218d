"""Bit streams against compressed-tensors' own packing and against slow integer arithmetic."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given
from hypothesis import strategies as st

from casp_plugin.maths.packing import dequantize, narrow_packed, pack, unpack

BITS = range(2, 9)


def random_codes(bits, *shape):
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8)


def slow_unpack(row, bits, count):
    """The row of words as one big integer."""
    number = int.from_bytes(row.numpy().tobytes(), "little")
    return [(number >> (bits * i)) % 2**bits for i in range(count)]


@given(st.sampled_from(BITS), st.integers(1, 4), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_pack_and_unpack(bits, rows, count, seed):
    torch.manual_seed(seed)
    codes = random_codes(bits, rows, count)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, -(-count * bits // 32))
    assert [slow_unpack(row, bits, count) for row in packed] == codes.tolist()
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", BITS)
def test_reads_what_compressed_tensors_writes(bits):
    values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 96), dtype=torch.int8)
    codes = unpack(pack_to_int32(values, bits), bits, 96)
    assert torch.equal(codes.short() - 2 ** (bits - 1), values.short())
    zeros = unpack(pack_to_int32(values, bits, packed_dim=0).t(), bits, 5).t()
    assert torch.equal(zeros.short() - 2 ** (bits - 1), values.short())


@given(st.sampled_from(BITS), st.integers(1, 40), st.data())
def test_narrow_packed(bits, total, data):
    start = data.draw(st.integers(0, total - 1))
    length = data.draw(st.integers(1, total - start))
    codes = random_codes(bits, total, 3)
    packed = pack(codes.t(), bits).t()
    narrowed = narrow_packed(packed, bits, start, length, total)
    assert torch.equal(unpack(narrowed.t(), bits, length).t(), codes[start : start + length])


def test_unpack_transposed():
    codes = random_codes(3, 4, 8)
    packed = pack(codes, 3).t().contiguous().t()  # one word a row: strides (1, 4)
    assert torch.equal(unpack(packed, 3, 8), codes)


@pytest.mark.parametrize("groups", [1, 3])
def test_dequantize(groups):
    codes, offsets = random_codes(8, 4, 12), random_codes(8, 4, groups)
    scales = torch.rand(4, groups)
    weight = dequantize(codes, offsets, scales, torch.float32)
    for row, column in np.ndindex(4, 12):
        group = column * groups // 12
        level = int(codes[row, column]) - int(offsets[row, group])
        assert weight[row, column].item() == pytest.approx(level * scales[row, group].item())

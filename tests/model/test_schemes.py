"""Bytes on disk against what compressed-tensors really stores."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme

from casp_plugin.model.schemes import missing_kernel, stored_bytes, weight_args


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("shape", [(32, 64), (33, 80), (7, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_bytes(bits, symmetric, group_size, shape, dtype):
    args = weight_args(bits, group_size, symmetric)
    groups = 1 if group_size == -1 else shape[1] // group_size
    state = {
        "weight": torch.randn(shape, dtype=dtype),
        "weight_scale": torch.ones(shape[0], groups, dtype=dtype),
        "weight_zero_point": torch.zeros(shape[0], groups, dtype=torch.int8),
    }
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = compressor.compress(state, QuantizationScheme(targets=[], weights=args))
    assert stored_bytes(shape, args, dtype) == sum(tensor.nbytes for tensor in stored.values())


def test_kernels_in_the_box():
    assert missing_kernel(weight_args(4, 128)) is None
    assert missing_kernel(weight_args(8, 128, symmetric=True)) is None
    assert missing_kernel(weight_args(8, 128)) == "humming-kernels"
    assert missing_kernel(weight_args(4, 16)) == "humming-kernels"
    for bits in (2, 3, 5, 6, 7):
        assert missing_kernel(weight_args(bits, -1, symmetric=True)) == "humming-kernels"

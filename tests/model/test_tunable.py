"""Real numbers of compressed layers as leaves: what modules compute, and what they store."""

import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    initialize_module_for_quantization,
    quantize,
)
from compressed_tensors.quantization.utils import calculate_qparams
from torch import nn

from casp_plugin.model.codebook_linear import CodebookLinear
from casp_plugin.model.codebook_schemes import AdditiveScheme, LatticeScheme, TrellisScheme
from casp_plugin.model.tunable import in_place, is_integer, round_weight, store, tunables


def integers(bits=3, dtype=torch.float32, **fields):
    """A linear of 32 x 64 under a scheme of integers, rounded to nearest."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, dtype=dtype)
    fields = {"strategy": "group", "group_size": 32, "symmetric": False, **fields}
    args = QuantizationArgs(num_bits=bits, **fields)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    initialize_module_for_quantization(linear, scheme)
    linear.requires_grad_(False)
    size = fields["group_size"] or 64
    groups = linear.weight.float().unflatten(1, (-1, size))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    linear.weight_scale.data.copy_(scale)
    if hasattr(linear, "weight_zero_point"):
        linear.weight_zero_point.data.copy_(zero)
    round_weight(linear)
    return linear


def codes(linear):
    args = linear.quantization_scheme.weights
    return quantize(linear.weight, linear.weight_scale, linear.weight_zero_point, args)


def coded(scheme):
    torch.manual_seed(0)
    linear = nn.Linear(64, 64).requires_grad_(False)
    scheme = scheme.fitting((64, 64))
    [tensors] = scheme.encode([linear.weight], scheme.input(torch.eye(64), 0, 0.01), 0)
    layer = CodebookLinear.like(linear, scheme)
    for name, value in tensors.items():
        getattr(layer, name).copy_(value)
    return layer


LAYERS = {
    "groups": integers,
    "rows": lambda: integers(strategy="channel", group_size=None),
    "symmetric": lambda: integers(symmetric=True),
    "bfloat16": lambda: integers(bits=6, dtype=torch.bfloat16),
    "trellis": lambda: coded(TrellisScheme(bits=2, state_bits=10)),
    "lattice": lambda: coded(LatticeScheme(bits=2)),
    "learned": lambda: coded(AdditiveScheme(bits=1)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_computed_in_place_as_it_is_stored_afterwards(name):
    layer = LAYERS[name]()
    x = torch.randn(3, layer.in_features, dtype=layer.weight.dtype)
    before = layer(x)
    kept = codes(layer) if is_integer(layer) else layer.weight_codes.clone()
    found = tunables(layer)
    assert len(found) == 2  # scales and bias
    with in_place(found):
        torch.testing.assert_close(layer(x), before)
    torch.testing.assert_close(layer(x), before, rtol=0, atol=0)  # nothing is left behind
    with torch.no_grad():
        for each in found:
            each.leaf.normal_(0, 0.05)
    with in_place(found):
        tuned = layer(x)
    assert not torch.allclose(tuned, before, atol=1e-3)
    store(found)
    close = {"rtol": 0.02, "atol": 0.02} if x.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(layer(x), tuned.detach(), **close)
    assert torch.equal(codes(layer) if is_integer(layer) else layer.weight_codes, kept)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_the_scales(name):
    """Against finite differences."""
    layer = LAYERS[name]().float()
    [scales, _] = tunables(layer)
    x = torch.randn(5, layer.in_features)

    def loss():
        with in_place([scales]):
            return layer(x).square().mean()

    loss().backward()
    direction = torch.randn_like(scales.leaf)
    with torch.no_grad():
        step = 1e-2
        scales.leaf.add_(step * direction)
        above = loss()
        scales.leaf.sub_(2 * step * direction)
        below = loss()
    slope = ((above - below) / (2 * step)).item()
    assert (scales.leaf.grad * direction).sum().item() == pytest.approx(slope, rel=0.02, abs=1e-4)


def test_rounding_offsets_start_at_the_codes_and_stay_in_range():
    layer = integers()
    before, kept = layer.weight.clone(), codes(layer)
    dense = nn.Linear(64, 32)
    [scales, _] = tunables(layer, dense=dense)
    torch.testing.assert_close(scales.weight().detach(), before)
    with torch.no_grad():
        scales.leaves[1].add_(100.0)
    store([scales])
    assert codes(layer).max() == 3
    assert not torch.equal(codes(layer), kept)


@pytest.mark.parametrize("bits", [7, 8])
def test_codes_that_would_not_survive_in_16_bits_stay(bits):
    assert [type(each).__name__ for each in tunables(integers(bits=bits))] == ["_Vector"]


def test_norms_are_tuned_and_matrices_are_not():
    block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8, bias=False), nn.Embedding(4, 8))
    block[0].bias.data.normal_()
    found = tunables(block)
    assert [each.module for each in found] == [block[0], block[0]]
    with torch.no_grad():
        found[0].leaf.fill_(0.5)
    store(found[:1])
    torch.testing.assert_close(block[0].weight.detach(), torch.full((8,), 1.5))

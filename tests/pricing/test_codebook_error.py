"""Prices of codebook layers against what encoding leaves, in float64."""

import pytest
import torch
from torch import nn

from casp_plugin.model.codebook_schemes import LatticeScheme, TrellisScheme
from casp_plugin.model.low_rank_linear import LowRankLinear
from casp_plugin.pricing.codebook_error import DAMPING, CodebookErrors

SCHEMES = [TrellisScheme(bits=2, state_bits=10), TrellisScheme(bits=4, state_bits=10)]
SCHEMES += [LatticeScheme(bits=3)]
OUT, IN, RANK = 192, 256, 128


@pytest.fixture
def layer():
    """Weight, moment of the input and row weights, none of them alike in all channels."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(IN, IN, generator=generator) * torch.logspace(0, -1, IN)
    x = torch.randn(4096, IN, generator=generator) @ mix
    weight = torch.randn(OUT, IN, generator=generator) * torch.rand(OUT, 1, generator=generator)
    return weight, x.T @ x / len(x), torch.rand(OUT, generator=generator)


def coded(weight, moment, scheme):
    input = scheme.input(moment, 5, DAMPING)
    return scheme.decode(scheme.encode([weight], input, 5)[0]), input


def left(change, moment, row_weights):
    change, moment = change.double(), moment.double()
    return ((change @ moment * change).sum(1) @ row_weights.double()).item()


def linear(weight):
    module = nn.Linear(*weight.shape[::-1], bias=False)
    module.weight = nn.Parameter(weight)
    return module


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_a_weight(scheme, layer):
    weight, moment, row_weights = layer
    price = CodebookErrors().of(linear(weight), scheme, moment, row_weights).value
    lost = left(coded(weight, moment, scheme)[0] - weight, moment, row_weights)
    assert price == pytest.approx(lost, rel=0.2)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_factors(scheme, layer):
    """The second factor is fitted to what codes have made of the first one."""
    weight, moment, row_weights = layer
    left_vectors, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = values[:RANK].sqrt()
    up, down = left_vectors[:, :RANK] * root, root[:, None] * right[:RANK]
    module = LowRankLinear.from_factors(linear(weight), down, up)
    errors = CodebookErrors()
    price = errors.of(module, scheme, moment, row_weights).value
    first, _ = coded(down, moment, scheme)
    latent = first @ moment @ first.T
    fitted = torch.linalg.solve(
        scheme.input(latent, 5, DAMPING).moment, (up @ down @ moment @ first.T).T
    ).T
    second, _ = coded(fitted, latent, scheme.fitting((OUT, RANK)))
    lost = left(second @ first - up @ down, moment, row_weights)
    assert price == pytest.approx(lost, rel=0.12)
    # without the fit, the errors of both add up to more
    apart = left(up @ (first - down), moment, row_weights)
    plain, _ = coded(up, down @ moment @ down.T, scheme)
    apart += left(plain - up, down @ moment @ down.T, row_weights)
    assert price < 0.97 * apart

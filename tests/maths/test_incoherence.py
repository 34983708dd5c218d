"""Codes of rotated weights, in the metrics of inputs and outputs."""

import pytest
import torch

from casp_plugin.maths.block_ldl import dampened
from casp_plugin.maths.codecs.lattice import LatticeCodec
from casp_plugin.maths.codecs.trellis import TrellisCodec
from casp_plugin.maths.incoherence import Input, code_weights, decoded_weight, random_signs

BLOCK = 32
CODECS = [TrellisCodec(2, 10, columns=4), TrellisCodec(2, 10, columns=16), LatticeCodec(3)]


def moment_of(size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * size, size, generator=generator) * torch.logspace(0, -1, size)
    x = x @ torch.randn(size, size, generator=generator)
    return x.T @ x / len(x)


@pytest.mark.parametrize("codec", CODECS, ids=["trellis 4", "trellis 16", "lattice"])
def test_outputs_make_up_for_each_other(codec):
    """In the metrics of outputs less is lost with them, in that of identities without."""
    heights, columns = (256, 192), 96
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(height, columns, generator=generator) for height in heights]
    metrics = [dampened(moment_of(height, height), 0.01) for height in heights]
    input = Input(moment_of(columns, 1), random_signs(columns, 2), BLOCK, codec.columns, 0.01)
    lost = []
    for given in (None, metrics):
        coded = code_weights(weights, input, codec, BLOCK, 0, metrics=given)
        own = []
        for weight, metric, code in zip(weights, metrics, coded, strict=True):
            values = codec.decode(code.codes)
            error = weight - decoded_weight(values, code.scale, input.signs, BLOCK)
            seen = error @ input.moment * error
            own.append([(metric @ error @ input.moment * error).sum(), seen.sum()])
        lost.append(torch.tensor(own))
    without, with_metrics = lost
    assert (with_metrics[:, 0] < 0.9 * without[:, 0]).all()
    assert (without[:, 1] < with_metrics[:, 1]).all()


def test_scales_are_the_best_in_both_metrics():
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    metric, codec = dampened(moment_of(64, 3), 0.1), CODECS[0]
    input = Input(moment_of(96, 1), random_signs(96, 2), BLOCK, codec.columns, 0.01)
    [coded] = code_weights([weight], input, codec, BLOCK, 0, metrics=[metric])
    factors = torch.ones(64, dtype=torch.float64, requires_grad=True)
    plain = decoded_weight(codec.decode(coded.codes), coded.scale, input.signs, BLOCK).double()
    error = weight.double() - factors[:, None] * plain
    loss = (metric.double() @ error @ input.moment.double() * error).sum()
    (slope,) = torch.autograd.grad(loss, factors)
    # against the slope where one row is off by a tenth
    assert slope.abs().max() < 1e-2 * loss

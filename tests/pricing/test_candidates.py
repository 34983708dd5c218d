"""Prices of candidates against the outputs of really rounded layers."""

import pytest
import torch
from torch import nn

from casp_plugin.maths.hadamard import rotate, rotate_moment
from casp_plugin.maths.low_rank import whitened_spectrum
from casp_plugin.model.latent import Latent
from casp_plugin.model.schemes import weight_args
from casp_plugin.pricing.candidates import Pricing
from casp_plugin.pricing.rounding_error import rounding_delta
from casp_plugin.statistics.statistics import Statistics

NAMES = ("attn.q_proj", "attn.k_proj")
GROUP = 16


@pytest.fixture
def measured():
    """Two linears, their inputs, and gradients at their outputs; all float64."""
    torch.manual_seed(0)
    linears = {
        name: nn.Linear(64, rows, bias=False) for name, rows in zip(NAMES, (48, 32), strict=True)
    }
    x = torch.randn(4000, 64) @ torch.randn(64, 64) * torch.logspace(0, -1, 64)
    g = {name: torch.randn(2000, linear.out_features) for name, linear in linears.items()}
    statistics = Statistics(
        second_moments=dict.fromkeys(NAMES, x.T @ x / len(x)),
        mean_squares=dict.fromkeys(NAMES, x.square().mean(0)),
        output_energies={
            n: (x @ m.weight.T).square().sum(1).mean().item() for n, m in linears.items()
        },
        gradient_squares={n: each.square().mean(0) for n, each in g.items()},
        gradient_moments={n: each.T @ each / len(each) for n, each in g.items()},
    )
    return linears, x, g, statistics


def priced(statistics, linears, latent=None, fisher=True, rounding="gptq", block=1):
    schemes = {bits: weight_args(bits, GROUP) for bits in (2, 4)}
    pricing = Pricing(schemes, statistics, fisher, rounding, lambda *args: block, 16)
    unit = pricing.layers(linears, latent)
    pricing.finish()
    return unit


def latent_of(linears, statistics):
    weight = torch.cat([linear.weight for linear in linears.values()])
    moment = statistics.second_moments[NAMES[0]]
    return Latent(linears, whitened_spectrum(weight, moment))


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize(
    ("rounding", "tolerance"), [("gptq", 1e-3), ("first_order", 0.1), ("nearest", 1e-3)]
)
def test_fisher_price_of_dense_layers(measured, rounding, tolerance, block):
    """Half the mean squared gradient times the squared error, over all outputs and tokens."""
    linears, x, g, statistics = measured
    turned = rotate(x, block)
    statistics.mean_squares = dict.fromkeys(NAMES, turned.square().mean(0))
    unit = priced(statistics, linears, rounding=rounding, block=block)
    second = rotate_moment(statistics.second_moments[NAMES[0]], block)
    moment = second.diagonal() if rounding == "nearest" else second
    for candidate in unit.candidates:
        expected = 0
        for name, linear in linears.items():
            args = weight_args(candidate.bits, GROUP)
            delta = rounding_delta(rotate(linear.weight.data, block), args, moment)
            weights = g[name].square().mean(0) / 2
            if rounding == "nearest":  # errors of different columns taken as uncorrelated
                expected += (delta.square() @ moment @ weights).item()
            else:
                expected += ((turned @ delta.T).square().mean(0) @ weights).item()
        assert candidate.error == pytest.approx(expected, rel=tolerance)


def test_gptq_prices_are_lower(measured):
    linears, _, _, statistics = measured
    by_gptq = priced(statistics, linears)
    nearest = priced(statistics, linears, rounding="nearest")
    # on correlated inputs: what is rounded first is made up for by what follows
    x_error = [c.error for c in by_gptq.candidates]
    assert x_error[0] < nearest.candidates[0].error


@pytest.mark.parametrize("rounding", ["gptq", "first_order"])
@pytest.mark.parametrize("fisher", [True, False])
def test_price_of_factors(measured, fisher, rounding):
    """Lost and rounded at once, on real outputs; the two add up but for a cross term."""
    linears, x, g, statistics = measured
    latent = latent_of(linears, statistics)
    unit = priced(statistics, linears, latent, fisher, rounding)
    assert {c.rank for c in unit.candidates} == {None, 16, 32}
    candidate = next(c for c in unit.candidates if (c.rank, c.bits) == (16, 4))
    layers = latent.layers(16)
    args = weight_args(4, GROUP)
    second = statistics.second_moments[NAMES[0]]
    down = layers[NAMES[0]].down.weight.data
    inner = down @ second @ down.T
    down = down + rounding_delta(down, args, second)
    expected = 0
    for name, layer in layers.items():
        up = layer.up.weight.data
        up = up + rounding_delta(up, args, inner)
        error = x @ (up @ down - linears[name].weight.data).T
        if fisher:
            moment = g[name].T @ g[name] / len(g[name])
            expected += ((error @ moment) * error).sum(1).mean().item() / 2
        else:
            expected += (error.square().sum(1).mean() / statistics.output_energies[name]).item()
    assert candidate.error == pytest.approx(expected, rel=0.15)


def test_bytes_count_a_shared_latent_once(measured):
    linears, _, _, statistics = measured
    latent = latent_of(linears, statistics)
    unit = priced(statistics, linears, latent)
    dense, factored = (next(c for c in unit.candidates if c.rank == r) for r in (None, 32))
    # 2-bit codes; a scale of 4 bytes and 2-bit zero points for each group; a shape
    codes = (48 + 32) * 64 // 4
    scales = (48 + 32) * 4 * 4
    zeros = (3 + 2) * 4 * 4
    assert dense.bytes == codes + scales + zeros + 2 * 16
    codes = (32 * 64 + 48 * 32 + 32 * 32) // 4
    scales = (32 * 4 + 48 * 2 + 32 * 2) * 4
    zeros = (2 * 4 + 3 * 2 + 2 * 2) * 4
    assert factored.bytes == codes + scales + zeros + 3 * 16


def test_without_statistics_errors_are_unknown(measured):
    linears, _, _, _ = measured
    unit = priced(None, linears, Latent(linears, None))
    assert {c.error for c in unit.candidates} == {None}
    assert {c.rank for c in unit.candidates} == {None, 16, 32}


def test_ranks_on_offer_thin_out():
    """Each is measured, so a wide layer offers no more than some of them."""
    wide = Latent({"q": nn.Linear(512, 512, device="meta")}, None)
    unit = priced(None, wide.linears, wide)
    ranks = sorted({c.rank for c in unit.candidates if c.rank})
    assert ranks == [16, 32, 48, 64, 96, 128, 192]

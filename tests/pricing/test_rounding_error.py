"""Rounding errors against an explicit pass of inputs through rounded weights."""

import pytest
import torch
from torch import nn

from casp_plugin.model.low_rank_linear import LowRankLinear
from casp_plugin.model.schemes import weight_args
from casp_plugin.pricing import rounding_error as module
from casp_plugin.pricing.rounding_error import RoundingErrors, rounding_delta


def rounding_error(*arguments, rounding="nearest"):
    errors = RoundingErrors(rounding)
    found = errors.of(*arguments)
    errors.finish()
    return found.value


def statistics(x, weight):
    """E[x^2], and row weights that make errors relative to the output energy."""
    energy = (x @ weight.T).square().sum(1).mean()
    return x.square().mean(0), torch.ones(len(weight)) / energy


@pytest.fixture
def x():
    """Uncorrelated inputs of very different sizes, (tokens, channels)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(20000, 32, generator=generator) * torch.logspace(-1, 1, 32)


@pytest.mark.parametrize("group_size", [16, -1])
def test_dense_error_is_what_the_inputs_see(x, group_size):
    torch.manual_seed(0)
    linear = nn.Linear(32, 48, bias=False)
    mean_square, weights = statistics(x, linear.weight.data)
    args = weight_args(3, group_size)
    delta = rounding_delta(linear.weight, args, mean_square)
    seen = (x @ delta.T).square().sum(1).mean().item() * weights[0].item()
    assert rounding_error(linear, args, mean_square, weights) == pytest.approx(seen, rel=0.05)


def test_rows_are_sampled_in_a_large_layer(x):
    torch.manual_seed(0)
    linear = nn.Linear(32, 1024, bias=False)
    mean_square, weights = statistics(x, linear.weight.data)
    args = weight_args(3, 16)
    delta = rounding_delta(linear.weight, args, mean_square)
    whole = (delta.square() @ mean_square).sum().item() * weights[0].item()
    assert rounding_error(linear, args, mean_square, weights) == pytest.approx(whole, rel=0.1)


def test_factored_error_is_what_the_inputs_see(x):
    torch.manual_seed(0)
    module = LowRankLinear(32, 48, 16)
    weight = (module.up.weight @ module.down.weight).detach()
    mean_square, weights = statistics(x, weight)
    args = weight_args(4, 16)
    down = module.down.weight + rounding_delta(module.down.weight, args, mean_square)
    latent = (x @ module.down.weight.T).square().mean(0)
    up = module.up.weight + rounding_delta(module.up.weight, args, latent)
    seen = (x @ (up @ down - weight).T).square().sum(1).mean().item() * weights[0].item()
    assert rounding_error(module, args, mean_square, weights) == pytest.approx(seen, rel=0.15)


def test_more_bits_mean_less_error(x):
    torch.manual_seed(0)
    linear = nn.Linear(32, 48, bias=False)
    mean_square, weights = statistics(x, linear.weight.data)
    errors = [rounding_error(linear, weight_args(b, 16), mean_square, weights) for b in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 1000


def test_a_silent_layer_has_no_error(x):
    linear = nn.Linear(32, 48, bias=False)
    assert rounding_error(linear, weight_args(2, 16), torch.ones(32), torch.zeros(48)) == 0.0


@pytest.fixture
def massive():
    """Correlated inputs, three channels of which carry most of the energy together."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    x[:, :3] += 100 * torch.randn(4000, 1, generator=generator) * torch.tensor([8.0, 3.0, 1.0])
    return x


@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_first_order_is_near_what_gptq_leaves(massive, bits, group_size):
    """Where rounding to nearest, and counting every column by itself, is far off."""
    torch.manual_seed(0)
    linear = nn.Linear(128, 48, bias=False)
    moment, weights, args = (
        massive.T @ massive / 4000,
        torch.ones(48),
        weight_args(bits, group_size),
    )
    measured = rounding_error(linear, args, moment, weights, rounding="gptq")
    found = rounding_error(linear, args, moment, weights, rounding="first_order")
    nearest = rounding_error(linear, args, moment.diagonal(), weights)
    assert found == pytest.approx(measured, rel=0.2)
    assert nearest > 2 * measured


@pytest.mark.parametrize("rounding", ["gptq", "first_order", "nearest"])
@pytest.mark.parametrize("waiting", [0, 2**28], ids=["one by one", "together"])
def test_many_at_once_are_as_each_alone(x, waiting, rounding, monkeypatch):
    """Dense and factored, two shapes, two schemes; one latent for two layers."""
    monkeypatch.setattr(module, "WAITING_BYTES", waiting)
    torch.manual_seed(0)
    moment = x.T @ x / len(x) + 0.1
    moment = moment.diagonal() if rounding == "nearest" else moment
    q = LowRankLinear(32, 48, 16)
    k = LowRankLinear(32, 24, 16, latent_of=q)
    layers = [nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(32, 24), q, k]
    asked = [
        (layer, weight_args(bits, 16), moment, torch.rand(layer.out_features))
        for layer in layers
        for bits in (2, 3)
    ]
    alone = [rounding_error(*arguments, rounding=rounding) for arguments in asked]
    errors = RoundingErrors(rounding)
    found = [errors.of(*arguments) for arguments in asked]
    errors.finish()
    assert [error.value for error in found] == pytest.approx(alone, rel=1e-4)

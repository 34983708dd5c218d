"""Layers that share a latent, and ranks allocated over the model."""

import copy
import itertools

import pytest
import torch
from torch import nn

from casp_plugin.maths.low_rank import whitened_spectrum
from casp_plugin.model.latent import Latent, global_ranks


def made(seed=0, outs=(24, 8), columns=32, scale=1.0, bias=False, rotate=True):
    torch.manual_seed(seed)
    linears = {f"l{i}": nn.Linear(columns, out, bias=bias) for i, out in enumerate(outs)}
    spread = torch.logspace(0, -2, columns)
    for linear in linears.values():
        linear.weight.data *= spread * scale
    weight = torch.cat([linear.weight for linear in linears.values()])
    return Latent(linears, whitened_spectrum(weight, torch.eye(columns)), rotate)


def test_layers_are_the_stacked_factors():
    latent = made(bias=True)
    layers = latent.layers(6)
    factors = latent.factors(6)
    product = (factors.up @ factors.down).split([24, 8])
    x = torch.randn(5, 32)
    for (name, layer), weight in zip(layers.items(), product, strict=True):
        expected = x @ weight.float().T + latent.linears[name].bias
        torch.testing.assert_close(layer(x), expected)


def test_a_shared_latent_is_stored_once():
    model = nn.ModuleDict(made().layers(6))
    assert sorted(model.state_dict()) == ["l0.down.weight", "l0.up.weight", "l1.up.weight"]
    assert [name for name, _ in model.named_modules() if name.endswith("down")] == ["l0.down"]
    copied = copy.deepcopy(model)
    assert copied["l1"].latent is copied["l0"].down
    copied["l0"].down = nn.Linear(32, 6, bias=False)  # what quantizers that wrap layers do
    assert copied["l1"].latent is copied["l0"].down


def test_full_rank_is_exact():
    latent = made()
    x = torch.randn(5, 32)
    for name, layer in latent.layers(32).items():
        torch.testing.assert_close(layer(x), latent.linears[name](x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("multiple", "expected"), [(4, [4, 8, 12]), (16, []), (1, range(1, 16))])
def test_ranks_on_offer_are_those_that_save(multiple, expected):
    assert made().ranks(multiple) == list(expected)  # 16 * (32 + 32) weights are no saving


@pytest.mark.parametrize("keep", [0.3, 0.45, 0.8])
def test_global_ranks_are_the_best_of_all(keep):
    latents = [made(seed, scale=scale) for seed, scale in enumerate((1.0, 4.0, 0.2))]
    found = global_ranks(latents, 4, keep)

    def size(ranks):
        return sum(latent.kept(rank) for latent, rank in zip(latents, ranks, strict=True)) / 3

    def lost(ranks):
        pairs = zip(latents, ranks, strict=True)
        return sum(0 if rank is None else latent.spectrum.lost(rank) for latent, rank in pairs)

    options = [4, 8, 12, None]
    allowed = [r for r in itertools.product(options, repeat=3) if size(r) <= keep]
    assert size(found) <= keep
    assert lost(found) == pytest.approx(min(map(lost, allowed)))


def test_too_small_a_share_takes_the_least_ranks():
    assert global_ranks([made(), made(1)], 4, 0.01) == [4, 4]

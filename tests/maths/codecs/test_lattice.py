"""E8P: its points by their definition, the nearest one by brute force."""

from itertools import product

import pytest
import torch

from casp_plugin.maths.codecs.lattice import (
    LatticeCodec,
    absolute_values,
    decode_e8p,
    nearest_e8p,
    short_vectors,
)


@pytest.fixture(scope="module")
def points():
    """All 65,536 points, by code."""
    return decode_e8p(torch.arange(1 << 16))


def test_absolute_values_are_all_short_ones():
    every = torch.tensor(list(product((0.5, 1.5, 2.5), repeat=8)))
    short = every[every.square().sum(1) <= 10]
    table = absolute_values()
    assert len(short) == 227
    assert {*map(tuple, table[:227].tolist())} == {*map(tuple, short.tolist())}
    assert (table[227:].square().sum(1) == 12).all()
    assert len({*map(tuple, table.tolist())}) == 256


def test_points_are_moved_half_integers_with_an_even_sum(points):
    moved = torch.arange(1 << 16) >> 7 & 1
    centred = points - torch.where(moved == 1, -0.25, 0.25)[:, None]
    assert torch.equal((centred - 0.5).round(), centred - 0.5)
    assert not (centred.sum(1) % 2).any()
    assert len(points.unique(dim=0)) == 1 << 16


def test_short_vectors_are_of_e8():
    """Integers or half-integers, with an even sum."""
    table = short_vectors()
    whole = (table == table.round()).all(1)
    halves = (table - 0.5 == (table - 0.5).round()).all(1)
    assert (whole | halves).all()
    assert not (table.sum(1) % 2).any()
    norms = table.square().sum(1).tolist()
    assert [norms.count(n) for n in (0, 2, 4)] == [1, 240, 15]
    assert len(table.unique(dim=0)) == 256


def test_nearest_point_is_the_nearest_of_all(points):
    generator = torch.Generator().manual_seed(0)
    targets = 1.3 * torch.randn(200, 8, generator=generator)
    codes = nearest_e8p(targets)
    found = (points[codes] - targets).square().sum(1)
    torch.testing.assert_close(found, torch.cdist(targets, points).square().min(1).values)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_decode_to_their_values(bits):
    codec = LatticeCodec(bits)
    target = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    codes, values = zip(*map(codec.encode, target.split(8, 1)), strict=True)
    assert codes[0].shape == (5, bits)
    torch.testing.assert_close(codec.decode(torch.stack(codes, 1)), torch.cat(values, 1))


@pytest.mark.parametrize(("bits", "most"), [(2, 0.0935), (3, 0.0302), (4, 0.0087)])
def test_distortion_of_gaussian_numbers(bits, most):
    """Less than Lloyd-Max scalars of the same bits leave: .118, .0345, .0095."""
    assert 4.0**-bits < LatticeCodec(bits).distortion < most

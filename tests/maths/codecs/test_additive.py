"""Learned codebooks: the search against all sums, and what learning gains."""

from itertools import product

import pytest
import torch

from casp_plugin.maths.block_ldl import block_ldl, dampened
from casp_plugin.maths.codecs import additive
from casp_plugin.maths.codecs.additive import AdditiveCodec, additive_distortion, learn


def metric_of(seed=0):
    mix = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mix @ mix.T + torch.eye(8)


def test_search_with_a_whole_beam_is_exact():
    generator = torch.Generator().manual_seed(0)
    tables = torch.randn(2, 4, 8, generator=generator, dtype=torch.float64)
    target = torch.randn(20, 8, generator=generator, dtype=torch.float64)
    metric = metric_of()
    codec = AdditiveCodec(2, 2, beam=16)
    codes, sums = codec.search(target, tables, metric)
    pairs = torch.tensor(list(product(range(4), repeat=2)))
    every = tables[0][pairs[:, 0]] + tables[1][pairs[:, 1]]  # (16, 8)
    error = target[:, None] - every
    cost = (error @ metric * error).sum(-1)
    assert torch.equal(codes, pairs[cost.argmin(1)])
    torch.testing.assert_close(sums, every[cost.argmin(1)])


def case(rows=32, columns=64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, columns, generator=generator)
    x = x @ torch.randn(columns, columns, generator=generator)
    moment = dampened(x.T @ x / len(x), 0.01)
    weight = torch.randn(rows, columns, generator=generator)
    return weight, moment


def error_of(weight, moment, made):
    error = weight - made.dense
    return ((error @ moment * error).sum() / (weight @ moment * weight).sum()).item()


def test_learning_beats_its_start(monkeypatch):
    weight, moment = case()
    codec, ldl = AdditiveCodec(2, 4), block_ldl(moment, 8)
    made = error_of(weight, moment, learn(weight, moment, ldl, codec, 0))
    monkeypatch.setattr(additive, "_TURNS", 1)
    monkeypatch.setattr(additive, "_STEPS", 0)
    start = error_of(weight, moment, learn(weight, moment, ldl, codec, 0))
    assert made < 0.9 * start


def test_learning_is_deterministic():
    weight, moment = case(8, 16)
    ldl = block_ldl(moment, 8)
    first, second = (learn(weight, moment, ldl, AdditiveCodec(1, 4), 3) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.tables, second.tables)


@pytest.mark.parametrize("codebooks", [1, 2, 4])
def test_distortion_is_between_the_bound_and_scalars(codebooks):
    scalar = {1: 0.363, 2: 0.118, 4: 0.0095}[codebooks]
    assert 4.0**-codebooks < additive_distortion(AdditiveCodec(codebooks)) < 1.3 * scalar

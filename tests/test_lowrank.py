"""The factorisation against a slow, obvious reference in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from casp_plugin.lowrank import WhitenedWeight, kept_share, saves_parameters, uniform_rank


def reference(weight, moment, rank):
    """Truncated SVD of W H^(1/2), taken back by H^(-1/2): the textbook whitening."""
    values, vectors = np.linalg.eigh(moment)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    left, spectrum, right = np.linalg.svd(weight @ root, full_matrices=False)
    low = left[:, :rank] @ np.diag(spectrum[:rank]) @ right[:rank]
    return low @ np.linalg.inv(root)


def inputs(tokens, channels, seed=0):
    """Correlated inputs: X of shape (tokens, channels)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, channels, generator=generator, dtype=torch.float64) @ mix


@pytest.mark.parametrize(("out", "columns"), [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_matches_textbook_whitening(out, columns, rank):
    weight = inputs(out, columns, seed=1)
    x = inputs(200, columns)
    moment = x.T @ x / len(x)
    factors = WhitenedWeight(weight, moment, dampening_frac=0).factors(rank)
    expected = reference(weight.numpy(), moment.numpy(), rank)
    np.testing.assert_allclose((factors.up @ factors.down).numpy(), expected, atol=1e-8)


def test_error_is_the_share_of_output_energy_lost():
    weight, x = inputs(16, 24, seed=1), inputs(300, 24)
    factors = WhitenedWeight(weight, x.T @ x / len(x), dampening_frac=0).factors(6)
    lost = (x @ (weight - factors.up @ factors.down).T).square().sum()
    assert factors.error == pytest.approx((lost / (x @ weight.T).square().sum()).item())


def test_beats_plain_svd_on_the_outputs():
    weight, x = inputs(16, 24, seed=1), inputs(300, 24)
    moment = x.T @ x / len(x)

    def output_error(factors):
        return (x @ (weight - factors.up @ factors.down).T).square().sum().item()

    whitened = WhitenedWeight(weight, moment).factors(4)
    plain = WhitenedWeight(weight).factors(4)
    assert output_error(whitened) < 0.9 * output_error(plain)


def test_plain_svd_is_the_best_approximation_of_the_weight():
    weight = inputs(16, 24)
    factors = WhitenedWeight(weight).factors(4)
    spectrum = torch.linalg.svdvals(weight)
    distance = (weight - factors.up @ factors.down).square().sum()
    assert distance.item() == pytest.approx(spectrum[4:].square().sum().item())


def test_factors_are_balanced():
    weight, x = inputs(16, 24, seed=1), inputs(300, 24)
    moment = x.T @ x / len(x)
    factors = WhitenedWeight(weight, moment, dampening_frac=0).factors(5)
    outer = factors.up.square().sum(0)
    inner = ((factors.down @ moment) * factors.down).sum(1)
    torch.testing.assert_close(outer, inner)


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("dampening", [0.0, 0.01])
def test_rank_deficient_statistics_do_no_harm(tokens, dampening):
    weight, x = inputs(8, 16, seed=1), inputs(tokens, 16)
    moment = x.T @ x / max(tokens, 1)
    factors = WhitenedWeight(weight, moment, dampening).factors(6)
    product = factors.up @ factors.down
    assert torch.isfinite(product).all()
    if tokens and not dampening:  # rank 6 holds all that so few tokens can tell apart
        torch.testing.assert_close(x @ product.T, x @ weight.T, atol=1e-6, rtol=1e-6)


def test_zero_weight_stays_zero():
    factors = WhitenedWeight(torch.zeros(4, 6), torch.eye(6)).factors(2)
    assert factors.error == 0
    assert (factors.up @ factors.down).abs().max() == 0


@pytest.mark.parametrize("rank", [0, 5])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=r"rank must lie in \[1, 4\]"):
        WhitenedWeight(torch.randn(4, 6)).factors(rank)


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match="weight holds NaN"):
        WhitenedWeight(torch.full((2, 2), float("nan")))
    with pytest.raises(ValueError, match="second moment holds NaN"):
        WhitenedWeight(torch.ones(2, 2), torch.full((2, 2), float("inf")))
    with pytest.raises(ValueError, match="3 channels does not fit a weight of 2 columns"):
        WhitenedWeight(torch.ones(2, 2), torch.eye(3))


@given(
    out=st.integers(1, 4096),
    columns=st.integers(1, 4096),
    keep=st.floats(0.01, 0.99),
    multiple=st.sampled_from([1, 16, 64, 128]),
)
def test_uniform_rank_is_the_nearest_multiple(out, columns, keep, multiple):
    rank = uniform_rank(out, columns, keep, multiple)
    assert rank >= multiple
    assert rank % multiple == 0
    off = abs(kept_share(out, columns, rank) - keep)
    for other in (rank - multiple, rank + multiple):
        if other > 0:
            assert off <= abs(kept_share(out, columns, other) - keep) + 1e-12


def test_saving_is_about_parameters():
    assert saves_parameters(64, 64, 31)
    assert not saves_parameters(64, 64, 32)

"""The factorisation against a slow, obvious reference in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from casp_plugin.maths.low_rank import (
    losses_by_rank,
    random_rotation,
    uniform_rank,
    whitened_spectrum,
)
from casp_plugin.model.schemes import weight_args
from casp_plugin.pricing.rounding_error import rounding_delta


def quadratic_error(delta, moment, metric):
    """E[dy^T G dy] = tr(G dW H dW^T); G may be its diagonal."""
    metric = metric if metric.ndim == 2 else metric.diag()
    delta = delta.double()
    return (metric.double() * (delta @ moment.double() @ delta.T)).sum().item()


def reference(weight, moment, rank, metric=None):
    """Truncated SVD of G^(1/2) W H^(1/2), taken back by G^(-1/2) and H^(-1/2): the textbook."""
    root = square_root(moment)
    outer = np.eye(len(weight)) if metric is None else square_root(metric)
    left, spectrum, right = np.linalg.svd(outer @ weight @ root, full_matrices=False)
    low = left[:, :rank] @ np.diag(spectrum[:rank]) @ right[:rank]
    return np.linalg.inv(outer) @ low @ np.linalg.inv(root)


def square_root(moment):
    values, vectors = np.linalg.eigh(moment)
    return vectors @ np.diag(np.sqrt(values)) @ vectors.T


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
    factors = whitened_spectrum(weight, moment, dampening_frac=0).factors(rank)
    expected = reference(weight.numpy(), moment.numpy(), rank)
    np.testing.assert_allclose((factors.up @ factors.down).numpy(), expected, atol=1e-7)


@pytest.mark.parametrize(("out", "columns"), [(12, 20), (20, 12)])
@pytest.mark.parametrize("rank", [1, 5])
def test_matches_textbook_two_sided_whitening(out, columns, rank):
    weight, x, g = inputs(out, columns, seed=1), inputs(200, columns), inputs(300, out, seed=2)
    moment, metric = x.T @ x / len(x), g.T @ g / len(g)
    spectrum = whitened_spectrum(weight, moment, [metric], dampening_frac=0)
    factors = spectrum.factors(rank)
    product = factors.up @ factors.down
    expected = reference(weight.numpy(), moment.numpy(), rank, metric.numpy())
    np.testing.assert_allclose(product.numpy(), expected, atol=1e-7)
    lost = quadratic_error(weight - product, moment, metric)
    assert spectrum.lost(rank) == pytest.approx(lost)


@pytest.mark.parametrize(("out", "columns"), [(160, 96), (64, 96)])
def test_eigenvectors_in_float32_cost_no_energy(out, columns):
    """Of spectra that fall over five orders of magnitude, as those of real layers do."""
    left, _, right = torch.linalg.svd(inputs(out, columns, seed=1), full_matrices=False)
    weight = left @ torch.logspace(0, -2.5, len(right), dtype=torch.float64).diag() @ right
    x, g = inputs(500, columns), inputs(500, out, seed=2)
    moment, metric = x.T @ x / len(x), g.T @ g / len(g)
    exact = whitened_spectrum(weight, moment, [metric])
    rough = whitened_spectrum(weight.float(), moment, [metric])
    total = quadratic_error(weight, moment, metric)
    for rank in (8, 32, 60):
        one, two = (
            quadratic_error(weight - f.up.double() @ f.down.double(), moment, metric)
            for f in (exact.factors(rank), rough.factors(rank))
        )
        assert two - one < 1e-6 * total
        assert rough.error(rank) == pytest.approx(exact.error(rank), abs=1e-6)


@pytest.mark.parametrize("diagonal", [False, True])
def test_losses_by_rank_are_those_of_the_factors(diagonal):
    """Of two stacked matrices, without the dampening that the factors were made with."""
    weight, x, g = inputs(20, 12, seed=1), inputs(200, 12), inputs(300, 20, seed=2)
    moment, metric = x.T @ x / len(x), g.T @ g / len(g)
    blocks = [metric[:14, :14], metric[14:, 14:]]
    spectrum = whitened_spectrum(weight, moment, blocks, dampening_frac=0.1)
    given = [block.diagonal() for block in blocks] if diagonal else blocks
    losses = losses_by_rank(spectrum.up, spectrum.down, moment, given)
    whole = torch.block_diag(*blocks) * (torch.eye(20) if diagonal else 1)
    assert losses[0] == pytest.approx(quadratic_error(weight, moment, whole))
    assert losses[12] == 0
    for rank in (1, 5, 11):
        factors = spectrum.factors(rank)
        expected = quadratic_error(weight - factors.up @ factors.down, moment, whole)
        assert losses[rank] == pytest.approx(expected)


def test_output_metric_spares_what_matters():
    """Against the same rank without it: less error where it hurts, at the price of the rest."""
    weight, x = inputs(16, 24, seed=1), inputs(300, 24)
    moment = x.T @ x / len(x)
    metric = torch.diag(torch.logspace(0, -4, 16, dtype=torch.float64))
    plain = whitened_spectrum(weight, moment).factors(4)
    aware = whitened_spectrum(weight, moment, [metric]).factors(4)

    def error(factors, output_metric):
        return quadratic_error(weight - factors.up @ factors.down, moment, output_metric)

    assert error(aware, metric) < 0.8 * error(plain, metric)
    assert error(aware, torch.ones(16)) > error(plain, torch.ones(16))


def test_quadratic_error_is_that_of_the_samples():
    delta, x, g = inputs(6, 9, seed=1), inputs(50, 9), inputs(40, 6, seed=2)
    outputs = x @ delta.T
    slow = sum((y @ direction) ** 2 for y in outputs for direction in g) / (len(x) * len(g))
    moment, metric = x.T @ x / len(x), g.T @ g / len(g)
    assert quadratic_error(delta, moment, metric) == pytest.approx(slow.item())
    weights = metric.diagonal()
    diagonal = (outputs.square() * weights).sum(1).mean().item()
    assert quadratic_error(delta, moment, weights) == pytest.approx(diagonal)


@pytest.mark.parametrize("dead", [0, 3, 16])
def test_outputs_without_any_weight_do_no_harm(dead):
    weight, x = inputs(16, 24, seed=1), inputs(300, 24)
    metric = torch.eye(16, dtype=torch.float64)
    metric[:dead, :dead] = 0
    moment = x.T @ x / len(x)
    factors = whitened_spectrum(weight, moment, [metric], dampening_frac=0).factors(13)
    assert torch.isfinite(factors.up @ factors.down).all()
    if dead == 3:  # 13 directions are all that count
        delta = weight - factors.up @ factors.down
        assert quadratic_error(delta, moment, metric) < 1e-9 * quadratic_error(
            weight, moment, metric
        )


def test_rotation_changes_nothing_but_the_factors():
    weight, x = inputs(16, 24, seed=1), inputs(300, 24)
    spectrum = whitened_spectrum(weight, x.T @ x / len(x))
    plain, turned = spectrum.factors(6), spectrum.factors(6, random_rotation(6))
    torch.testing.assert_close(turned.up @ turned.down, plain.up @ plain.down)
    assert not torch.allclose(turned.up, plain.up)


def test_random_rotation_is_orthogonal_and_seeded():
    rotation = random_rotation(12)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(12, dtype=torch.float64))
    assert torch.equal(rotation, random_rotation(12))
    assert not torch.allclose(rotation, random_rotation(12, seed=1))


def test_rotated_factors_round_better():
    """Columns of an SVD are of very different sizes; one scale for a group of them is coarse."""
    left, _, right = torch.linalg.svd(inputs(64, 96), full_matrices=False)
    weight = left @ torch.logspace(0, -3, 64, dtype=torch.float64).diag() @ right
    moment = torch.eye(96, dtype=torch.float64)
    spectrum = whitened_spectrum(weight, moment)
    args = weight_args(4, 32)

    def rounded(factors):
        down = factors.down + rounding_delta(factors.down, args, moment.diagonal())
        latent = ((factors.down @ moment) * factors.down).sum(1)
        up = factors.up + rounding_delta(factors.up, args, latent)
        return quadratic_error(up @ down - factors.up @ factors.down, moment, torch.ones(64))

    turned = rounded(spectrum.factors(32, random_rotation(32)))
    assert turned < 0.7 * rounded(spectrum.factors(32))


def test_error_is_the_share_of_output_energy_lost():
    weight, x = inputs(16, 24, seed=1), inputs(300, 24)
    factors = whitened_spectrum(weight, x.T @ x / len(x), dampening_frac=0).factors(6)
    lost = (x @ (weight - factors.up @ factors.down).T).square().sum()
    assert factors.error == pytest.approx((lost / (x @ weight.T).square().sum()).item())


def test_beats_plain_svd_on_the_outputs():
    weight, x = inputs(16, 24, seed=1), inputs(300, 24)
    moment = x.T @ x / len(x)

    def output_error(factors):
        return (x @ (weight - factors.up @ factors.down).T).square().sum().item()

    whitened = whitened_spectrum(weight, moment).factors(4)
    plain = whitened_spectrum(weight).factors(4)
    assert output_error(whitened) < 0.9 * output_error(plain)


def test_plain_svd_is_the_best_approximation_of_the_weight():
    weight = inputs(16, 24)
    factors = whitened_spectrum(weight).factors(4)
    spectrum = torch.linalg.svdvals(weight)
    distance = (weight - factors.up @ factors.down).square().sum()
    assert distance.item() == pytest.approx(spectrum[4:].square().sum().item())


def test_factors_are_balanced():
    weight, x = inputs(16, 24, seed=1), inputs(300, 24)
    moment = x.T @ x / len(x)
    factors = whitened_spectrum(weight, moment, dampening_frac=0).factors(5)
    outer = factors.up.square().sum(0)
    inner = ((factors.down @ moment) * factors.down).sum(1)
    torch.testing.assert_close(outer, inner)


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("dampening", [0.0, 0.01])
def test_rank_deficient_statistics_do_no_harm(tokens, dampening):
    weight, x = inputs(8, 16, seed=1), inputs(tokens, 16)
    moment = x.T @ x / max(tokens, 1)
    factors = whitened_spectrum(weight, moment, dampening_frac=dampening).factors(6)
    product = factors.up @ factors.down
    assert torch.isfinite(product).all()
    if tokens and not dampening:  # rank 6 holds all that so few tokens can tell apart
        torch.testing.assert_close(x @ product.T, x @ weight.T, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("out", "columns"), [(160, 96), (64, 96)])
@pytest.mark.parametrize("dampening", [0.0, 1e-7])
def test_singular_statistics_in_float32(out, columns, dampening):
    """Of fewer tokens than channels, one direction far above the others: both sides."""
    weight = inputs(out, columns, seed=1).float()
    x, g = inputs(40, columns).float(), inputs(30, out, seed=2).float()
    x[:, 0] *= 1000
    moment, metric = x.T @ x / len(x), g.T @ g / len(g)
    factors = whitened_spectrum(weight, moment, [metric], dampening).factors(40)
    lost = quadratic_error(weight - factors.up @ factors.down, moment, metric)
    assert lost < 1e-5 * quadratic_error(weight, moment, metric)  # 30 directions are all there is


def test_a_block_without_any_weight():
    """Outputs of one of two stacked matrices that the loss does not depend on."""
    weight, g = inputs(20, 24, seed=1), inputs(100, 12, seed=2)
    metric = [g.T @ g / len(g), torch.zeros(8, 8)]
    factors = whitened_spectrum(weight, None, metric, dampening_frac=0).factors(12)
    delta = weight - factors.up @ factors.down
    assert torch.isfinite(delta).all()
    whole = quadratic_error(weight, torch.eye(24), torch.block_diag(*metric))
    assert quadratic_error(delta, torch.eye(24), torch.block_diag(*metric)) < 1e-6 * whole


def test_zero_weight_stays_zero():
    factors = whitened_spectrum(torch.zeros(4, 6), torch.eye(6)).factors(2)
    assert factors.error == 0
    assert (factors.up @ factors.down).abs().max() == 0


@pytest.mark.parametrize("rank", [0, 5])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=r"rank must lie in \[1, 4\]"):
        whitened_spectrum(torch.randn(4, 6)).factors(rank)


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match="weight holds NaN"):
        whitened_spectrum(torch.full((2, 2), float("nan")))
    with pytest.raises(ValueError, match="second moment holds NaN"):
        whitened_spectrum(torch.ones(2, 2), torch.full((2, 2), float("inf")))
    with pytest.raises(ValueError, match="3 channels does not fit a weight of 2 columns"):
        whitened_spectrum(torch.ones(2, 2), torch.eye(3))


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

    def off(rank):
        return abs(rank * (out + columns) / (out * columns) - keep)

    for other in (rank - multiple, rank + multiple):
        if other > 0:
            assert off(rank) <= off(other) + 1e-12

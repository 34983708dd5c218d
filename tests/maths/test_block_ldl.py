"""BlockLDLQ against its definition, in float64."""

import pytest
import torch

from casp_plugin.maths.block_ldl import (
    block_ldl,
    corrected,
    dampened,
    round_by_blocks,
    round_by_tiles,
)


def moment_of(columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return (x @ mix).T @ (x @ mix) / len(x)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_decomposition_is_unit_lower_and_block_diagonal(size):
    moment = moment_of(48)
    ldl = block_ldl(moment, size)
    for start in range(0, 48, size):
        own = slice(start, start + size)
        torch.testing.assert_close(ldl.lower[own, own], torch.eye(size, dtype=torch.float64))
        assert not ldl.lower[own, start + size :].any()
    inverse = torch.linalg.inv(ldl.lower)
    taken = moment[ldl.columns][:, ldl.columns]
    middle = inverse @ taken @ inverse.T  # solving with the transpose would not be block-diagonal
    torch.testing.assert_close(middle, torch.block_diag(*ldl.blocks[ldl.order]))


def test_blocks_of_least_energy_are_rounded_last():
    """Weights of inputs with little energy make up for those with much."""
    strength = torch.logspace(1, -1, 16, dtype=torch.float64).repeat_interleave(4)
    moment = moment_of(64) * strength * strength[:, None]
    ldl, taken = block_ldl(moment, 4), []

    def encode(target, index):
        taken.append(index)
        return target.round()

    round_by_blocks(torch.randn(8, 64, dtype=torch.float64), ldl, encode)
    energy = moment.diagonal().unflatten(0, (-1, 4)).sum(1)
    assert taken == energy.argsort(descending=True).tolist()
    natural = torch.linalg.cholesky(moment).diagonal().square().sum()
    assert ldl.spread(0) < 0.8 * natural


@pytest.mark.parametrize(("columns", "size"), [(48, 4), (320, 16), (272, 16)])
def test_error_of_rounding_is_that_of_the_blocks_alone(columns, size):
    """What later blocks lose is made up for: (E L)_b is the rounding error of block b."""
    moment, own = moment_of(columns), {}
    weight = torch.randn(
        6, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    ldl = block_ldl(moment, size)

    def encode(target, index):
        own[index] = target - target.round()
        return target.round()

    rounded = round_by_blocks(weight, ldl, encode)
    assert torch.equal(rounded, rounded.round())
    error = (weight - rounded)[:, ldl.columns] @ ldl.lower
    wanted = torch.cat([own[b] for b in range(columns // size)], 1)
    torch.testing.assert_close(error, wanted[:, ldl.columns])
    torch.testing.assert_close(ldl.weight_error(wanted[:, ldl.columns]), weight - rounded)
    cost = ((weight - rounded) @ moment * (weight - rounded)).sum()
    expected = sum((own[b] @ d * own[b]).sum() for b, d in enumerate(ldl.blocks))
    torch.testing.assert_close(cost, expected)


def test_feedback_beats_rounding_to_nearest():
    moment = moment_of(64)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rounded = round_by_blocks(weight, block_ldl(moment, 4), lambda target, _: target.round())
    errors = [(weight - q) @ moment * (weight - q) for q in (rounded, weight.round())]
    assert errors[0].sum() < 0.7 * errors[1].sum()


@pytest.mark.parametrize(
    ("height", "width", "inputs"), [(8, 4, 64), (1, 8, 64), (8, 4, 300), (16, 8, 1040)]
)
def test_error_of_tiles_is_that_of_each_alone(height, width, inputs):
    """With a metric of the outputs: (M^T E L)_ij is the rounding error of tile ij."""
    generator = torch.Generator().manual_seed(1)
    moment, metric = moment_of(inputs), moment_of(48, seed=1)
    columns, outputs = block_ldl(moment, width), block_ldl(metric, height)
    weight = torch.randn(48, inputs, generator=generator, dtype=torch.float64)
    own = torch.full_like(weight, torch.nan).unflatten(1, (-1, width)).unflatten(0, (-1, height))

    def encode(target, row, column):
        own[row, :, column] = target - target.round()
        return target.round()

    rounded = round_by_tiles(weight, outputs, columns, encode)
    assert torch.equal(rounded, rounded.round())
    own, error = own.flatten(2).flatten(0, 1), weight - rounded
    order = outputs.columns[:, None], columns.columns
    torch.testing.assert_close(outputs.lower.T @ error[order] @ columns.lower, own[order])
    cost = (metric @ error @ moment * error).sum()
    both = torch.block_diag(*outputs.blocks) @ own @ torch.block_diag(*columns.blocks)
    torch.testing.assert_close((both * own).sum(), cost)
    nearest = weight - weight.round()
    assert cost < 0.5 * (metric @ nearest @ moment * nearest).sum()


def test_tiles_of_outputs_that_count_alike_are_blocks():
    moment, identity = moment_of(64), torch.eye(32, dtype=torch.float64)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = block_ldl(moment, 4)
    rounded = round_by_tiles(
        weight, block_ldl(identity, 8), inputs, lambda target, *_: target.round()
    )
    expected = round_by_blocks(weight, inputs, lambda target, _: target.round())
    assert torch.equal(rounded, expected)


def test_spread_is_the_output_energy_of_unit_errors():
    """Against random errors of the blocks, carried into weights by L^-1."""
    plain = moment_of(64)
    moment = dampened(plain, 0.05)
    ldl = block_ldl(moment, 4)
    errors = ldl.weight_error(torch.randn(20000, 64, dtype=torch.float64))
    assert ldl.spread(0) == pytest.approx((errors @ moment * errors).sum(1).mean().item(), rel=0.05)
    dampening = 0.05 * plain.diagonal().mean().item()
    undampened = (errors @ plain * errors).sum(1).mean().item()
    assert ldl.spread(dampening) == pytest.approx(undampened, rel=0.05)


def test_channels_without_energy_are_no_obstacle():
    moment = torch.zeros(8, 8, dtype=torch.float64)
    moment[0, 0] = 2.0
    assert block_ldl(dampened(moment, 0.0), 4).lower.isfinite().all()


def test_correction_is_the_least_squares_fit_of_the_dense_output():
    generator = torch.Generator().manual_seed(0)
    dense, changed = torch.randn(2, 100, 12, generator=generator, dtype=torch.float64)
    changed = dense + 0.3 * changed
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    moment, change = changed.T @ changed, (dense - changed).T @ changed
    fit = torch.linalg.lstsq(changed, dense @ weight.T).solution.T
    torch.testing.assert_close(corrected(weight, moment, change, 1.0), fit)
    torch.testing.assert_close(corrected(weight, moment, change, 0.5), (weight + fit) / 2)

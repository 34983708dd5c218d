"""Block influence and output errors against loops in float64."""

import pytest
import torch

from casp_plugin.maths.errors import output_error, token_influence


def test_token_influence_against_a_loop():
    before, after = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    values = token_influence(before, after)
    for b in range(3):
        for t in range(5):
            x, y = before[b, t].double(), after[b, t].double()
            expected = 1 - (x @ y) / (x.norm() * y.norm())
            assert values[b, t].item() == pytest.approx(expected.item(), abs=1e-6)


def test_a_layer_that_only_scales_has_no_influence():
    hidden = torch.randn(4, 8)
    torch.testing.assert_close(token_influence(hidden, 3 * hidden), torch.zeros(4))
    torch.testing.assert_close(token_influence(hidden, -hidden), torch.full((4,), 2.0))


def test_output_error_is_the_mean_over_the_inputs():
    x, delta = torch.randn(50, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    expected = torch.stack([(delta @ token).square() for token in x]).mean(0)
    torch.testing.assert_close(output_error(delta, x.T @ x / len(x)), expected)


def test_diagonal_is_exact_for_uncorrelated_inputs():
    delta, squares = torch.randn(4, 6), torch.rand(6)
    torch.testing.assert_close(output_error(delta, squares), output_error(delta, squares.diag()))

"""Running means over tokens."""

import pytest
import torch

from casp_plugin.statistics import hooks
from casp_plugin.statistics.hooks import TokenMean, row_blocks, squared_norms


@pytest.mark.parametrize("channels", [5, 8, 9, 23, 70])
def test_products_are_summed_up_in_the_upper_triangle(channels, monkeypatch):
    monkeypatch.setattr(hooks, "LEAST_BLOCK", 8)
    x = torch.randn(40, channels, generator=torch.Generator().manual_seed(0))
    mean = TokenMean()
    for rows in x.split(16):
        mean.add_products(rows, len(rows))
    found = mean.finish()
    torch.testing.assert_close(found, x.T @ x / 40)
    torch.testing.assert_close(found, found.T)
    sizes = [end - start for start, end in row_blocks(channels)]
    assert sum(sizes) == channels
    assert len(sizes) <= 9


def test_squared_norms_of_bfloat16_are_summed_up_in_float32():
    x = torch.randn(3000, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = x.double().square().sum(0)
    torch.testing.assert_close(squared_norms(x).double(), expected, rtol=1e-5, atol=0)

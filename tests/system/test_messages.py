"""Words for people."""

import pytest

from casp_plugin.system.messages import size_text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0.0 MB"), (87_040_000, "87.0 MB"), (10**9, "1.00 GB"), (2_514_000_000, "2.51 GB")],
)
def test_sizes(size, text):
    assert size_text(size) == text

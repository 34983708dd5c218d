"""Bytes into average bits and back."""

import pytest

from casp_plugin.maths.average_bits import average_bits, bytes_within


def test_average_bits_of_stored_bytes():
    assert average_bits(stored_bytes=12, weights=32) == 3.0
    assert average_bits(stored_bytes=0, weights=32) == 0.0


def test_a_budget_drops_the_fraction_of_a_byte():
    assert bytes_within(average_bits=2.5, weights=32) == 10
    assert bytes_within(average_bits=2.2, weights=10) == 2


@pytest.mark.parametrize("bits", [1.5, 2.0, 2.28, 3.14159, 4.0])
def test_a_plan_at_its_budget_stays_within_it(bits):
    reached = average_bits(bytes_within(bits, 1_000_003), 1_000_003)
    assert bits - 8 / 1_000_003 < reached <= bits

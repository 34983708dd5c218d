"""Which cases `make test` runs, and which `make test-models` adds."""

import pytest


def tiered(cases, *quick) -> list:
    """Return cases as parameters of a test, marked `models` unless they are quick ones.

    :param quick: cases that `make test` runs, one of each behaviour
    """
    unknown = [case for case in quick if case not in list(cases)]
    assert not unknown, unknown
    return [pytest.param(case, marks=() if case in quick else pytest.mark.models) for case in cases]

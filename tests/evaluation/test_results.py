"""Intervals, tests and comparisons against what they should be by hand or by simulation."""

import json
import math

import numpy as np
import pytest
from rich.console import Console

from casp_plugin.evaluation.intervals import difference_interval, mcnemar, mean_interval
from casp_plugin.evaluation.records import load_records, save_records
from casp_plugin.evaluation.results import (
    Evaluation,
    Measurement,
    compare,
    compare_all,
    comparison_table,
)

ONES = np.ones(200)


def drawn(seed=0, size=200):
    return np.random.default_rng(seed).normal(size=size)


def test_interval_of_a_mean():
    values = 3 + drawn()
    low, high = mean_interval(values, ONES)
    spread = 1.96 * values.std(ddof=1) / 200**0.5
    assert low == pytest.approx(values.mean() - spread, abs=0.1 * spread)
    assert high == pytest.approx(values.mean() + spread, abs=0.1 * spread)


def test_interval_of_a_share_is_wilsons():
    right = np.array([1.0] * 45 + [0.0] * 5)
    z, n, p = 1.959964, 50, 0.9
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    spread = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = mean_interval(right, np.ones(50))
    assert found == pytest.approx((centre - spread, centre + spread), rel=1e-6)
    assert mean_interval(np.ones(50), np.ones(50))[0] < 1  # a bootstrap would say 1


def test_weights_are_those_of_tokens():
    """A text of many tokens counts for more: the interval is around the mean over tokens."""
    weights = np.linspace(1, 400, 200).round()
    totals = weights * (2 + drawn() * 0.1)
    low, high = mean_interval(totals, weights)
    assert low < totals.sum() / weights.sum() < high
    assert high - low < 0.1


def test_a_pair_sees_the_differences_only():
    """Texts differ far more than models do."""
    base, noise = 5 * drawn(1), 0.1 * drawn(2)
    low, high = difference_interval(base - 0.3 + noise, base, ONES)
    spread = 1.96 * noise.std(ddof=1) / 200**0.5
    centre = -0.3 + noise.mean()
    assert low == pytest.approx(centre - spread, abs=0.3 * spread)
    assert high == pytest.approx(centre + spread, abs=0.3 * spread)


def test_one_document_has_no_interval():
    assert all(map(math.isnan, mean_interval(np.array([2.0]), np.ones(1))))


def test_mcnemar_by_hand():
    right = np.array([1] * 8 + [0] * 2 + [1] * 30)
    baseline = np.array([0] * 8 + [1] * 2 + [1] * 30)
    # 2 or fewer of 10 fair coins, either way
    assert mcnemar(right, baseline) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert mcnemar(right, right) == 1


def measured(totals, weights=None, metric="acc", exponential=False, better=True, documents="d"):
    weights = [1.0] * len(totals) if weights is None else weights
    fields = {"task": "t", "metric": metric, "documents": documents}
    return Measurement.of_mean(totals, weights, exponential, higher_is_better=better, **fields)


def test_perplexities_compare_as_ratios():
    tokens = [10.0, 20.0, 30.0, 40.0]
    worse = measured([30.0, 61.0, 89.0, 121.0], tokens, "perplexity", True, False)
    better = measured([29.0, 58.0, 88.0, 117.0], tokens, "perplexity", True, False)
    found = compare(better, worse)
    assert found.ratio
    assert found.change == pytest.approx(math.exp((292 - 301) / 100))
    assert found.low < found.change < found.high < 1
    assert found.verdict == "better"
    assert compare(worse, better).verdict == "worse"
    assert compare(worse, worse).verdict == "within chance"


def test_shares_compare_as_differences():
    base = [1.0, 0.0] * 50
    found = compare(measured([1.0] * 100), measured(base))
    assert not found.ratio
    assert found.change == pytest.approx(0.5)
    assert found.p == pytest.approx(2 / 2**50)
    assert found.verdict == "better"
    lucky = [1.0, 1.0, *base[2:]]
    assert compare(measured(lucky), measured(base)).verdict == "within chance"
    assert compare(measured([0.5] * 100), measured(base)).p is None  # not right or wrong


@pytest.mark.parametrize("other", [{"documents": "e"}, {"weights": [2.0, 1.0]}])
def test_other_documents_are_refused(other):
    with pytest.raises(ValueError, match=r"t: acc was measured on other documents"):
        compare(measured([1.0, 0.5]), measured([1.0, 0.5], **other))


def test_without_documents_there_is_no_verdict():
    one = Measurement(task="t", metric="bleu", value=0.4, low=0.3, high=0.5)
    found = compare(one, one)
    assert (found.change, found.low, found.verdict) == (0, None, "")


def evaluation(model, *measurements):
    return Evaluation(model=model, settings={"seed": 0}, versions={}, measurements=measurements)


def test_files(tmp_path):
    path = tmp_path / "new" / "results.json"
    found = [evaluation("a", measured([1.0, 0.0])), evaluation("b", measured([2.0], metric="kl"))]
    save_records(found, path)
    assert load_records(Evaluation, path, "casp eval") == found
    assert [each.name for each in path.parent.iterdir()] == ["results.json"]
    for broken in ("{}", "[]", "[1]", "no JSON", json.dumps([{"model": "a"}])):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"was not written by casp eval|holds no results"):
            load_records(Evaluation, path, "casp eval")


def test_what_two_models_share():
    one = evaluation("a", measured([1.0, 0.0]), measured([1.0, 2.0], metric="kl"))
    other = evaluation("b", measured([1.0, 1.0]))
    (found,) = compare_all(one, other)
    assert (found.metric, found.change) == ("acc", -0.5)
    with pytest.raises(ValueError, match="a and b were measured by other tasks"):
        compare_all(evaluation("a", measured([1.0, 2.0], metric="kl")), other)


def test_tables():
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    one, other = evaluation("a", measured([1.0] * 30)), evaluation("b", measured([0.0] * 30))
    console.print(one.table())
    console.print(comparison_table("a against b", compare_all(one, other)))
    text = console.export_text()
    assert "[0.8865, 1]" in text
    assert "+1 [+1, +1]" in text
    assert "better (McNemar 1.9e-09)" in text

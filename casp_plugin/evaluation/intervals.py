"""The part of chance in a mean over documents: 95 % intervals, alone and paired with a baseline."""

import numpy as np
from scipy.stats import binomtest, bootstrap

__all__ = ["difference_interval", "mcnemar", "mean_interval"]

_RESAMPLES = 9999
#: numbers in memory in one step of a bootstrap
_BATCH = 10_000_000


def mean_interval(totals: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of ``totals.sum() / weights.sum()``.

    It is Wilson's (1927) for shares of right answers, else that of a bootstrap over documents
    (percentile, 9999 resamples, seed 0); NaN for a single document.

    :param totals: sums of the averaged values over each document, (documents,)
    :param weights: number of values in each total, such as tokens, (documents,)
    """
    if _binary(totals, weights):
        interval = binomtest(int(totals.sum()), len(totals)).proportion_ci(method="wilson")
        return float(interval.low), float(interval.high)
    return _bootstrap(totals, weights)


def difference_interval(
    totals: np.ndarray, baseline: np.ndarray, weights: np.ndarray
) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two means over the same documents.

    A paired bootstrap over documents (percentile, 9999 resamples, seed 0) sees the differences
    between the two models, not those between the documents.

    :param totals: totals of one model, (documents,)
    :param baseline: totals of the other model, (documents,)
    :param weights: as in ``mean_interval``, (documents,)
    """
    return _bootstrap(totals - baseline, weights)


def mcnemar(right: np.ndarray, baseline: np.ndarray) -> float:
    """Return the p value of McNemar's exact test (1947), two-sided: the probability, if two models
    were equally good, of answers that differ at least as unevenly as these.

    :param right: 1 where a model is right, else 0, (documents,)
    :param baseline: the same of the other model, (documents,)
    """
    gained = int(((right == 1) & (baseline == 0)).sum())
    lost = int(((right == 0) & (baseline == 1)).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _binary(totals: np.ndarray, weights: np.ndarray) -> bool:
    return bool(np.isin(totals, (0, 1)).all() and (weights == 1).all())


def _bootstrap(totals: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    if len(totals) < 2:  # nothing to draw from
        return float("nan"), float("nan")

    def mean(totals, weights, axis):
        return totals.sum(axis) / weights.sum(axis)

    interval = bootstrap(
        (totals, weights),
        mean,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=_RESAMPLES,
        batch=max(1, _BATCH // len(totals)),
        rng=0,
    ).confidence_interval
    return float(interval.low), float(interval.high)

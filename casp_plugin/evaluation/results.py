"""Measurements of one checkpoint, comparisons of two, and their tables."""

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict
from rich.markup import escape
from rich.table import Table

from casp_plugin.evaluation.intervals import difference_interval, mcnemar, mean_interval

__all__ = [
    "Comparison",
    "Evaluation",
    "Measurement",
    "bracketed",
    "compare",
    "compare_all",
    "comparison_table",
]


class Measurement(BaseModel):
    """One metric of one model on one task.

    :param task: name of the task, or of the file or dataset of texts
    :param metric: name, as the harness calls it
    :param value: the metric; in nats, or a share from 0 to 1, unless the harness says otherwise
    :param low: lower end of its 95 % interval; None where it is not known
    :param high: upper end of the interval
    :param higher_is_better: None where the harness does not say
    :param totals: sums of the averaged values over each document, (documents,); empty where the
        metric is no mean over documents
    :param weights: number of values in each total, (documents,)
    :param exponential: whether the value is exp of the mean
    :param documents: fingerprint of the documents; measurements with equal fingerprints can be
        compared in pairs
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    higher_is_better: bool | None = None
    totals: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    exponential: bool = False
    documents: str = ""

    @classmethod
    def of_mean(
        cls, totals: Sequence[float], weights: Sequence[float], exponential: bool = False, **fields
    ) -> "Measurement":
        """Return a measurement that is a mean over documents, with its 95 % interval.

        :param totals: as the field, (documents,)
        :param weights: as the field, (documents,)
        :param exponential: as the field
        :param fields: the other fields
        """
        low, high = mean_interval(np.array(totals, float), np.array(weights, float))
        value = math.fsum(totals) / math.fsum(weights)
        if exponential:
            value, low, high = map(_exp, (value, low, high))
        known = not math.isnan(low)
        return cls(
            value=value,
            low=low if known else None,
            high=high if known else None,
            totals=tuple(totals),
            weights=tuple(weights),
            exponential=exponential,
            **fields,
        )


def _exp(value: float) -> float:
    """Return exp of a value; infinity where a float cannot hold it."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


class Evaluation(BaseModel):
    """All measurements of one model in one run.

    :param model: folder or Hugging Face id
    :param settings: conditions of the run: backend, data, lengths, limits
    :param versions: versions of the packages that took part
    :param measurements: in the order of the tasks
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    settings: dict[str, str | int | float | bool | None]
    versions: dict[str, str]
    measurements: tuple[Measurement, ...]

    def table(self) -> Table:
        """Return a table with a row for each measurement and its 95 % interval."""
        table = Table("task", "metric", "value", "95 %", title=self.model, title_justify="left")
        for measured in self.measurements:
            interval = escape(bracketed(measured.low, measured.high, ".4g"))  # [inf, inf]
            table.add_row(measured.task, measured.metric, f"{measured.value:.4g}", interval)
        return table


class Comparison(BaseModel):
    """One metric of two models on the same documents.

    :param value: the metric of the model
    :param baseline: the metric of the baseline
    :param change: ratio of the values if they are exp of a mean, as perplexities are, else their
        difference
    :param ratio: whether the change is a ratio
    :param low: lower end of the 95 % interval of the change, from documents in pairs; None where
        there are no pairs
    :param high: upper end of the interval
    :param p: p value of McNemar's test, where answers are right or wrong
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    metric: str
    value: float
    baseline: float
    change: float
    ratio: bool
    low: float | None = None
    high: float | None = None
    p: float | None = None
    higher_is_better: bool | None = None

    @property
    def verdict(self) -> str:
        """Return ``better``, ``worse``, or ``within chance``; empty where it is not known."""
        if self.low is None or self.higher_is_better is None:
            return ""
        same = 1.0 if self.ratio else 0.0
        if self.low <= same <= self.high:
            return "within chance"
        return "better" if (self.low > same) == self.higher_is_better else "worse"

    @property
    def change_text(self) -> str:
        """Return the change for tables: ratios begin with x, differences with a sign."""
        return f"x{self.change:.3f}" if self.ratio else f"{self.change:+.3g}"

    @property
    def interval_text(self) -> str:
        """Return the interval of the change for tables; empty where it is not known."""
        return bracketed(self.low, self.high, ".3f" if self.ratio else "+.3g")


def bracketed(low: float | None, high: float | None, spec: str) -> str:
    """Return an interval as ``[low, high]``, its ends formatted by ``spec``; empty for None."""
    return "" if low is None else f"[{low:{spec}}, {high:{spec}}]"


def compare(measured: Measurement, baseline: Measurement) -> Comparison:
    """Compare one metric of two models, documents in pairs where the metric is a mean over them.

    :raises ValueError: if the two were measured on other documents, or other tokens of them
    """
    if (measured.documents, measured.weights) != (baseline.documents, baseline.weights):
        raise ValueError(
            f"{measured.task}: {measured.metric} was measured on other documents than the "
            "baseline's, or asked about them in other words: such values cannot be compared"
        )
    low = high = p = None
    if measured.totals and baseline.totals:
        totals, others = np.array(measured.totals), np.array(baseline.totals)  # (documents,)
        weights = np.array(measured.weights)  # (documents,)
        low, high = difference_interval(totals, others, weights)
        if set(measured.totals) | set(baseline.totals) <= {0.0, 1.0} and (weights == 1).all():
            p = mcnemar(totals, others)
        if measured.exponential:
            low, high = math.exp(low), math.exp(high)
        if math.isnan(low):
            low = high = None
    ratio = measured.exponential
    return Comparison(
        task=measured.task,
        metric=measured.metric,
        value=measured.value,
        baseline=baseline.value,
        change=measured.value / baseline.value if ratio else measured.value - baseline.value,
        ratio=ratio,
        low=low,
        high=high,
        p=p,
        higher_is_better=measured.higher_is_better,
    )


def compare_all(evaluation: Evaluation, baseline: Evaluation) -> list[Comparison]:
    """Compare two models by every metric that both were measured by.

    :raises ValueError: if they have no metric in common, or a task asked other documents
    """
    others = {(other.task, other.metric): other for other in baseline.measurements}
    comparisons = [
        compare(measured, others[measured.task, measured.metric])
        for measured in evaluation.measurements
        if (measured.task, measured.metric) in others
    ]
    if not comparisons:
        raise ValueError(f"{evaluation.model} and {baseline.model} were measured by other tasks")
    return comparisons


def comparison_table(title: str, comparisons: Sequence[Comparison]) -> Table:
    """Return a table with a row for each metric of two models: ratios begin with x, differences
    with a sign."""
    columns = ("task", "metric", "value", "baseline", "change [95 %]", "verdict")
    table = Table(*columns, title=title, title_justify="left")
    for comparison in comparisons:
        change = f"{comparison.change_text} {comparison.interval_text}".rstrip()
        p = "" if comparison.p is None else f" (McNemar {comparison.p:.2g})"
        table.add_row(
            comparison.task,
            comparison.metric,
            f"{comparison.value:.4g}",
            f"{comparison.baseline:.4g}",
            change,
            comparison.verdict + p,
        )
    return table

"""Measurements of checkpoints and comparisons of two, with tables."""

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict
from rich.table import Table

from casp_plugin.evaluation.intervals import difference_interval, mcnemar, mean_interval

__all__ = [
    "Comparison",
    "Evaluation",
    "Measurement",
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
    :param high: upper end
    :param higher_is_better: None where the harness does not say
    :param totals: what is averaged, summed inside each document; empty where a metric is no mean
        over documents
    :param weights: how many values each total sums
    :param exponential: whether the value is exp of the mean
    :param documents: fingerprint of what was asked; equal ones can be compared in pairs
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
        """A mean over documents, with its interval.

        :param fields: the others
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
    """Infinite where a float cannot hold it."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


class Evaluation(BaseModel):
    """What was measured of one model.

    :param model: folder or Hugging Face id
    :param settings: what it was measured by: backend, data, lengths, limits
    :param versions: of the packages that took part
    :param measurements: in the order of the tasks
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    settings: dict[str, str | int | float | bool | None]
    versions: dict[str, str]
    measurements: tuple[Measurement, ...]

    def table(self) -> Table:
        """What was measured, with 95 % intervals."""
        table = Table("task", "metric", "value", "95 %", title=self.model, title_justify="left")
        for one in self.measurements:
            interval = "" if one.low is None else f"{one.low:.4g} to {one.high:.4g}"
            table.add_row(one.task, one.metric, f"{one.value:.4g}", interval)
        return table


class Comparison(BaseModel):
    """One metric of two models on the same documents.

    :param change: ratio of the values if they are exp of a mean, as perplexities, else difference
    :param low: lower end of the 95 % interval of the change, documents taken in pairs; None where
        they cannot be
    :param high: upper end
    :param p: McNemar's, where answers are right or wrong
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
        """Better, worse, or no difference that chance would not explain."""
        if self.low is None or self.higher_is_better is None:
            return ""
        same = 1.0 if self.ratio else 0.0
        if self.low <= same <= self.high:
            return "within chance"
        return "better" if (self.low > same) == self.higher_is_better else "worse"


def compare(one: Measurement, baseline: Measurement) -> Comparison:
    """One metric of two models, documents taken in pairs where they can be.

    :raises ValueError: if they were measured on other documents, or other tokens of them
    """
    if (one.documents, one.weights) != (baseline.documents, baseline.weights):
        raise ValueError(
            f"{one.task}: {one.metric} was measured on other documents than the baseline's, or "
            "asked about them in other words: such values cannot be compared"
        )
    low = high = p = None
    if one.totals and baseline.totals:
        totals, others = np.array(one.totals), np.array(baseline.totals)
        low, high = difference_interval(totals, others, np.array(one.weights))
        if set(one.totals) | set(baseline.totals) <= {0.0, 1.0} and set(one.weights) == {1.0}:
            p = mcnemar(totals, others)
        if one.exponential:
            low, high = math.exp(low), math.exp(high)
        if math.isnan(low):
            low = high = None
    ratio = one.exponential
    return Comparison(
        task=one.task,
        metric=one.metric,
        value=one.value,
        baseline=baseline.value,
        change=one.value / baseline.value if ratio else one.value - baseline.value,
        ratio=ratio,
        low=low,
        high=high,
        p=p,
        higher_is_better=one.higher_is_better,
    )


def compare_all(evaluation: Evaluation, baseline: Evaluation) -> list[Comparison]:
    """What both models were measured by.

    :raises ValueError: if that is nothing, or the same task asked other documents
    """
    others = {(one.task, one.metric): one for one in baseline.measurements}
    found = [
        compare(one, others[one.task, one.metric])
        for one in evaluation.measurements
        if (one.task, one.metric) in others
    ]
    if not found:
        raise ValueError(f"{evaluation.model} and {baseline.model} were measured by other tasks")
    return found


def comparison_table(title: str, comparisons: Sequence[Comparison]) -> Table:
    """Two models side by side: ratios begin with x, differences with a sign."""
    columns = ("task", "metric", "value", "baseline", "change [95 %]", "verdict")
    table = Table(*columns, title=title, title_justify="left")
    for one in comparisons:
        spec = ".3f" if one.ratio else "+.3g"
        change = f"{'x' if one.ratio else ''}{one.change:{spec}}"
        if one.low is not None:
            change += f" [{one.low:{spec}}, {one.high:{spec}}]"
        verdict = one.verdict + ("" if one.p is None else f" (McNemar {one.p:.2g})")
        values = f"{one.value:.4g}", f"{one.baseline:.4g}"
        table.add_row(one.task, one.metric, *values, change, verdict)
    return table

"""Importance of the parts of a model, and losses that do not add up, from the scores of a study."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import shap
from loguru import logger
from pydantic import BaseModel, ConfigDict
from sklearn.ensemble import RandomForestRegressor
from sklearn.inspection import permutation_importance
from sklearn.utils import resample

__all__ = [
    "LEAST_POINTS",
    "Analysis",
    "Importance",
    "analyse",
    "best_models",
    "losses_together",
    "pareto_front",
]

#: trees of a forest
TREES = 100
#: forests on resampled points, for intervals (arXiv 2601.15287, section 4)
RESAMPLES = 100
#: shuffles of a part's bits for its permutation importance
REPEATS = 50
#: models that an analysis needs at least
LEAST_POINTS = 12
#: loss below which a ratio of losses is noise
LEAST_LOSS = 0.05


class Importance(BaseModel):
    """Importance of one part's bits for the quality of a model; shares that sum to 1 over parts.

    :param weights: share of all weights in the part
    :param forest: decrease of variance in the trees of a random forest
    :param low: lower end of the 95 % interval of ``forest`` over resampled models
    :param high: upper end of the interval
    :param permutation: loss of fit when the part's bits are shuffled among the models
    :param shap: mean absolute Shapley value
    :param consensus: mean of ``forest``, ``permutation`` and ``shap``
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: float
    forest: float
    low: float
    high: float
    permutation: float
    shap: float
    consensus: float


class Analysis(BaseModel):
    """Importance of the parts of a model for one task, from the models of one method.

    :param method: one of ``METHODS``
    :param task: name of the task
    :param axis: the axis that parts are levels of, one of ``AXES``
    :param metric: metric of the quality; perplexities are analysed as logarithms
    :param points: number of models in the analysis
    :param fit: R2 of the forest on models that a tree has not seen (out of bag)
    :param parts: importances, by part
    :param pairs: share of all Shapley values that two parts have only together, by ``a x b``
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    task: str
    axis: str
    metric: str
    points: int
    fit: float
    parts: dict[str, Importance]
    pairs: dict[str, float]


def analyse(
    points: pd.DataFrame,
    method: str,
    task: str,
    metric: str,
    axis: str,
    weights: Mapping[str, float],
) -> Analysis:
    """Return the importance of parts from the models of one method: three estimates and their mean
    (arXiv 2601.15287, section 4).

    For components, only models count in which every component is quantized as a whole or not at
    all. If some layers of components were quantized, a component without blocks (the connector)
    would still be whole: its bits would reveal the width of the other components' layers, which
    their average bits hide, and the forest would take that for the connector's importance.

    :param points: rows of a study with columns ``bits_{part}`` and ``{task}/{metric}``, and
        ``block`` and ``kind`` for components
    :param method: one of ``METHODS``
    :param task: name of the task
    :param metric: metric of the quality
    :param axis: one of ``AXES``
    :param weights: share of all weights in every part; at least two parts
    :raises ValueError: if there are too few models, or all have the same quality
    """
    rows = points[points.method == method]
    if axis == "component":
        rows = _wholly_quantized(rows)
    finite = np.isfinite(rows[f"{task}/{metric}"])
    if not finite.all():
        logger.warning(f"{method}: {(~finite).sum()} models without a finite {task}/{metric}")
    rows = rows[finite]
    if len(rows) < LEAST_POINTS:
        raise ValueError(
            f"{method}, {task}: {len(rows)} models are too few to tell parts apart; at least "
            f"{LEAST_POINTS} are needed"
        )
    bits = rows[[f"bits_{part}" for part in weights]].to_numpy(float)  # (models, parts)
    quality = rows[f"{task}/{metric}"].to_numpy(float)  # (models,)
    if metric == "perplexity":
        quality = np.log(quality)
    if np.ptp(quality) == 0:
        raise ValueError(f"{method}, {task}: {metric} is the same for all models")
    forest = _forest(bits, quality, oob_score=True)
    spread = np.array(
        [
            _forest(*resample(bits, quality, random_state=seed), seed).feature_importances_
            for seed in range(RESAMPLES)
        ]
    )  # (RESAMPLES, parts)
    shuffled = permutation_importance(
        forest, bits, quality, n_repeats=REPEATS, random_state=0
    ).importances_mean
    explainer = shap.TreeExplainer(forest)
    together = np.abs(explainer.shap_interaction_values(bits)).mean(axis=0)  # (parts, parts)
    estimates = np.array(
        [
            _normalised(forest.feature_importances_),
            _normalised(shuffled.clip(min=0)),
            _normalised(np.abs(explainer.shap_values(bits)).mean(axis=0)),
        ]
    )  # (3, parts)
    low, high = np.percentile(spread, [2.5, 97.5], axis=0)
    return Analysis(
        method=method,
        task=task,
        axis=axis,
        metric=metric,
        points=len(rows),
        fit=float(forest.oob_score_),
        parts={
            part: Importance(
                weights=share,
                forest=estimates[0, i],
                low=low[i],
                high=high[i],
                permutation=estimates[1, i],
                shap=estimates[2, i],
                consensus=estimates[:, i].mean(),
            )
            for i, (part, share) in enumerate(weights.items())
        },
        pairs={
            f"{first} x {second}": float((together[i, j] + together[j, i]) / together.sum())
            for i, first in enumerate(weights)
            for j, second in enumerate(weights)
            if i < j
        },
    )


def losses_together(points: pd.DataFrame, method: str, task: str, metric: str) -> pd.DataFrame:
    """Return the losses of pairs of components, quantized alone and together, at every bit width:
    they show whether losses add up.

    :param points: rows of a study with columns ``component``, ``block``, ``kind``, ``bits`` and
        ``{task}/{metric}``
    :param method: one of ``METHODS``
    :param task: name of the task
    :param metric: metric of the quality
    :return: columns ``bits``, ``pair``, ``alone`` (sum of the losses of both alone), ``together``
        (both quantized, a third component not) and ``ratio`` (NaN where the sum is below
        ``LEAST_LOSS``); losses are differences from the original, of logarithms for perplexities
    """
    column = f"{task}/{metric}"
    values = np.log(points[column]) if metric == "perplexity" else points[column]
    values = values if _lower_is_better(metric) else -values
    rows = points.assign(loss=values - values[points.method == "original"].iloc[0])
    whole = _wholly_quantized(rows[rows.method == method]).set_index(["bits", "component"]).loss
    losses = []
    for (bits, pair), together in whole.items():
        members = pair.split("+")
        if len(members) == 2 and all((bits, member) in whole for member in members):
            alone = sum(whole[bits, member] for member in members)
            ratio = together / alone if alone >= LEAST_LOSS else np.nan
            losses.append((bits, pair, alone, together, ratio))
    return pd.DataFrame(losses, columns=["bits", "pair", "alone", "together", "ratio"])


def best_models(points: pd.DataFrame, method: str, task: str, metric: str) -> pd.DataFrame:
    """Return the rows of a method and of the original on the Pareto front of average bits and
    quality, by rising bits."""
    rows = points[points.method.isin(("original", method))]
    quality = rows[f"{task}/{metric}"].to_numpy()
    return rows.iloc[
        pareto_front(rows.bits_per_weight.to_numpy(), quality, _lower_is_better(metric))
    ]


def pareto_front(bits: np.ndarray, quality: np.ndarray, lower: bool) -> np.ndarray:
    """Return the indices of the models that no other model beats in both, by rising bits.

    :param bits: average bits, (models,)
    :param quality: values of the metric, (models,)
    :param lower: whether lower values are better
    """
    errors = quality if lower else -quality
    order = np.lexsort((errors, bits))
    best = np.minimum.accumulate(errors[order])
    first = np.r_[True, best[1:] < best[:-1]]
    return order[first]


def _lower_is_better(metric: str) -> bool:
    return metric == "perplexity"


def _wholly_quantized(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the models in which all layers of a component are quantized, or none."""
    for column in ("block", "kind"):
        rows = rows[rows[column] == max(rows[column], key=len, default="")]
    return rows


def _forest(bits: np.ndarray, quality: np.ndarray, seed: int = 0, **more) -> RandomForestRegressor:
    return RandomForestRegressor(TREES, random_state=seed, **more).fit(bits, quality)


def _normalised(values: np.ndarray) -> np.ndarray:
    return values / values.sum()

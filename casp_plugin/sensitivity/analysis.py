"""What the scores of a study tell about the parts of the model."""

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

TREES = 100
#: forests on resampled points, for intervals (arXiv 2601.15287, section 4)
RESAMPLES = 100
REPEATS = 50
#: below this many models nothing is told
LEAST_POINTS = 12
#: below this loss a ratio of losses is noise
LEAST_LOSS = 0.05


class Importance(BaseModel):
    """How much the bits of one part tell about the quality; shares of 1 among the parts.

    :param weights: share of all weights that it holds
    :param forest: decrease of variance in the trees of a random forest
    :param low: lower end of its 95 % interval over resampled models
    :param high: upper end
    :param permutation: loss of fit when the part's bits are shuffled among the models
    :param shap: mean absolute Shapley value
    :param consensus: mean of the three
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
    """What one method's models tell about one task.

    :param axis: what tells the parts apart, one of ``AXES``
    :param metric: perplexities by their logarithms
    :param points: models that it rests on
    :param fit: R2 of the forest on models that its trees were not shown
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
    """Importance of parts from the models of one method: three estimates and their mean
    (arXiv 2601.15287, section 4).

    Components are told by models in which they are quantized as a whole or not at all. Where only
    some of their layers are, a component without blocks (the connector) is still whole: its bits
    would tell the width of the other components' layers, which an average hides, and pass for its
    own importance.

    :param points: rows of a study with columns ``bits_{part}`` and ``{task}/{metric}``, and
        ``block`` and ``kind`` for components
    :param weights: share of all weights that each part holds; at least two parts
    :raises ValueError: if the models are too few, or all alike
    """
    rows = points[points.method == method]
    if axis == "component":
        rows = _whole(rows)
    finite = np.isfinite(rows[f"{task}/{metric}"])
    if not finite.all():
        logger.warning(f"{method}: {(~finite).sum()} models without a finite {task}/{metric}")
    rows = rows[finite]
    if len(rows) < LEAST_POINTS:
        raise ValueError(
            f"{method}, {task}: {len(rows)} models are too few to tell parts apart; at least "
            f"{LEAST_POINTS} are needed"
        )
    bits = rows[[f"bits_{part}" for part in weights]].to_numpy(float)
    quality = rows[f"{task}/{metric}"].to_numpy(float)
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
    )
    shuffled = permutation_importance(
        forest, bits, quality, n_repeats=REPEATS, random_state=0
    ).importances_mean
    explainer = shap.TreeExplainer(forest)
    together = np.abs(explainer.shap_interaction_values(bits)).mean(axis=0)
    three = np.array(
        [
            _shares(forest.feature_importances_),
            _shares(shuffled.clip(min=0)),
            _shares(np.abs(explainer.shap_values(bits)).mean(axis=0)),
        ]
    )
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
                forest=three[0, i],
                low=low[i],
                high=high[i],
                permutation=three[1, i],
                shap=three[2, i],
                consensus=three[:, i].mean(),
            )
            for i, (part, share) in enumerate(weights.items())
        },
        pairs={
            f"{one} x {other}": float((together[i, j] + together[j, i]) / together.sum())
            for i, one in enumerate(weights)
            for j, other in enumerate(weights)
            if i < j
        },
    )


def losses_together(points: pd.DataFrame, method: str, task: str, metric: str) -> pd.DataFrame:
    """What two components lose alone and together, at each bit width: whether losses add up.

    :param points: rows of a study with columns ``component``, ``block``, ``kind``, ``bits`` and
        ``{task}/{metric}``
    :return: columns ``bits``, ``pair``, ``alone`` (the sum of both alone), ``together`` (both
        quantized, a third component not) and ``ratio``, nan where the sum is below
        ``LEAST_LOSS``; losses are differences from the original, of perplexities in logarithms
    """
    column = f"{task}/{metric}"
    values = np.log(points[column]) if metric == "perplexity" else points[column]
    values = values if _lower_is_better(metric) else -values
    rows = points.assign(loss=values - values[points.method == "original"].iloc[0])
    whole = _whole(rows[rows.method == method]).set_index(["bits", "component"]).loss
    found = []
    for (bits, pair), together in whole.items():
        members = pair.split("+")
        if len(members) == 2 and all((bits, each) in whole for each in members):
            alone = sum(whole[bits, each] for each in members)
            ratio = together / alone if alone >= LEAST_LOSS else np.nan
            found.append((bits, pair, alone, together, ratio))
    return pd.DataFrame(found, columns=["bits", "pair", "alone", "together", "ratio"])


def best_models(points: pd.DataFrame, method: str, task: str, metric: str) -> pd.DataFrame:
    """Rows of one method, and the original, that no other beats in bits a weight and in quality;
    by rising bits."""
    rows = points[points.method.isin(("original", method))]
    quality = rows[f"{task}/{metric}"].to_numpy()
    return rows.iloc[
        pareto_front(rows.bits_per_weight.to_numpy(), quality, _lower_is_better(metric))
    ]


def pareto_front(bits: np.ndarray, quality: np.ndarray, lower: bool) -> np.ndarray:
    """Models that no other beats in both: indices by rising bits.

    :param bits: (models,)
    :param quality: (models,)
    :param lower: whether less is better
    """
    errors = quality if lower else -quality
    order = np.lexsort((errors, bits))
    best = np.minimum.accumulate(errors[order])
    first = np.r_[True, best[1:] < best[:-1]]
    return order[first]


def _lower_is_better(metric: str) -> bool:
    return metric == "perplexity"


def _whole(rows: pd.DataFrame) -> pd.DataFrame:
    """Models in which all layers of a component are quantized, or none."""
    for column in ("block", "kind"):
        rows = rows[rows[column] == max(rows[column], key=len, default="")]
    return rows


def _forest(bits: np.ndarray, quality: np.ndarray, seed: int = 0, **more) -> RandomForestRegressor:
    return RandomForestRegressor(TREES, random_state=seed, **more).fit(bits, quality)


def _shares(values: np.ndarray) -> np.ndarray:
    return values / values.sum()

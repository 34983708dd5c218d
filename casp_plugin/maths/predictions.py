"""Divergence from predictions of which only the likeliest entries are kept.

Shapes: N tokens, V entries of the vocabulary, k entries that are kept.
"""

from dataclasses import dataclass

import torch

__all__ = ["TopPredictions", "divergence", "top_predictions"]

#: log probability of all that is not kept, where it is nothing
_NOTHING = -30.0


@dataclass(frozen=True)
class TopPredictions:
    """The likeliest entries of predictions.

    :param entries: int32, shape (N, k)
    :param logs: their log probabilities, float32, shape (N, k)
    """

    entries: torch.Tensor
    logs: torch.Tensor


def top_predictions(logits: torch.Tensor, count: int) -> TopPredictions:
    """Return the likeliest entries of every token.

    :param logits: shape (N, V)
    :param count: k, at most
    """
    logs, entries = logits.float().log_softmax(-1).topk(min(count, logits.shape[-1]))
    return TopPredictions(entries.int(), logs)


def divergence(wanted: TopPredictions, logits: torch.Tensor) -> torch.Tensor:
    """Return the mean Kullback-Leibler divergence of predictions from kept ones, a scalar.

    All entries that are not kept count as one: the divergence is that of the distributions of k + 1
    events, no larger than that of the whole.

    :param logits: shape (N, V)
    """
    logs = logits.float().log_softmax(-1).gather(-1, wanted.entries.long())  # (N, k)
    kept = (wanted.logs.exp() * (wanted.logs - logs)).sum(-1)
    rest, own_rest = _rest(wanted.logs), _rest(logs)
    return (kept + rest.exp() * (rest - own_rest)).mean()


def _rest(logs: torch.Tensor) -> torch.Tensor:
    """Return the log probability of what is not kept, shape (N,)."""
    left = 1 - logs.exp().sum(-1)
    return left.clamp_min(torch.finfo(logs.dtype).eps).log().clamp_min(_NOTHING)

"""How well a model predicts held-out text, alone and against a reference model."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import bootstrap
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Scores", "TextScore", "evaluate", "loss_interval"]


@dataclass(frozen=True)
class TextScore:
    """Scores of one text, over every token but the first.

    :param tokens: tokens scored
    :param loss: summed negative log likelihood, nats
    :param divergence: summed KL(reference || model), nats; None without a reference
    """

    tokens: int
    loss: float
    divergence: float | None


@dataclass(frozen=True)
class Scores:
    """Scores on held-out texts."""

    texts: tuple[TextScore, ...]

    @property
    def tokens(self) -> int:
        """Tokens scored."""
        return sum(text.tokens for text in self.texts)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log likelihood of a token."""
        return math.exp(sum(text.loss for text in self.texts) / self.tokens)

    @property
    def kl(self) -> float | None:
        """Mean KL(reference || model) at a token in nats; None without a reference."""
        if any(text.divergence is None for text in self.texts):
            return None
        return sum(text.divergence for text in self.texts) / self.tokens


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    max_length: int,
    reference: PreTrainedModel | None = None,
) -> Scores:
    """Score a model on texts, each on its own, cut to ``max_length`` tokens.

    :raises ValueError: if no text has two tokens
    """
    found = []
    for text in tqdm(texts, desc="Evaluating"):
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=max_length).input_ids
        if ids.shape[1] < 2:
            continue
        scores = model(ids.to(model.device)).logits[0, :-1].float().log_softmax(-1).cpu()
        loss = -scores.gather(1, ids[0, 1:, None]).sum().item()
        divergence = None
        if reference is not None:
            logits = reference(ids.to(reference.device)).logits[0, :-1]
            expected = logits.float().log_softmax(-1).cpu()
            divergence = (expected.exp() * (expected - scores)).sum().item()
        found.append(TextScore(len(scores), loss, divergence))
    if not found:
        raise ValueError("no text of two tokens or more to evaluate on")
    return Scores(tuple(found))


def loss_interval(scores: Scores, baseline: Scores) -> tuple[float, float]:
    """95 % interval of the mean loss of a token less that of a baseline on the same texts, in
    nats: a paired bootstrap over texts (percentile, 9999 resamples, seed 0).

    exp of it is the interval of the ratio of the perplexities.

    :raises ValueError: if the texts are not the same
    """
    tokens = np.array([text.tokens for text in scores.texts])
    if tokens.tolist() != [text.tokens for text in baseline.texts]:
        raise ValueError("scores of different texts cannot be compared")
    pairs = zip(scores.texts, baseline.texts, strict=True)
    gains = np.array([one.loss - other.loss for one, other in pairs])

    def mean(gains, tokens, axis):
        return gains.sum(axis) / tokens.sum(axis)

    found = bootstrap(
        (gains, tokens), mean, paired=True, vectorized=True, method="percentile", rng=0
    ).confidence_interval
    return float(found.low), float(found.high)

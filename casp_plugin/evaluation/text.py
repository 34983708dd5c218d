"""Prediction of held-out text: perplexity, and KL divergence from a reference model."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from loguru import logger
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from casp_plugin.data.tokens import token_ids
from casp_plugin.evaluation.results import Measurement

__all__ = ["Scores", "TextScore", "evaluate", "token_scores", "windows"]

#: tokens whose log probabilities over the whole vocabulary are in memory at once
_CHUNK = 512


@dataclass(frozen=True)
class TextScore:
    """Scores of one text.

    :param tokens: number of tokens that are scored
    :param loss: summed negative log likelihood, nats
    :param divergence: summed KL(reference || model), nats; None without a reference
    :param agreed: number of tokens where model and reference hold the same token for the likeliest;
        None without a reference
    """

    tokens: int
    loss: float
    divergence: float | None = None
    agreed: int | None = None


@dataclass(frozen=True)
class Scores:
    """Scores of held-out texts.

    :param texts: scores of every text
    :param documents: fingerprint of the tokens
    """

    texts: tuple[TextScore, ...]
    documents: str = ""

    @property
    def tokens(self) -> int:
        """Return the number of tokens that are scored."""
        return sum(text.tokens for text in self.texts)

    @property
    def perplexity(self) -> float:
        """Return exp of the mean negative log likelihood of a token."""
        return math.exp(sum(text.loss for text in self.texts) / self.tokens)

    @property
    def kl(self) -> float | None:
        """Return the mean KL(reference || model) at a token in nats; None without a reference."""
        if any(text.divergence is None for text in self.texts):
            return None
        return sum(text.divergence for text in self.texts) / self.tokens

    def measurements(self, task: str) -> list[Measurement]:
        """Return perplexity, then KL divergence and top-1 agreement if there was a reference.

        :param task: name of the task that the measurements bear
        """
        shared = {"task": task, "documents": self.documents}
        weights = [text.tokens for text in self.texts]

        def over_tokens(metric: str, totals: list[float], better: bool, exponential: bool = False):
            fields = {"metric": metric, "higher_is_better": better, **shared}
            return Measurement.of_mean(totals, weights, exponential, **fields)

        measured = [over_tokens("perplexity", [text.loss for text in self.texts], False, True)]
        for metric, totals, better in (
            ("kl", [text.divergence for text in self.texts], False),
            ("top1_agreement", [text.agreed for text in self.texts], True),
        ):
            if None not in totals:
                measured.append(over_tokens(metric, totals, better))
        return measured


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    max_length: int,
    reference: PreTrainedModel | None = None,
    stride: int | None = None,
    joined: bool = False,
    add_special_tokens: bool = True,
) -> Scores:
    """Score a model on texts, each on its own.

    A text of tokens x_1 ... x_n is read in windows of ``max_length`` tokens that begin ``stride``
    tokens apart. A window scores its tokens, without its first and without those that an earlier
    window has scored, given the tokens before them in the window. With S the set of all scored
    tokens of all texts::

        perplexity = exp(-1 / |S| * sum over S of log p(x_t | x_<t in its window))

    so a token counts the same in a short text and in a long one. With ``stride`` equal to the
    length of a window, windows lie side by side and their first tokens are not scored; a smaller
    stride gives tokens more context and takes longer.

    :param max_length: tokens of a window
    :param reference: model to measure KL(reference || model) and top-1 agreement against
    :param stride: tokens from one window to the next, at most ``max_length``; None scores only the
        first window of every text
    :param joined: whether to join the texts by empty lines into one, as published perplexities on
        WikiText-2 do; intervals are then over windows instead of texts
    :param add_special_tokens: False for chats, see ``token_ids``
    :raises ValueError: if no text has two tokens, or the stride is longer than a window
    """
    if stride is not None and not 0 < stride <= max_length:
        raise ValueError(f"stride {stride} must be from 1 to max_length {max_length}")
    if joined:
        texts, stride = ["\n\n".join(texts)], stride or max_length
    scores, digest, short = [], hashlib.sha256(), 0
    for text in texts if joined else tqdm(texts, desc="Evaluating"):
        limit = max_length if stride is None else None
        ids = torch.tensor([token_ids(text, tokenizer, limit, add_special_tokens)])  # (1, T)
        if ids.shape[1] < 2:
            short += 1
            continue
        digest.update(repr(ids.tolist()).encode())
        places = list(windows(ids.shape[1], max_length, stride or max_length))
        scored = [
            _score_window(model, ids[:, start:end], first - start, reference)
            for start, end, first in (tqdm(places, desc="Evaluating") if joined else places)
        ]
        scores += scored if joined else [_summed(scored)]
    if not scores:
        raise ValueError("no text of two tokens or more to evaluate on")
    if short:
        logger.warning(f"{short} texts left out: of fewer than two tokens none can be predicted")
    return Scores(tuple(scores), digest.hexdigest()[:16])


def windows(tokens: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield the windows of a text as (start, end, first scored token), all token positions.

    :param tokens: length of the text
    :param length: length of a window
    :param stride: tokens from the beginning of one window to that of the next
    """
    end = 0
    for start in range(0, tokens - 1, stride):
        first, end = max(end, start + 1), min(start + length, tokens)
        if first < end:
            yield start, end, first


def token_scores(
    logits: torch.Tensor, labels: torch.Tensor, expected: torch.Tensor | None = None
) -> tuple[float, float | None, int | None]:
    """Return sums over tokens: negative log likelihood and KL(expected || logits), both in nats,
    and the number of tokens where both hold the same token for the likeliest.

    :param logits: logits of the model, (tokens, vocabulary)
    :param labels: tokens that follow, (tokens,)
    :param expected: logits of the reference, (tokens, vocabulary); without it the last two are None
    :raises ValueError: if the vocabularies differ in size
    """
    if expected is not None and expected.shape != logits.shape:
        raise ValueError(
            f"the reference has {expected.shape[-1]} tokens in its vocabulary, the model "
            f"{logits.shape[-1]}: they cannot be compared"
        )
    loss, divergence, agreed = 0.0, 0.0, 0
    for start in range(0, len(labels), _CHUNK):
        rows = slice(start, start + _CHUNK)
        scores = logits[rows].float().log_softmax(-1)  # (chunk, V)
        chosen = labels[rows, None].to(scores.device)  # (chunk, 1)
        loss -= scores.gather(1, chosen).sum().item()
        if expected is not None:
            wanted = expected[rows].to(scores.device).float().log_softmax(-1)  # (chunk, V)
            divergence += (wanted.exp() * (wanted - scores)).sum().item()
            agreed += int((wanted.argmax(-1) == scores.argmax(-1)).sum())
    return (loss, None, None) if expected is None else (loss, divergence, agreed)


def _score_window(
    model: PreTrainedModel, ids: torch.Tensor, first: int, reference: PreTrainedModel | None
) -> TextScore:
    """Score the tokens of a window from ``first`` on.

    :param ids: (1, T)
    """
    rows = slice(first - 1, -1)  # logits at t predict token t + 1
    logits = model(ids.to(model.device)).logits[0, rows]  # (T - first, V)
    expected = None if reference is None else reference(ids.to(reference.device)).logits[0, rows]
    return TextScore(ids.shape[1] - first, *token_scores(logits, ids[0, first:], expected))


def _summed(scores: list[TextScore]) -> TextScore:
    tokens = sum(score.tokens for score in scores)
    loss = math.fsum(score.loss for score in scores)
    if scores[0].divergence is None:
        return TextScore(tokens, loss)
    divergence = math.fsum(score.divergence for score in scores)
    return TextScore(tokens, loss, divergence, sum(score.agreed for score in scores))

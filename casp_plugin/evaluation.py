"""How well a model predicts held-out text, alone and against a reference model."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Scores", "evaluate"]


@dataclass(frozen=True)
class Scores:
    """Scores on held-out text.

    :param perplexity: exp of the mean negative log likelihood of every token but the first of
        each text
    :param kl: mean over the same positions of KL(reference || model) in nats; None without a
        reference
    :param tokens: positions scored
    """

    perplexity: float
    kl: float | None
    tokens: int


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
    loss, divergence, tokens = 0.0, 0.0, 0
    for text in tqdm(texts, desc="Evaluating"):
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=max_length).input_ids
        if ids.shape[1] < 2:
            continue
        scores = model(ids.to(model.device)).logits[0, :-1].float().log_softmax(-1).cpu()
        loss -= scores.gather(1, ids[0, 1:, None]).sum().item()
        tokens += len(scores)
        if reference is not None:
            logits = reference(ids.to(reference.device)).logits[0, :-1]
            expected = logits.float().log_softmax(-1).cpu()
            divergence += (expected.exp() * (expected - scores)).sum().item()
    if not tokens:
        raise ValueError("no text of two tokens or more to evaluate on")
    kl = None if reference is None else divergence / tokens
    return Scores(math.exp(loss / tokens), kl, tokens)

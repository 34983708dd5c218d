"""Scores and their intervals against slow, obvious references."""

import math

import pytest
import torch
from transformers import AutoTokenizer

from casp_plugin.evaluation import Scores, TextScore, evaluate, loss_interval


def test_scores_against_a_loop(load_tiny, tiny_llama):
    model, reference = load_tiny(), load_tiny()
    for parameter in model.parameters():
        parameter.data *= 1.3
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    texts = ["w5 w6 w7 w8 w9 w10", "w11", "w12 w13 w14"]
    scores = evaluate(model, tokenizer, texts, 5, reference)
    losses, divergences = [], []
    for text in texts:
        ids = tokenizer(text).input_ids[:5]
        with torch.no_grad():
            p, q = (
                m(torch.tensor([ids])).logits[0].softmax(-1).double() for m in (reference, model)
            )
        for position, token in enumerate(ids[1:]):
            losses.append(-q[position, token].log().item())
            ratio = p[position].log() - q[position].log()
            divergences.append((p[position] * ratio).sum().item())
    assert scores.tokens == len(losses) == 6
    assert scores.perplexity == pytest.approx(math.exp(sum(losses) / 6), rel=1e-4)
    assert scores.kl == pytest.approx(sum(divergences) / 6, rel=1e-3)
    assert evaluate(model, tokenizer, texts, 5).kl is None


def test_no_text(load_tiny, tiny_llama):
    with pytest.raises(ValueError, match="no text of two tokens"):
        evaluate(load_tiny(), AutoTokenizer.from_pretrained(tiny_llama), ["w1"], 8)


def made(losses, tokens=100):
    return Scores(tuple(TextScore(tokens, loss * tokens, None) for loss in losses))


def test_interval_is_that_of_the_differences():
    """Texts differ far more than models do: the interval sees the differences only."""
    generator = torch.Generator().manual_seed(0)
    base = (torch.rand(200, generator=generator) * 5).tolist()
    noise = (torch.randn(200, generator=generator) * 0.1).tolist()
    scores = made([b - 0.3 + n for b, n in zip(base, noise, strict=True)])
    low, high = loss_interval(scores, made(base))
    spread = 1.96 * torch.tensor(noise).std().item() / 200**0.5
    centre = -0.3 + sum(noise) / 200
    assert low == pytest.approx(centre - spread, abs=0.3 * spread)
    assert high == pytest.approx(centre + spread, abs=0.3 * spread)


def test_different_texts_are_refused():
    with pytest.raises(ValueError, match="different texts"):
        loss_interval(made([1.0, 2.0]), made([1.0, 2.0], tokens=50))

"""Scores of texts against slow, obvious references."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from casp_plugin.evaluation.text import evaluate, token_scores, windows


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


def test_windows_by_hand():
    assert list(windows(11, 5, 5)) == [(0, 5, 1), (5, 10, 6)]  # the last token would be alone
    assert list(windows(9, 5, 3)) == [(0, 5, 1), (3, 8, 5), (6, 9, 8)]
    assert list(windows(4, 5, 5)) == [(0, 4, 1)]
    assert list(windows(1, 5, 5)) == []


@given(st.integers(1, 60), st.integers(2, 12), st.data())
def test_windows_score_each_token_once(tokens, length, data):
    stride = data.draw(st.integers(1, length))
    scored = [t for _, end, first in windows(tokens, length, stride) for t in range(first, end)]
    assert len(scored) == len(set(scored))
    alone = set(range(0, tokens, stride)) if stride == length else {0}
    assert set(scored) == set(range(tokens)) - alone
    assert all(
        first - start > 0 and end - start <= length
        for start, end, first in windows(tokens, length, stride)
    )


def test_strides_against_a_loop(load_tiny, tiny_llama):
    model = load_tiny()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    text = " ".join(f"w{i}" for i in range(5, 16))
    ids = tokenizer(text).input_ids
    loss, seen = 0.0, 0
    for start in range(0, len(ids), 3):
        window = ids[start : start + 5]
        with torch.no_grad():
            scores = model(torch.tensor([window])).logits[0].double().log_softmax(-1)
        for place in range(1, len(window)):
            if start + place > seen:
                loss -= scores[place - 1, window[place]].item()
                seen = start + place
    scores = evaluate(model, tokenizer, [text], 5, stride=3)
    assert scores.tokens == len(ids) - 1
    assert scores.perplexity == pytest.approx(math.exp(loss / (len(ids) - 1)), rel=1e-5)


def test_joined_texts_are_one(load_tiny, tiny_llama):
    model, tokenizer = load_tiny(), AutoTokenizer.from_pretrained(tiny_llama)
    texts = ["w5 w6 w7 w8", "w9 w10 w11"]
    joined = evaluate(model, tokenizer, texts, 4, joined=True)
    one = evaluate(model, tokenizer, ["\n\n".join(texts)], 4, stride=4)
    assert joined.perplexity == pytest.approx(one.perplexity)
    assert len(joined.texts) == 2
    assert len(one.texts) == 1


def test_stride_longer_than_a_window(load_tiny, tiny_llama):
    with pytest.raises(ValueError, match="stride 9 must be from 1 to max_length 8"):
        evaluate(load_tiny(), AutoTokenizer.from_pretrained(tiny_llama), ["w1 w2"], 8, stride=9)


@pytest.mark.parametrize("chunk", [3, 512])
def test_token_scores_in_chunks(monkeypatch, chunk):
    monkeypatch.setattr("casp_plugin.evaluation.text._CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    logits, expected = torch.randn(2, 7, 11, generator=generator, dtype=torch.float64)
    labels = torch.arange(7)
    p, q = expected.softmax(-1), logits.softmax(-1)
    loss, divergence, agreed = token_scores(logits, labels, expected)
    assert loss == pytest.approx(-q[range(7), labels].log().sum().item(), rel=1e-6)
    assert divergence == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)
    assert agreed == sum(int(p[t].argmax() == q[t].argmax()) for t in range(7))
    assert token_scores(logits, labels)[1:] == (None, None)
    with pytest.raises(ValueError, match="the reference has 10 tokens in its vocabulary"):
        token_scores(logits, labels, expected[:, :10])


def test_measurements(load_tiny, tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    texts = ["w5 w6 w7 w8 w9 w10", "w12 w13 w14"]
    scores = evaluate(load_tiny(), tokenizer, texts, 8, load_tiny())
    perplexity, kl, agreement = scores.measurements("some text")
    assert [one.metric for one in (perplexity, kl, agreement)] == [
        "perplexity",
        "kl",
        "top1_agreement",
    ]
    assert perplexity.value == pytest.approx(scores.perplexity)
    assert perplexity.low <= perplexity.value <= perplexity.high
    assert kl.value == pytest.approx(0, abs=1e-6)
    assert agreement.value == 1
    others = evaluate(load_tiny(), tokenizer, texts[::-1], 8).measurements("some text")
    assert others[0].documents != perplexity.documents

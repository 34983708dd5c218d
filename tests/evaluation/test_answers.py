"""Scores of answers against a slow reference: one question at a time, in float64."""

from math import exp

import pytest
import torch
from support import tiny_vlms
from support.samples import png
from transformers import AutoModelForImageTextToText, AutoProcessor

from casp_plugin.data.conversation_batches import processed
from casp_plugin.data.conversations import Conversation
from casp_plugin.evaluation.answers import AnswerScore, AnswerScores, evaluate_answers
from casp_plugin.kv_cache import CompressedCache

QUESTIONS = [
    Conversation((png(),), "w5 w6 w7 w8", "w9 w10", "long"),
    Conversation((png(seed=1),), "w5", "w11", "short"),
    Conversation((png(40, 36, seed=2),), "w12 w13", "w14 w15 w16", "long"),
]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    tiny_vlms.save_tiny_vlm(folder, "llava")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64)
    return model, AutoProcessor.from_pretrained(folder)


def alone(model, processor, one):
    """(loss, greedy continuation) of one question without any batch."""
    inputs = processor(
        text=f"<image>{one.question} {one.answer}", images=one.decoded(), return_tensors="pt"
    )
    tokens = len(one.answer.split())
    scores = model(**inputs).logits[0].log_softmax(-1)
    labels = inputs["input_ids"][0, -tokens:]
    loss = -sum(scores[-tokens - 1 + i, label] for i, label in enumerate(labels))
    prompt = processor(text=f"<image>{one.question} ", images=one.decoded(), return_tensors="pt")
    ids = prompt["input_ids"]
    for _ in range(4):
        logits = model(**{**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)})
        ids = torch.cat([ids, logits.logits[:, -1:].argmax(-1)], 1)
    said = processor.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return loss.item(), said.strip()


@torch.no_grad()
def test_against_one_at_a_time(llava):
    model, processor = llava
    found = evaluate_answers(model, processor, QUESTIONS, model, batch_size=3, max_new_tokens=4)
    for one, score in zip(QUESTIONS, found.texts, strict=True):
        loss, said = alone(model, processor, one)
        assert score.tokens == len(one.answer.split())
        assert score.loss == pytest.approx(loss, rel=1e-5)
        assert score.divergence == pytest.approx(0, abs=1e-6)
        assert score.answer == said
    assert list(found.by_task) == ["long", "short"]
    assert [len(scores.texts) for scores in found.by_task.values()] == [2, 1]


def test_right_answers(llava):
    """What greedy decoding says, asked for again."""
    model, processor = llava
    said = evaluate_answers(model, processor, QUESTIONS, max_new_tokens=2).texts
    again = [
        Conversation(one.images, one.question, score.answer)
        for one, score in zip(QUESTIONS, said, strict=True)
    ]
    found = evaluate_answers(model, processor, again, max_new_tokens=2)
    assert found.exact_match == found.f1 == 1


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "gemma3", "paligemma"])
def test_answers_are_not_seen_before_they_are_said(family, tmp_path):
    """PaliGemma's tokens see each other, but for those of an answer."""
    tiny_vlms.save_tiny_vlm(tmp_path, family)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float64)
    processor = AutoProcessor.from_pretrained(tmp_path)
    asked = [Conversation((png(),), "w5 w6", answer) for answer in ("w7 w8", "w7 w9")]
    one, other = (processed([conversation], processor) for conversation in asked)
    differs = int((one["input_ids"] != other["input_ids"]).nonzero()[0, 1])
    before, again = (model(**inputs).logits[:, :differs] for inputs in (one, other))
    torch.testing.assert_close(before, again)
    scores = evaluate_answers(model, processor, asked, max_new_tokens=2)
    assert [score.tokens for score in scores.texts] == [3 if family == "paligemma" else 2] * 2


def test_a_template_that_begins_answers_in_another_way(llava, monkeypatch):
    model, processor = llava
    template = "{% for m in messages %}{% for c in m.content %}"
    template += "{{ '<image>' if c.type == 'image' else c.text }} {% endfor %}{% endfor %}"
    template += "{% if add_generation_prompt %}w20{% endif %}"
    monkeypatch.setattr(processor, "chat_template", template)
    with pytest.raises(ValueError, match="begins the answer to 'w5 w6 w7 w8' with other tokens"):
        evaluate_answers(model, processor, QUESTIONS[:1])


def test_means():
    texts = (
        AnswerScore(2, 1.0, task="a", answer="x", exact=1.0, f1=1.0),
        AnswerScore(3, 2.0, task="b", answer="y z", exact=0.0, f1=0.5),
    )
    scores = AnswerScores(texts)
    assert (scores.exact_match, scores.f1) == (0.5, 0.75)
    assert scores.by_task["b"].exact_match == 0
    found = {one.metric: one.value for one in scores.measurements("questions")}
    assert found == {"perplexity": pytest.approx(exp(3 / 5)), "exact_match": 0.5, "f1": 0.75}


def test_no_questions(llava):
    with pytest.raises(ValueError, match="no questions"):
        evaluate_answers(*llava, [])


@torch.no_grad()
def test_answers_from_a_compressed_cache(llava):
    """Image and question at once, then token by token, for the loss and for what is said."""
    model, processor = llava
    plain = evaluate_answers(model, processor, QUESTIONS, max_new_tokens=4)
    same = evaluate_answers(model, processor, QUESTIONS, max_new_tokens=4, kv_cache="kcvt:bits=16")
    for one, other in zip(same.texts, plain.texts, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert (one.tokens, one.answer) == (other.tokens, other.answer)
    scheme = "kcvt:bits=2,g=4"
    found = evaluate_answers(model, processor, QUESTIONS, model, max_new_tokens=4, kv_cache=scheme)
    for one, score in zip(QUESTIONS, found.texts, strict=True):
        prompt = processed([one], processor, answered=False)
        labels = processed([one], processor)["input_ids"][0, prompt["input_ids"].shape[1] :]
        cache = CompressedCache(model.config, scheme)
        logits = [model(**prompt, past_key_values=cache).logits[0, -1]]
        for label in labels[:-1]:
            logits.append(model(input_ids=label.view(1, 1), past_key_values=cache).logits[0, -1])
        scores = torch.stack(logits).log_softmax(-1)
        loss = -sum(row[label] for row, label in zip(scores, labels, strict=True))
        assert score.loss == pytest.approx(loss.item(), rel=1e-4)
        assert (score.divergence > 1e-9) == (len(labels) > 1)  # the first is read with the prompt
    assert found.perplexity != pytest.approx(plain.perplexity, rel=1e-3)

"""Answers of a vision-language model to questions about images: loss, exact match, F1."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm
from transformers import LogitsProcessor, PreTrainedModel, ProcessorMixin
from transformers.data.metrics.squad_metrics import compute_exact, compute_f1

from casp_plugin.data.conversation_batches import processed
from casp_plugin.data.conversations import Conversation
from casp_plugin.evaluation.results import Measurement
from casp_plugin.evaluation.text import Scores, TextScore, token_scores
from casp_plugin.kv_cache import CompressedCache

__all__ = ["AnswerScore", "AnswerScores", "evaluate_answers"]


@dataclass(frozen=True, kw_only=True)
class AnswerScore(TextScore):
    """Scores of one answer. Its tokens are the reference answer's and those that end the turn.

    :param task: kind of the question
    :param answer: greedy answer of the model; None if it was not asked
    :param exact: 1 if the answer equals the reference answer, as SQuAD compares (without case,
        articles and punctuation), else 0
    :param f1: overlap of the words with the reference answer, 0 to 1, as SQuAD counts it
    """

    task: str
    answer: str | None
    exact: float | None
    f1: float | None


@dataclass(frozen=True)
class AnswerScores(Scores):
    """Scores of the answers to a set of questions."""

    texts: tuple[AnswerScore, ...]

    @property
    def exact_match(self) -> float:
        """Return the share of right answers, 0 to 1."""
        return sum(text.exact for text in self.texts) / len(self.texts)

    @property
    def f1(self) -> float:
        """Return the mean overlap of words, 0 to 1."""
        return math.fsum(text.f1 for text in self.texts) / len(self.texts)

    @property
    def by_task(self) -> dict[str, "AnswerScores"]:
        """Return the scores by task, sorted by name."""
        tasks = sorted({text.task for text in self.texts})
        return {
            task: AnswerScores(
                tuple(text for text in self.texts if text.task == task), self.documents
            )
            for task in tasks
        }

    def measurements(self, task: str) -> list[Measurement]:
        """Return the measurements of texts, then exact match and F1 if there are answers.

        :param task: name of the task that the measurements bear
        """
        measured = super().measurements(task)
        if any(text.answer is None for text in self.texts):
            return measured
        ones = [1.0] * len(self.texts)
        for metric, totals in (
            ("exact_match", [text.exact for text in self.texts]),
            ("f1", [text.f1 for text in self.texts]),
        ):
            fields = {"metric": metric, "task": task, "documents": self.documents}
            measured.append(Measurement.of_mean(totals, ones, higher_is_better=True, **fields))
        return measured


@torch.no_grad()
def evaluate_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    conversations: Iterable[Conversation],
    reference: PreTrainedModel | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 32,
    kv_cache: str | None = None,
) -> AnswerScores:
    """Score a model on questions, each with one reference answer.

    The loss is that of the reference answer, given images and question. An answer is generated,
    unless greedy decoding would give the reference answer and then end the turn. With ``kv_cache``
    both come from ``generate`` with keys and values as the cache stores them: images and question
    at once, then token by token, one question at a time and without padding.

    :param reference: model to measure KL(reference || model) against, at the answers' tokens
    :param batch_size: questions at a time; 1 with ``kv_cache``
    :param max_new_tokens: tokens of a generated answer at most; 0 measures the loss alone
    :param kv_cache: scheme of the stored keys and values, as ``CompressedCache`` takes it
    :raises ValueError: if there are no questions, an answer has no tokens, or the chat template
        writes a question in other tokens once its answer follows
    """
    conversations = list(conversations)
    if not conversations:
        raise ValueError("no questions to evaluate on")
    # similar lengths side by side, for little padding
    order = sorted(range(len(conversations)), key=lambda i: len(conversations[i].question))
    scores: dict[int, AnswerScore] = {}
    batch_size = batch_size if kv_cache is None else 1
    for start in tqdm(range(0, len(order), batch_size), desc="Answering"):
        indices = order[start : start + batch_size]
        batch = [conversations[index] for index in indices]
        answered = _score_batch(model, processor, batch, reference, max_new_tokens, kv_cache)
        scores.update(zip(indices, answered, strict=True))
    questions = repr([(asked.task, asked.question, asked.answer) for asked in conversations])
    documents = hashlib.sha256(questions.encode()).hexdigest()[:16]
    return AnswerScores(tuple(scores[index] for index in range(len(conversations))), documents)


def _score_batch(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    batch: list[Conversation],
    reference: PreTrainedModel | None,
    max_new_tokens: int,
    kv_cache: str | None,
) -> Iterator[AnswerScore]:
    """Yield the scores of a batch of questions; see ``evaluate_answers``.

    Shapes: B questions, T tokens of a question with its answer, A tokens of an answer, V entries
    of the vocabulary.
    """
    whole = processed(batch, processor, padding=True, padding_side="right").to(model.device)
    prompts = processed(batch, processor, answered=False, padding=True, padding_side="left")
    prompts = prompts.to(model.device)
    lengths = prompts["attention_mask"].sum(1).tolist()
    logits = None if kv_cache else model(**whole).logits  # (B, T, V)
    expected = None if reference is None else reference(**whole.to(reference.device)).logits
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    rows = []
    for i, (asked, length) in enumerate(zip(batch, lengths, strict=True)):
        end = int(whole["attention_mask"][i].sum())
        ids = whole["input_ids"][i, :end]
        if not ids[:length].equal(prompts["input_ids"][i, -length:]):
            raise ValueError(
                f"the processor's chat template begins the answer to {asked.question[:80]!r} with "
                "other tokens than those it asks for one with: such answers cannot be scored"
            )
        labels = ids[length:]  # (A,)
        if not len(labels):
            raise ValueError(
                f"the answer {asked.answer!r} to {asked.question[:80]!r} has no tokens"
            )
        predicting = slice(length - 1, end - 1)  # logits at t predict token t + 1
        wanted = None if expected is None else expected[i, predicting]  # (A, V)
        given = _dictated(model, prompts, labels, kv_cache) if kv_cache else logits[i, predicting]
        ended = labels[-1].item() in ends  # else greedy decoding would go on
        right = ended and bool(given.argmax(-1).cpu().equal(labels.cpu()))
        score = TextScore(len(labels), *token_scores(given, labels, wanted))
        rows.append((score, asked.answer if right else None))
    if max_new_tokens and any(answer is None for _, answer in rows):
        cache = {"past_key_values": CompressedCache(model.config, kv_cache)} if kv_cache else {}
        tokens = model.generate(**prompts, max_new_tokens=max_new_tokens, do_sample=False, **cache)
        tokens = tokens[:, prompts["input_ids"].shape[1] :]  # (B, new tokens)
        answers = processor.batch_decode(tokens, skip_special_tokens=True)
    for i, (asked, (score, answer)) in enumerate(zip(batch, rows, strict=True)):
        fields = {"task": asked.task, "answer": None, "exact": None, "f1": None}
        if max_new_tokens:
            answer = answers[i].strip() if answer is None else answer
            fields["answer"] = answer
            fields["exact"] = float(compute_exact(asked.answer, answer))
            fields["f1"] = float(compute_f1(asked.answer, answer))
        yield AnswerScore(**asdict(score), **fields)


class _Dictation(LogitsProcessor):
    """Forces ``generate`` to give the tokens of a known answer, one after the other.

    :param labels: tokens of the answer, (tokens,)
    """

    def __init__(self, labels: torch.Tensor):
        self.remaining = iter(labels.tolist())

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)  # (1, V)
        forced[:, next(self.remaining)] = 0
        return forced


def _dictated(
    model: PreTrainedModel, prompt: dict[str, torch.Tensor], labels: torch.Tensor, kv_cache: str
) -> torch.Tensor:
    """Return the logits of an answer as decoding with a compressed cache gives them, (A, V)."""
    generated = model.generate(
        **prompt,
        past_key_values=CompressedCache(model.config, kv_cache),
        logits_processor=[_Dictation(labels)],
        max_new_tokens=len(labels),
        eos_token_id=None,  # tokens after it are scored too
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.cat(generated.logits)

"""How well a vision-language model answers questions about images."""

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
    """Scores of one answer. Tokens are those of the reference answer and of what ends a turn.

    :param task: kind of the question
    :param answer: what the model says, greedily; None if it was not asked
    :param exact: 1 if that is the reference answer, as SQuAD compares (case, articles and
        punctuation left out), else 0
    :param f1: overlap of the words, as SQuAD counts it
    """

    task: str
    answer: str | None
    exact: float | None
    f1: float | None


@dataclass(frozen=True)
class AnswerScores(Scores):
    """Scores on a set of questions."""

    texts: tuple[AnswerScore, ...]

    @property
    def exact_match(self) -> float:
        """Share of answers that are right, 0 to 1."""
        return sum(text.exact for text in self.texts) / len(self.texts)

    @property
    def f1(self) -> float:
        """Mean overlap of words, 0 to 1."""
        return math.fsum(text.f1 for text in self.texts) / len(self.texts)

    @property
    def by_task(self) -> dict[str, "AnswerScores"]:
        """The scores of each task, sorted by name."""
        tasks = sorted({text.task for text in self.texts})
        return {
            task: AnswerScores(
                tuple(text for text in self.texts if text.task == task), self.documents
            )
            for task in tasks
        }

    def measurements(self, task: str) -> list[Measurement]:
        """As those of texts, then exact match and F1 if there are answers."""
        found = super().measurements(task)
        if any(text.answer is None for text in self.texts):
            return found
        ones = [1.0] * len(self.texts)
        for metric, totals in (
            ("exact_match", [text.exact for text in self.texts]),
            ("f1", [text.f1 for text in self.texts]),
        ):
            fields = {"metric": metric, "task": task, "documents": self.documents}
            found.append(Measurement.of_mean(totals, ones, higher_is_better=True, **fields))
        return found


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
    """Score a model on questions with one known answer each.

    The loss is that of the reference answer, given images and question. An answer is generated
    unless the reference, with the end of the turn, is what greedy decoding would give. With
    ``kv_cache`` both are read by ``generate`` from what the cache stores: images and question at
    once, then token by token, one question at a time and without padding.

    :param reference: model to measure KL(reference || model) against, at the answers' tokens
    :param max_new_tokens: of a generated answer; 0 to measure the loss alone
    :param kv_cache: how keys and values are stored, as ``CompressedCache`` takes it
    :raises ValueError: if there are no questions, an answer has no tokens, or a question with its
        answer does not begin as without
    """
    conversations = list(conversations)
    if not conversations:
        raise ValueError("no questions to evaluate on")
    # alike lengths side by side, so that little is padded
    order = sorted(range(len(conversations)), key=lambda i: len(conversations[i].question))
    found: dict[int, AnswerScore] = {}
    batch_size = batch_size if kv_cache is None else 1
    for start in tqdm(range(0, len(order), batch_size), desc="Answering"):
        indices = order[start : start + batch_size]
        batch = [conversations[index] for index in indices]
        scores = _score(model, processor, batch, reference, max_new_tokens, kv_cache)
        found.update(zip(indices, scores, strict=True))
    asked = repr([(one.task, one.question, one.answer) for one in conversations])
    documents = hashlib.sha256(asked.encode()).hexdigest()[:16]
    return AnswerScores(tuple(found[index] for index in range(len(conversations))), documents)


def _score(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    batch: list[Conversation],
    reference: PreTrainedModel | None,
    max_new_tokens: int,
    kv_cache: str | None,
) -> Iterator[AnswerScore]:
    whole = processed(batch, processor, padding=True, padding_side="right").to(model.device)
    prompts = processed(batch, processor, answered=False, padding=True, padding_side="left")
    prompts = prompts.to(model.device)
    lengths = prompts["attention_mask"].sum(1).tolist()
    logits = None if kv_cache else model(**whole).logits
    expected = None if reference is None else reference(**whole.to(reference.device)).logits
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    rows = []
    for i, (one, length) in enumerate(zip(batch, lengths, strict=True)):
        end = int(whole["attention_mask"][i].sum())
        ids = whole["input_ids"][i, :end]
        if not ids[:length].equal(prompts["input_ids"][i, -length:]):
            raise ValueError(
                f"the processor's chat template begins the answer to {one.question[:80]!r} with "
                "other tokens than those it asks for one with: such answers cannot be scored"
            )
        labels = ids[length:]
        if not len(labels):
            raise ValueError(f"the answer {one.answer!r} to {one.question[:80]!r} has no tokens")
        asked = slice(length - 1, end - 1)
        wanted = None if expected is None else expected[i, asked]
        found = _dictated(model, prompts, labels, kv_cache) if kv_cache else logits[i, asked]
        ended = labels[-1].item() in ends  # else greedy decoding would go on
        right = ended and bool(found.argmax(-1).cpu().equal(labels.cpu()))
        score = TextScore(len(labels), *token_scores(found, labels, wanted))
        rows.append((score, one.answer if right else None))
    if max_new_tokens and any(answer is None for _, answer in rows):
        cache = {"past_key_values": CompressedCache(model.config, kv_cache)} if kv_cache else {}
        made = model.generate(**prompts, max_new_tokens=max_new_tokens, do_sample=False, **cache)
        made = made[:, prompts["input_ids"].shape[1] :]
        said = processor.batch_decode(made, skip_special_tokens=True)
    for i, (one, (score, answer)) in enumerate(zip(batch, rows, strict=True)):
        found = {"task": one.task, "answer": None, "exact": None, "f1": None}
        if max_new_tokens:
            answer = said[i].strip() if answer is None else answer
            found["answer"] = answer
            found["exact"] = float(compute_exact(one.answer, answer))
            found["f1"] = float(compute_f1(one.answer, answer))
        yield AnswerScore(**asdict(score), **found)


class _Dictation(LogitsProcessor):
    """Lets a model say one token after the other of those that it is given.

    :param labels: shape (tokens,)
    """

    def __init__(self, labels: torch.Tensor):
        self.left = iter(labels.tolist())

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = torch.full_like(scores, -torch.inf)
        said[:, next(self.left)] = 0
        return said


def _dictated(
    model: PreTrainedModel, prompt: dict[str, torch.Tensor], labels: torch.Tensor, kv_cache: str
) -> torch.Tensor:
    """Logits of an answer as decoding reads it from a compressed cache; (tokens, vocabulary)."""
    made = model.generate(
        **prompt,
        past_key_values=CompressedCache(model.config, kv_cache),
        logits_processor=[_Dictation(labels)],
        max_new_tokens=len(labels),
        eos_token_id=None,  # what comes after it is scored too
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.cat(made.logits)

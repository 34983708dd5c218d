"""Score checkpoints, loaded from disk, on texts or on questions about images."""

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

from budgets import linear_weights
from safetensors import safe_open
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel, set_seed

from casp_plugin.data.conversations import load_conversations
from casp_plugin.data.sources import load_text
from casp_plugin.evaluation.answers import AnswerScore, AnswerScores, evaluate_answers
from casp_plugin.evaluation.text import Scores, TextScore, evaluate
from casp_plugin.maths.average_bits import average_bits
from casp_plugin.model.load import is_multimodal, load_model, read_model_config

PROMPT = "A compiler is a program that"


class Remembered:
    """A language model that computes the logits of a text once."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.device, self.logits = model, model.device, {}

    def __call__(self, ids: Tensor) -> SimpleNamespace:
        key = tuple(ids[0].tolist())
        if key not in self.logits:
            self.logits[key] = self.model(ids).logits
        return SimpleNamespace(logits=self.logits[key])


class Judge:
    """Scores checkpoints against the model that they were made from, which is loaded once.

    :param reference: folder or Hugging Face id
    :param heldout: texts, or questions about images
    :param samples: texts or questions to score on
    :param max_length: tokens of a text
    """

    def __init__(self, reference: str, heldout: str, samples: int, max_length: int):
        self.reference, self.heldout = reference, heldout
        self.samples, self.max_length = samples, max_length

    @cached_property
    def facts(self) -> list[str]:
        """All that scores depend on beside the checkpoint."""
        return [self.heldout, str(self.samples), str(self.max_length)]

    @cached_property
    def multimodal(self) -> bool:
        """Whether models take images."""
        return is_multimodal(read_model_config(self.reference))

    @cached_property
    def model(self) -> PreTrainedModel:
        return load_model(self.reference)

    @cached_property
    def remembered(self) -> Remembered:
        return Remembered(self.model)

    @cached_property
    def asked(self) -> list:
        """Texts or questions."""
        if self.multimodal:
            return load_conversations(self.heldout, self.samples, task_column="task")
        tokenizer = AutoTokenizer.from_pretrained(self.reference)
        return load_text(self.heldout, tokenizer, self.samples)["text"]

    def score(self, folder: str | Path) -> dict:
        """Return scores, sizes and a sample of text of a checkpoint, as JSON values."""
        folder = str(folder)
        original = folder == self.reference
        model = self.model if original else load_model(folder)
        if self.multimodal:
            processor = AutoProcessor.from_pretrained(folder)
            against = None if original else self.model
            scores = evaluate_answers(model, processor, self.asked, against)
            sample = scores.texts[0].answer
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            scored = self.remembered if original else model
            against = None if original else self.remembered
            scores = evaluate(scored, tokenizer, self.asked, self.max_length, against)
            set_seed(0)
            ids = tokenizer(PROMPT, return_tensors="pt")
            sample = tokenizer.decode(model.generate(**ids, max_new_tokens=40, do_sample=False)[0])
        texts = [asdict(text) for text in scores.texts]
        return {**self._sizes(folder), "texts": texts, "text": sample}

    def _sizes(self, folder: str) -> dict:
        """Return bits of a weight of the language model's linears, everything else counted as 16
        bits; bits of a parameter of the whole model; bytes of the tensors."""
        linears = [weight for _, weight in linear_weights(self.model)]
        parameters = list(self.model.parameters())
        other = sum(p.nbytes for p in parameters) - sum(w.nbytes for w in linears)
        total = 0
        for path in Path(folder).glob("*.safetensors"):
            with safe_open(path, framework="pt") as shard:
                total += sum(shard.get_tensor(name).nbytes for name in shard.keys())  # noqa: SIM118
        return {
            "bits": average_bits(total - other, sum(w.numel() for w in linears)),
            "whole": average_bits(total, sum(p.numel() for p in parameters)),
            "bytes": total,
        }


def scores_of(run: dict) -> Scores:
    """Return the scores of a run on texts, or of its answers to questions."""
    if "answer" in run["texts"][0]:
        return AnswerScores(tuple(AnswerScore(**row) for row in run["texts"]))
    return Scores(tuple(TextScore(**row) for row in run["texts"]))

"""Checkpoints scored on data, and by the tasks of a harness."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from casp_plugin.data.data_source import DataSource, load_processor
from casp_plugin.data.sources import adds_special_tokens
from casp_plugin.evaluation import text
from casp_plugin.evaluation.harness import run_tasks
from casp_plugin.evaluation.results import Evaluation, Measurement
from casp_plugin.kv_cache import with_kv_cache
from casp_plugin.model.load import load_model
from casp_plugin.system.machine import installed_versions

__all__ = ["HarnessTasks", "Scoring", "evaluate", "score"]


@dataclass(frozen=True)
class Scoring:
    """Data to score models on, and its windows.

    :param source: texts, or questions about images
    :param samples: texts or questions at most
    :param max_length: tokens of a window of text
    :param stride: tokens from the beginning of a window to that of the next
    :param join: whether all texts are one
    :param task_column: column that tells kinds of questions apart, which are then scored by
        themselves too
    """

    source: DataSource
    samples: int
    max_length: int
    stride: int
    join: bool = False
    task_column: str | None = None


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks of a harness, and its own settings; fields as ``run_tasks`` takes them.

    :param tasks: names
    """

    tasks: Sequence[str]
    harness: str = "lm-eval"
    backend: str = "hf"
    model_args: str = ""
    include_path: str | None = None
    use_cache: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 1
    apply_chat_template: bool = False


def evaluate(
    model: str,
    scoring: Scoring | None = None,
    harness: HarnessTasks | None = None,
    reference: PreTrainedModel | None = None,
    seed: int = 0,
    kv_cache: str | None = None,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Measure one checkpoint, and note the conditions.

    :param model: folder or Hugging Face id
    :param scoring: data to score it on
    :param harness: tasks to run on it
    :param reference: model to measure KL divergence and agreement against, on the data
    :param seed: seed of the choice of samples
    :param kv_cache: scheme in which transformers stores keys and values, see ``with_kv_cache``
    :param trust_remote_code: whether Python code that comes with the model may run
    """
    measured, settings = [], {"seed": seed, "kv_cache": kv_cache}
    if scoring is not None:
        measured += score(model, scoring, reference, seed, kv_cache, trust_remote_code)
        settings |= {
            "dataset": scoring.source.dataset,
            "reference": reference and reference.name_or_path,
            "join": scoring.join,
            "samples": scoring.samples,
            "max_length": scoring.max_length,
            "stride": scoring.stride,
        }
    if harness is not None:
        asking = {
            "num_fewshot": harness.num_fewshot,
            "limit": harness.limit,
            "batch_size": harness.batch_size,
            "apply_chat_template": harness.apply_chat_template,
        }
        running = {
            "harness": harness.harness,
            "backend": harness.backend,
            "model_args": _trusting(harness.model_args, trust_remote_code),
        }
        keeping = {"include_path": harness.include_path, "use_cache": harness.use_cache}
        measured += run_tasks(
            model, harness.tasks, kv_cache=kv_cache, **running, **keeping, **asking
        )
        settings |= {"tasks": ",".join(harness.tasks), **running, **asking}
    return Evaluation(
        model=model, settings=settings, versions=installed_versions(), measurements=measured
    )


def score(
    model: str,
    scoring: Scoring,
    reference: PreTrainedModel | None = None,
    seed: int = 0,
    kv_cache: str | None = None,
    trust_remote_code: bool = False,
) -> list[Measurement]:
    """Return measurements on texts, or on questions about images, of all and by task.

    :param model: folder or Hugging Face id
    :param scoring: data
    :param reference: as in ``evaluate``, and so are the others
    """
    processor = load_processor(model, trust_remote_code)
    loaded = load_model(model, trust_remote_code)
    source, name = scoring.source, Path(scoring.source.dataset).stem
    if not source.shows_images(loaded.config):
        tokenizer = getattr(processor, "tokenizer", processor)
        rows = source.texts(tokenizer, scoring.samples, seed)
        with with_kv_cache(loaded, kv_cache):
            scores = text.evaluate(
                loaded,
                tokenizer,
                rows["text"],
                scoring.max_length,
                reference,
                scoring.stride,
                scoring.join,
                adds_special_tokens(rows),
            )
        return scores.measurements(name)
    from casp_plugin.evaluation.answers import evaluate_answers  # needs Pillow

    questions = source.conversations(scoring.samples, seed, scoring.task_column)
    scores = evaluate_answers(loaded, processor, questions, reference, kv_cache=kv_cache)
    measured = scores.measurements(name)
    if scoring.task_column:
        for task, of_task in scores.by_task.items():
            measured += of_task.measurements(f"{name}: {task}")
    return measured


def _trusting(model_args: str, trust_remote_code: bool) -> str:
    """Return a harness's arguments of a model, which may run code of its own where told."""
    trusting = "trust_remote_code=True" if trust_remote_code else ""
    return ",".join(filter(None, [trusting, model_args]))

"""The run of a study: its settings, the data that its models are scored on, and its files."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from rich.table import Table
from transformers import PretrainedConfig

from casp_plugin.data.data_source import DataSource
from casp_plugin.data.sources import adds_special_tokens
from casp_plugin.evaluation import study_folder
from casp_plugin.sensitivity.grid import Configuration
from casp_plugin.sensitivity.scoring import ScoredData
from casp_plugin.sensitivity.study import Study
from casp_plugin.sensitivity.summary import analyse_all, summarise
from casp_plugin.system.machine import versions_text

__all__ = ["METRICS", "StudySettings", "run_study"]

#: metrics that need models to answer
ANSWER_METRICS = ("exact_match", "f1")
METRICS = ("perplexity", *ANSWER_METRICS)


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """All that the points of a study depend on.

    :param model: folder or Hugging Face id of the original model
    :param source: data that GPTQ and AWQ are calibrated on
    :param samples: calibration samples
    :param heldout: data that models are scored on
    :param heldout_samples: texts or questions at most
    :param task_column: column that tells kinds of questions apart
    :param metric: metric that importance is computed from, one of ``METRICS``
    :param group_size: columns that share a scale; -1 for all columns of a row
    :param ignore: layers that stay as they are; None for the output head
    :param max_length: tokens of a sample and of a window of text at most
    :param seed: seed of all random numbers
    :raises ValueError: if the metric is not known
    """

    model: str
    source: DataSource
    samples: int
    heldout: DataSource
    heldout_samples: int
    task_column: str | None
    metric: str
    group_size: int
    ignore: Sequence[str] | None
    max_length: int
    seed: int

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"--metric {self.metric!r} must be one of {', '.join(METRICS)}")

    def scored_data(self, config: PretrainedConfig, processor) -> ScoredData:
        """Read the data that models are scored on.

        :param config: config of the model
        :param processor: its processor or tokenizer
        :raises ValueError: if the metric needs questions about images, and there are none
        """
        answers = self.metric in ANSWER_METRICS
        if self.heldout.shows_images(config):
            amount = (self.heldout_samples, self.seed, self.task_column)
            questions = tuple(self.heldout.conversations(*amount))
            data = {"questions": questions, "answers": answers}
        elif answers:
            raise ValueError(
                f"--metric {self.metric} needs questions about images; texts have perplexity"
            )
        else:
            tokenizer = getattr(processor, "tokenizer", processor)
            rows = self.heldout.texts(tokenizer, self.heldout_samples, self.seed)
            data = {"texts": tuple(rows["text"]), "add_special_tokens": adds_special_tokens(rows)}
        return ScoredData(processor, max_length=self.max_length, **data)

    def facts(self) -> dict:
        """Return the settings as the folder of a study notes them."""
        heldout = self.heldout
        return {
            "model": self.model,
            "dataset": [*astuple(self.source), self.samples],
            "heldout": [heldout.dataset, heldout.split, self.heldout_samples, self.task_column],
            "metric": self.metric,
            "group_size": self.group_size,
            "ignore": self.ignore,
            "max_length": self.max_length,
            "seed": self.seed,
        }

    def note(self, models: int) -> str:
        """Return model, data and versions in words.

        :param models: number of models that were scored
        """
        return (
            f"{self.model}, {models} models, calibrated on {self.source.dataset} ({self.samples} x "
            f"{self.max_length} tokens at most), scored on {self.heldout.dataset} "
            f"({self.heldout_samples}); group size {self.group_size}; seed {self.seed}; "
            f"{versions_text()}."
        )


def run_study(
    settings: StudySettings, study: Study, configurations: Sequence[Configuration]
) -> dict[str, Table]:
    """Score the models that the folder of a study lacks, analyse all, and write the files.

    :param settings: settings, which the folder notes
    :param study: the study
    :param configurations: models to score
    :return: tables by title
    :raises ValueError: if the folder holds something else, or points made in another way
    """
    study_folder.begin(study.folder, settings.facts(), kind="study")
    points = study.run(configurations)
    analyses = analyse_all(points, study.layers, settings.metric)
    note = settings.note(len(points))
    return summarise(study.folder, settings.model, points, analyses, settings.metric, note)

"""Groups of options that name data: what to calibrate on, what to score on."""

from dataclasses import dataclass, replace
from typing import Annotated

import typer

from casp_plugin.cli.options import Seed
from casp_plugin.cli.output import console

__all__ = [
    "DATASET",
    "CalibrationOptions",
    "DataOptions",
    "HeldoutOptions",
    "TaskColumn",
    "tell_text_alone",
    "within_positions",
]

DATASET = typer.Option(
    help="Calibration text: .jsonl, .parquet, .csv or .txt file, a datasets folder, a hub id, or "
    "'bundled' for the text that ships with casp-plugin.",
)
TaskColumn = Annotated[str | None, typer.Option(help="Column that tells kinds of questions apart.")]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """A dataset and its columns."""

    dataset: Annotated[str, DATASET]
    text_column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text"
    image_column: Annotated[
        str, typer.Option(help="Column that holds images, for vision-language models.")
    ] = "image"
    video_column: Annotated[
        str | None, typer.Option(help="Column that holds a video's frames, instead of images.")
    ] = None
    question_column: Annotated[
        str, typer.Option(help="Column that holds the questions about them.")
    ] = "question"
    answer_column: Annotated[str, typer.Option(help="Column that holds the answers.")] = "answer"
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "train"
    dataset_config: Annotated[str | None, typer.Option(help="Configuration of a hub dataset.")] = (
        None
    )

    def source(self):
        """Return the ``DataSource`` that they name."""
        from casp_plugin.data.data_source import DataSource

        return DataSource(
            self.dataset,
            self.split,
            self.dataset_config,
            text=self.text_column,
            image=self.image_column,
            video=self.video_column,
            question=self.question_column,
            answer=self.answer_column,
        )


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions(DataOptions):
    """Data that a model is calibrated on."""

    samples: Annotated[int, typer.Option(help="Calibration samples.", min=1)] = 512
    max_length: Annotated[int, typer.Option(help="Tokens a sample at most.", min=2)] = 2048
    seed: Seed = 0

    def batches(self, config, processor, batch_size: int = 1):
        """Return calibration batches; say so where a vision-language model gets text alone.

        :param config: of the model
        :param processor: its processor or tokenizer
        """
        from casp_plugin.data.data_source import calibration_batches

        source, max_length = self.source(), within_positions(config, self.max_length)
        tell_text_alone(source, config)
        amount = (self.samples, max_length, self.seed, batch_size)
        return calibration_batches(config, processor, source, *amount)


@dataclass(frozen=True, kw_only=True)
class HeldoutOptions:
    """Data that the models of a command are scored on, in the columns of the calibration data."""

    heldout: Annotated[str, typer.Option(help="What to score on, in the same columns.")] = (
        "bundled-heldout"
    )
    heldout_split: Annotated[str, typer.Option(help="Split of it.")] = "test"
    heldout_samples: Annotated[int, typer.Option(help="Texts or questions at most.", min=1)] = 512

    def source(self, calibration: DataOptions):
        """Return the ``DataSource`` that they name.

        :param calibration: whose columns it has
        """
        return replace(calibration.source(), dataset=self.heldout, split=self.heldout_split)


def tell_text_alone(source, config) -> None:
    """Say so where a model takes images but a dataset has none for it.

    :param source: a ``DataSource``
    :param config: of the model
    """
    from casp_plugin.model.load import is_multimodal

    if is_multimodal(config) and not source.shows_images(config):
        column = source.video or source.image
        console.print(f"{source.dataset} has no column {column!r}: text alone")


def within_positions(config, max_length: int) -> int:
    """Return a ``--max-length`` that the model has positions for; say so where it is another.

    :param config: of the model
    """
    from casp_plugin.data.tokens import most_tokens

    most = most_tokens(config)
    if most is None or max_length <= most:
        return max_length
    console.print(
        f"--max-length {max_length} is more than the {most} positions that the model "
        f"({config.model_type}) has: {most} it is",
        soft_wrap=True,
    )
    return most

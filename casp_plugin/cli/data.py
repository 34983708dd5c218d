"""Data that a command line names: what to calibrate on, what to score on."""

from dataclasses import dataclass

from casp_plugin.cli.options import console
from casp_plugin.system.messages import one_line

__all__ = ["DataSource", "calibration_batches", "load_processor", "within_positions"]


@dataclass(frozen=True)
class DataSource:
    """A dataset and the columns that hold text, or images, questions and answers."""

    dataset: str
    split: str
    config_name: str | None
    text: str
    image: str
    video: str | None
    question: str
    answer: str

    def shows_images(self, config) -> bool:
        """Whether the model sees and the dataset has questions about images for it.

        :param config: of the model
        """
        from casp_plugin.data.chats import CHAT_COLUMNS
        from casp_plugin.data.sources import read_source
        from casp_plugin.model.load import is_multimodal

        if not is_multimodal(config):
            return False
        found = read_source(self.dataset, self.split, self.config_name).column_names
        shown = self.video or self.image
        if shown in found or not {self.text, *CHAT_COLUMNS} & set(found):
            return True
        console.print(f"{self.dataset} has no column {shown!r}: text alone")
        return False

    def read(self, config, processor, samples: int, seed: int, **more):
        """Questions about images where the model sees and the dataset has any, else texts.

        :param more: of ``conversations``
        """
        if self.shows_images(config):
            return self.conversations(samples, seed, **more)
        return self.texts(getattr(processor, "tokenizer", processor), samples, seed)

    def conversations(self, samples: int, seed: int, **more):
        """Questions about images, shuffled."""
        from casp_plugin.data.conversations import load_conversations

        return load_conversations(
            self.dataset,
            samples,
            image_column=self.image,
            video_column=self.video,
            question_column=self.question,
            answer_column=self.answer,
            split=self.split,
            config_name=self.config_name,
            seed=seed,
            **more,
        )

    def texts(self, tokenizer, samples: int, seed: int):
        """Texts, shuffled."""
        from casp_plugin.data.sources import load_text

        return load_text(
            self.dataset, tokenizer, samples, self.text, self.split, self.config_name, seed
        )


def load_processor(model: str, trust_remote_code: bool = False):
    """Tokenizer of a language model, processor of one that takes images too."""
    from transformers import AutoProcessor, AutoTokenizer

    from casp_plugin.model.load import is_multimodal, read_model_config

    sees = is_multimodal(read_model_config(model, trust_remote_code))
    kind = AutoProcessor if sees else AutoTokenizer
    try:
        return kind.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ImportError):
        raise
    except Exception as error:  # whatever its files hold
        what = "processor" if sees else "tokenizer"
        raise ValueError(f"the {what} of {model} cannot be loaded: {one_line(error)}") from error


def within_positions(config, max_length: int) -> int:
    """A ``--max-length`` that the model has positions for; says so where it is another.

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


def calibration_batches(config, processor, source, samples, max_length, seed, batch_size=1):
    """Batches of questions about images where the model sees and the data has any, else of text.

    :param config: of the model
    :param source: a ``DataSource``
    :param max_length: tokens at most; no more than the model has positions for
    """
    from casp_plugin.data.conversation_batches import conversation_loader
    from casp_plugin.data.text_batches import calibration_loader

    max_length = within_positions(config, max_length)
    if source.shows_images(config):
        if batch_size > 1:
            raise ValueError("--batch-size is for text: questions about images run one by one")
        return conversation_loader(source.conversations(samples, seed), processor, max_length)
    tokenizer = getattr(processor, "tokenizer", processor)
    texts = source.texts(tokenizer, samples, seed)
    return calibration_loader(texts, tokenizer, max_length, batch_size)

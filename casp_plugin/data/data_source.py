"""Data named by a person: a dataset and its columns, read as texts or questions about images."""

from collections.abc import Iterable
from dataclasses import dataclass

from datasets import Dataset
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from casp_plugin.data.chats import CHAT_COLUMNS
from casp_plugin.data.sources import load_text, read_source
from casp_plugin.model.load import is_multimodal, read_model_config
from casp_plugin.system.messages import one_line

__all__ = ["DataSource", "calibration_batches", "load_processor"]


@dataclass(frozen=True)
class DataSource:
    """A dataset and the columns that hold text, or images, questions and answers.

    :param dataset: file, folder or hub id, as ``read_source`` takes it
    :param split: split of the dataset
    :param config_name: configuration of a hub dataset
    :param text: column of texts
    :param image: column of images
    :param video: column of videos' frames, instead of images
    :param question: column of questions
    :param answer: column of answers
    """

    dataset: str
    split: str
    config_name: str | None
    text: str
    image: str
    video: str | None
    question: str
    answer: str

    def shows_images(self, config: PreTrainedConfig) -> bool:
        """Tell whether the model takes images and the dataset has questions about images for it.

        :param config: config of the model
        """
        if not is_multimodal(config):
            return False
        columns = read_source(self.dataset, self.split, self.config_name).column_names
        return (self.video or self.image) in columns or not {self.text, *CHAT_COLUMNS} & {*columns}

    def read(
        self,
        config: PreTrainedConfig,
        processor: PreTrainedTokenizerBase | ProcessorMixin,
        samples: int,
        seed: int,
    ) -> list | Dataset:
        """Return ``conversations`` where the model takes images and the dataset has questions
        about images, else ``texts``.

        :param config: config of the model
        :param processor: tokenizer or processor of the model
        """
        if self.shows_images(config):
            return self.conversations(samples, seed)
        return self.texts(getattr(processor, "tokenizer", processor), samples, seed)

    def conversations(self, samples: int, seed: int, task_column: str | None = None) -> list:
        """Return questions about images, each a ``Conversation``, shuffled.

        :param task_column: column that tells kinds of questions apart
        """
        from casp_plugin.data.conversations import load_conversations  # needs Pillow

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
            task_column=task_column,
        )

    def texts(self, tokenizer: PreTrainedTokenizerBase, samples: int, seed: int) -> Dataset:
        """Return texts, shuffled."""
        return load_text(
            self.dataset, tokenizer, samples, self.text, self.split, self.config_name, seed
        )


def load_processor(
    model: str, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """Return the tokenizer of a language model, the processor of a model that takes images too.

    :param model: folder or Hugging Face id
    :param trust_remote_code: whether Python code that comes with the model may run
    :raises ValueError: if its files cannot be read
    :raises OSError: if there are none
    """
    takes_images = is_multimodal(read_model_config(model, trust_remote_code))
    auto = AutoProcessor if takes_images else AutoTokenizer
    try:
        return auto.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ImportError):
        raise
    except Exception as error:  # whatever its files hold
        what = "processor" if takes_images else "tokenizer"
        raise ValueError(f"the {what} of {model} cannot be loaded: {one_line(error)}") from error


def calibration_batches(
    config: PreTrainedConfig,
    processor: PreTrainedTokenizerBase | ProcessorMixin,
    source: DataSource,
    samples: int,
    max_length: int,
    seed: int,
    batch_size: int = 1,
) -> Iterable[dict]:
    """Return batches of questions about images where the model takes images and the data has any,
    else of text.

    :param config: config of the model
    :param max_length: tokens of a sample at most; no more than the model has positions for
    :param batch_size: texts in a batch
    :raises ValueError: if questions about images are to run in larger batches than of one
    """
    if source.shows_images(config):
        if batch_size > 1:
            raise ValueError("--batch-size is for text: questions about images run one by one")
        from casp_plugin.data.conversation_batches import conversation_loader

        return conversation_loader(source.conversations(samples, seed), processor, max_length)
    from casp_plugin.data.text_batches import calibration_loader  # needs llm-compressor

    tokenizer = getattr(processor, "tokenizer", processor)
    texts = source.texts(tokenizer, samples, seed)
    return calibration_loader(texts, tokenizer, max_length, batch_size)

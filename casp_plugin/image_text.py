"""Calibration data with images: questions, answers and their images become batches for a model.

The model's own processor makes them, one conversation a batch, so images may differ in size and
number. An image is decoded and processed when its batch is asked for: what stays in memory is
the file.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, List
from loguru import logger
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import BatchFeature, ProcessorMixin

from casp_plugin.calibration import read_source
from casp_plugin.models import image_prefix, placeholder

__all__ = [
    "Conversation",
    "conversation_loader",
    "load_conversations",
    "processed",
    "prompt_text",
]

#: share of the rows whose images may be unreadable before it is an error
BROKEN_SHARE = 0.1


@dataclass(frozen=True)
class Conversation:
    """A question about images, and its answer.

    :param images: each a file's bytes or its path; none for plain text
    :param task: what kind of question it is, to tell scores apart
    :param video: whether the images are the frames of one video
    """

    images: tuple[bytes | Path, ...]
    question: str
    answer: str
    task: str = ""
    video: bool = False

    def decoded(self) -> list[PILImage.Image]:
        """The images in RGB.

        :raises OSError: if one cannot be read
        """
        files = [BytesIO(each) if isinstance(each, bytes) else each for each in self.images]
        return [PILImage.open(file).convert("RGB") for file in files]


def load_conversations(
    source: str | Dataset,
    samples: int,
    image_column: str = "image",
    question_column: str = "question",
    answer_column: str = "answer",
    split: str = "train",
    config_name: str | None = None,
    seed: int = 0,
    task_column: str | None = None,
    video_column: str | None = None,
) -> list[Conversation]:
    """Questions about images, shuffled. Rows with an image that cannot be read are left out.

    :param source: a .jsonl, .json, .parquet or .csv file, in which paths of images are relative to
        it; a folder made by ``save_to_disk``; a folder of images beside a ``metadata.jsonl`` or
        ``metadata.csv`` whose ``file_name`` names them (they come as column ``image``); a dataset
        id on the Hugging Face hub; or a dataset
    :param samples: largest number of rows to take
    :param image_column: column that holds an image, a list of images or nothing; an image is a
        path or the bytes of a file
    :param question_column: column that holds the user's text
    :param answer_column: column that holds the assistant's text
    :param split: split to read, where the source has several
    :param config_name: configuration of a hub dataset
    :param seed: seed of the shuffle
    :param task_column: column that names the kind of question, if any
    :param video_column: column that holds the frames of a video, a list of images, instead of an
        ``image_column``
    :raises ValueError: if the source does not exist, has no such column or no rows, or if more
        than ``BROKEN_SHARE`` of the rows have an image that cannot be read
    """
    if isinstance(source, Dataset):
        data, source, folder = source, "given", Path()
    else:
        data = read_source(source, split, config_name)
        folder = Path(source) if Path(source).is_dir() else Path(source).parent
    seen = video_column or image_column
    columns = [seen, question_column, answer_column, *filter(None, [task_column])]
    missing = [column for column in columns if column not in data.column_names]
    if missing:
        raise ValueError(
            f"dataset {source!r} has no column {missing[0]!r}; its columns are {data.column_names}"
        )
    data = _undecoded(data.select_columns(columns), seen).shuffle(seed=seed)
    found, broken = [], []
    for row in tqdm(data, desc="Reading images", total=min(samples, len(data))):
        words = [_words(row[column], column, source) for column in (question_column, answer_column)]
        task = str(row[task_column]) if task_column else ""
        try:
            images = tuple(_file(image, folder) for image in _listed(row[seen]))
            one = Conversation(images, *words, task, video=bool(video_column and images))
            one.decoded()
        except (OSError, SyntaxError, ValueError, TypeError, PILImage.DecompressionBombError) as e:
            broken.append(f"{type(e).__name__}: {e}")  # what Pillow raises for broken files
            continue
        found.append(one)
        if len(found) == samples:
            break
    if broken:
        rows = len(broken) + len(found)
        _tell_broken(broken, rows, f"images that cannot be read, of dataset {source!r}")
    if not found:
        raise ValueError(f"dataset {source!r} holds no rows")
    return found


def conversation_loader(
    conversations: Iterable[Conversation], processor: ProcessorMixin, max_length: int
) -> DataLoader:
    """Batches of one conversation each, as the model takes them: token ids, pixels and whatever
    else its processor makes. The processor's chat template sets question and answer.

    llm-compressor traces a model once, on its first batch, so that all batches must be of one kind:
    where some conversations have images, those without any are left out with a warning.

    :param processor: the model's own
    :param max_length: tokens a batch at most, those of images counted; the end of an answer is
        cut, a conversation whose images do not fit is left out with a warning
    :raises ValueError: if images and placeholders in a question do not agree in number, the
        processor refuses the images of more than ``BROKEN_SHARE``, or no conversation fits
    """
    conversations = list(conversations)
    seen = [one for one in conversations if one.images] or conversations
    if len(seen) < len(conversations):
        logger.warning(f"{len(conversations) - len(seen)} conversations without images left out")
    batches = _Batches(seen, processor, max_length)
    for one in seen:
        prompt_text(one, processor)  # images and placeholders agree
    fits, lengths, refused = [], [], []
    for one in tqdm(seen, desc="Checking images"):
        try:
            lengths.append(batches.tokens_with_images(one))
        except ValueError as error:  # of the processor: too wide for it, for instance
            refused.append(str(error))
            continue
        if lengths[-1] <= max_length:
            fits.append(one)
    if refused:
        _tell_broken(refused, len(seen), "images that the processor refuses")
    if not fits:
        raise ValueError(
            f"no conversation fits max_length {max_length}: with its images the shortest takes "
            f"{min(lengths)} tokens"
        )
    if len(fits) < len(lengths):
        left_out = len(lengths) - len(fits)
        logger.warning(f"{left_out} conversations left out: their images take over {max_length}")
    batches.all = fits
    return DataLoader(batches, batch_size=None)


class _Batches(torch.utils.data.Dataset):
    """Conversations, processed when asked for."""

    def __init__(self, conversations: list[Conversation], processor, max_length: int):
        self.all = conversations
        self.processor = processor
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        made = self.tensors(self.all[index])
        tokens = made["input_ids"].shape[1]
        return {
            name: value[:, : self.max_length] if value.shape[:2] == (1, tokens) else value
            for name, value in made.items()
        }

    def tensors(self, one: Conversation) -> dict[str, torch.Tensor]:
        made = processed([one], self.processor)
        return {name: value for name, value in made.items() if torch.is_tensor(value)}

    def tokens_with_images(self, one: Conversation) -> int:
        """Tokens up to the last one of an image."""
        ids = self.tensors(one)["input_ids"][0]
        # what the placeholder becomes is another token in Gemma3
        kind = "video" if one.video else "image"
        known = set(getattr(self.processor, f"{kind}_token_ids", None) or ())
        if token := placeholder(self.processor, one.video):
            known.add(self.processor.tokenizer.convert_tokens_to_ids(token))
        where = torch.isin(ids, torch.tensor(sorted(known - {None}), dtype=ids.dtype)).nonzero()
        return int(where[-1]) + 1 if one.images and len(where) else 1


def processed(
    conversations: list[Conversation], processor: ProcessorMixin, answered: bool = True, **padding
) -> BatchFeature:
    """Conversations as the model takes them, in one batch.

    :param answered: with the answers, and without the line break or space that may follow them; if
        not, the assistant's turn begins
    :param padding: arguments for the processor that say how to pad
    """
    texts = [prompt_text(one, processor, answered) for one in conversations]
    if answered:
        texts = [text.rstrip() for text in texts]
    shown = [one.decoded() for one in conversations]
    arguments = {"images": shown} if any(shown) else {}
    if any(one.video for one in conversations):
        arguments = {"videos": shown, "do_sample_frames": False}
    begin = processor.tokenizer.bos_token
    if begin and texts[0].startswith(begin):  # as transformers' own apply_chat_template does
        arguments["add_special_tokens"] = False
    return processor(text=texts, return_tensors="pt", **arguments, **padding)


def prompt_text(one: Conversation, processor: ProcessorMixin, answered: bool = True) -> str:
    """A conversation as text with placeholders for its images, by the processor's chat template.

    :param answered: with the answer; without it the assistant's turn begins
    :raises ValueError: if images and placeholders in the question do not agree in number
    """
    token = placeholder(processor, one.video)
    kind, wanted = ("video", 1) if one.video else ("image", len(one.images))
    marked = one.question.count(token) if token else 0
    if marked not in (0, wanted):
        raise ValueError(
            f"question {one.question[:80]!r} holds {marked} placeholders {token!r} for "
            f"{wanted} {kind}s"
        )
    shown = [] if marked else [{"type": kind}] * wanted
    messages = [{"role": "user", "content": [*shown, {"type": "text", "text": one.question}]}]
    if answered:
        content = [{"type": "text", "text": one.answer}]
        messages.append({"role": "assistant", "content": content})
    if getattr(processor, "chat_template", None):
        return processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not answered
        )
    text = f"{image_prefix(processor, one.video) * len(shown)}{one.question}"
    return f"{text} {one.answer}" if answered else text  # a token begins with the space


def _undecoded(data: Dataset, column: str) -> Dataset:
    """Images as files: decoding is ours, a broken one must not stop the reading."""
    feature = data.features[column]
    if isinstance(feature, Image):
        return data.cast_column(column, Image(decode=False))
    if isinstance(feature, List) and isinstance(feature.feature, Image):
        return data.cast_column(column, List(Image(decode=False)))
    return data


def _tell_broken(errors: list[str], rows: int, what: str) -> None:
    """
    :raises ValueError: if they are more than ``BROKEN_SHARE`` of the rows
    """
    message = f"{len(errors)} of {rows} rows have {what}: {errors[0]}"
    if len(errors) > BROKEN_SHARE * rows:
        raise ValueError(message)
    logger.warning(f"{message}; left out")


def _words(value: Any, column: str, source: str) -> str:
    """Text of a cell.

    :raises ValueError: if it holds several
    """
    if isinstance(value, list | dict):
        raise ValueError(
            f"dataset {source!r}: column {column!r} holds {value!r:.80}, not one text a row"
        )
    return "" if value is None else str(value)


def _listed(value: Any) -> list:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _file(image: str | bytes | dict, folder: Path) -> bytes | Path:
    """
    :raises TypeError: if it is neither the path nor the bytes of a file
    """
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path") or ""
    return image if isinstance(image, bytes) else folder / image
